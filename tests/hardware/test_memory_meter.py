import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from hf_eff.hardware import probe
from hf_eff.hardware.memory_meter import MemoryMeter, optimizer_tensors, storage_bytes, weight_tensors
from hf_eff.hardware.probe import PeakMemory, current_bytes, hardware_facts, set_memory_cap

MIB = 2**20


def test_storages_count_once():
    base = torch.zeros(100)
    tied, view, other = base, base[10:20], torch.zeros(5, dtype=torch.float64)
    assert storage_bytes([base, tied, view, other]) == 400 + 40
    assert storage_bytes([]) == 0


def test_sparse_gradients_count():
    table = nn.Embedding(1000, 4, sparse=True)
    meter = MemoryMeter(table)
    with meter.forward_backward():
        table(torch.tensor([3, 5])).sum().backward()
    assert meter.peak_bytes()["gradients"] == 2 * 8 + 2 * 4 * 4  # two indices, two rows


def test_storages_on_the_meta_device():
    with torch.device("meta"):
        first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        second.weight = first.weight
    assert storage_bytes(nn.ModuleList([first, second]).parameters()) == 64
    assert storage_bytes([torch.empty(4, device="meta"), torch.empty(4, device="meta")]) == 32


def test_weights_include_buffers():
    assert storage_bytes(weight_tensors(nn.BatchNorm1d(8))) == 4 * 4 * 8 + 8  # two weights, two statistics, a counter


class Squares(nn.Module):
    """x -> ((x W)^2 W)^2 summed: autograd keeps the two inputs of W, the two inputs of the squares, and W itself."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width) / width)

    def forward(self, x):
        return ((x @ self.weight).pow(2) @ self.weight).pow(2).sum()


def test_terms_of_a_step_worked_out_by_hand():
    rows, width = 32, 64
    model = Squares(width)
    optimizer = torch.optim.AdamW(model.parameters())
    meter = MemoryMeter(model)
    x = torch.ones(rows, width)
    with meter.forward_backward():
        model(x).backward()
    optimizer.step()
    meter.observe(optimizer)
    terms = meter.peak_bytes()
    matrix, batch = 4 * width * width, 4 * rows * width
    assert terms["weights"] == terms["gradients"] == matrix
    assert terms["optimizer"] == 2 * matrix + 4  # two moments and the step
    assert terms["activations"] == 4 * batch  # the weight is no activation


def test_activations_are_those_alive_at_one_time():
    weight = nn.Parameter(torch.ones(1000))
    model = nn.ParameterList([weight])
    meter = MemoryMeter(model)
    for _ in range(3):  # each graph is freed by its backward
        with meter.forward_backward():
            ((weight + 1).exp() * 2).sum().backward()
    assert meter.peak_bytes()["activations"] == 4000
    with meter.forward_backward():
        kept = [((weight + 1).exp() * 2).sum() for _ in range(2)]
    assert meter.peak_bytes()["activations"] == 8000
    del kept


def test_a_saved_tensor_is_returned_unchanged():
    weight = nn.Parameter(torch.linspace(0, 1, 50))
    plain = torch.autograd.grad((weight.exp() * weight).sum(), weight)[0]
    with MemoryMeter(nn.ParameterList([weight])).forward_backward():
        (weight.exp() * weight).sum().backward()
    assert torch.equal(weight.grad, plain)


def test_rest_is_what_the_others_do_not_explain():
    model = nn.Linear(512, 512, bias=False)
    meter = MemoryMeter(model)
    with meter.forward_backward():
        passing = torch.ones(64 * MIB // 4)
        del passing
        model(torch.ones(1, 512)).sum().backward()
    terms = meter.peak_bytes()
    assert 60 * MIB < terms["rest"] < 80 * MIB
    assert meter.total_bytes() == pytest.approx(sum(terms.values()))


def test_rest_is_never_negative():
    model = nn.Linear(64, 64)
    meter = MemoryMeter(model)
    assert meter.peak_bytes()["rest"] >= 0


def test_optimizer_state_held_before_counts_as_held():
    model = nn.Linear(1024, 1024, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    meter = MemoryMeter(model, optimizer)
    terms = meter.peak_bytes()
    assert terms["optimizer"] == storage_bytes(optimizer_tensors(optimizer)) == 2 * 4 * MIB + 4
    assert meter.total_bytes() == pytest.approx(16 * MIB, abs=4 * MIB)


class Projection:
    def __init__(self, owner):
        self.basis, self.owner = torch.zeros(7), owner


class Layerwise(torch.optim.SGD):
    """Keeps state where ``state`` does not show it."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.1)
        self.model = model
        self.inner = {each: torch.optim.Adagrad([each]) for each in model.parameters()}
        self.rows = {"weight": torch.zeros(5)}
        self.param_groups[0]["means"] = [torch.zeros(3)]
        self.state[next(model.parameters())]["projection"] = Projection(self)


def test_state_is_found_wherever_an_optimizer_keeps_it():
    model = nn.Linear(4, 2, bias=False)
    optimizer = Layerwise(model)
    assert storage_bytes(optimizer_tensors(optimizer)) == 4 * (7 + 5 + 3 + 8 + 1)  # Adagrad's sum and its step
    assert not any(isinstance(each, nn.Parameter) for each in optimizer_tensors(optimizer))


def hold(mebibytes):
    held = torch.ones(mebibytes * MIB // 4)
    return held.sum().item()


def test_windows_overlap_and_nest():
    outer = PeakMemory().start()
    before = current_bytes()
    hold(96)
    inner = PeakMemory().start()
    hold(32)
    assert 90 * MIB < outer.peak() - before < 130 * MIB
    assert inner.peak() - before < 64 * MIB
    inner.stop()
    closed = inner.peak()
    hold(128)
    assert inner.peak() == closed
    assert outer.peak() - before > 120 * MIB
    outer.stop()


def test_a_window_sees_only_its_own_time():
    hold(96)
    window = PeakMemory().start()
    assert window.peak() - current_bytes() < 32 * MIB
    window.raise_to(10**15)
    assert window.peak() == 10**15
    window.stop()


def test_sampling_where_the_mark_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(probe, "_mark_resets", lambda: False)
    monkeypatch.setattr(probe, "_open_windows", weakref.WeakSet())
    window = PeakMemory().start()
    before = current_bytes()
    held = torch.ones(96 * MIB // 4)
    while probe._sampler[0].is_alive() and window._highest < before + 90 * MIB:
        held.add_(1)  # gives the sampler time; the test's own timeout ends a broken one
    assert window._highest - before > 90 * MIB
    window.stop()
    probe._sampler[0].join(timeout=5)
    assert not probe._sampler[0].is_alive()


def test_hardware_facts():
    facts = hardware_facts(world_size=2, backend="ddp")
    assert (facts.world_size, facts.backend) == (2, "ddp")
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert facts.cores >= 1
    assert facts.flops_per_second is None
    assert facts.energy_source in ("nvml", "zeus", "rapl", "unavailable")


CAPPED = """
import torch
from hf_eff.hardware.probe import current_bytes, set_memory_cap
from hf_eff.errors import OptionError
MIB = 2**20
set_memory_cap(current_bytes() + 200 * MIB)
torch.ones(100 * MIB // 4)
try:
    torch.ones(400 * MIB // 4)
except RuntimeError as error:
    assert "memory" in str(error), error
else:
    raise SystemExit("the cap did not hold")
set_memory_cap(None)
torch.ones(400 * MIB // 4)
try:
    set_memory_cap(MIB)
except OptionError as error:
    assert "already holds" in str(error)
else:
    raise SystemExit("a cap below what is held was accepted")
"""


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="the cap of a CPU process, on Linux")
def test_memory_cap():
    done = subprocess.run([sys.executable, "-c", CAPPED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_terms_on_cuda():
    model = nn.Linear(1024, 1024, bias=False, device="cuda")
    meter = MemoryMeter(model)
    with meter.forward_backward():
        passing = torch.ones(64 * MIB // 4, device="cuda")
        del passing
        model(torch.ones(1, 1024, device="cuda")).sum().backward()
    terms = meter.peak_bytes()
    assert terms["weights"] == terms["gradients"] == 4 * MIB
    assert 50 * MIB < terms["rest"] < 100 * MIB
    set_memory_cap(256 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1024 * MIB // 4, device="cuda")
    set_memory_cap(None)
