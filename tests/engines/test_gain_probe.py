import hashlib
import json
import math
import random

import numpy as np
import pytest
import torch

from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.engines.held_out import HeldOut
from hf_eff.errors import CheckpointError, DataError
from hf_eff.numerics.flops import forward_flops
from hf_eff.testing.tiny import collator, tiny_model, tiny_target, tokenised
from hf_eff.testing.torchrun import torchrun


@pytest.fixture(scope="module")
def rows():
    return tokenised(tiny_target(30)).remove_columns(["source"])


def make_probe(rows, **options):
    return GainProbe(rows, collator(), **({"is_causal_lm": True, "num_examples": 12, "batch_tokens": 90} | options))


def moved(model, seed=0, size=0.02):
    """The same model after a step somewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def subset_of(rows, num_examples, seed):
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), num_examples))]


def one_by_one(model, subset):
    """Loss of each row, from the model's own loss on that row alone."""
    with torch.no_grad():
        return np.array([model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.item() for row in subset])


def test_equals_losses_taken_one_by_one(rows):
    model = tiny_model()
    subset = subset_of(rows, 12, seed=3)
    probe = make_probe(rows, seed=3)
    before = one_by_one(model, subset)
    first = probe.read(model)
    now = one_by_one(moved(model), subset)
    second = probe.read(model)
    assert first.mean == pytest.approx(before.mean(), rel=1e-6)
    assert (first.paired_delta, first.paired_se, first.num_examples) == (None, None, 12)
    difference = before - now
    assert second.mean == pytest.approx(now.mean(), rel=1e-6)
    assert second.paired_delta == pytest.approx(sum(difference) / 12, rel=1e-5)
    spread = math.sqrt(sum((d - sum(difference) / 12) ** 2 for d in difference) / 11)
    assert second.paired_se == pytest.approx(spread / math.sqrt(12), rel=1e-4)
    assert probe.level == pytest.approx(-sum(difference) / 12, rel=1e-5)


def test_pairing_removes_what_makes_examples_differ(rows):
    probe, model = make_probe(rows, num_examples=30), tiny_model()
    probe.read(model)
    paired = probe.read(moved(model, size=0.002)).paired_se
    losses = probe.state_dict()
    unpaired = math.sqrt((np.var(losses["baseline"], ddof=1) + np.var(losses["previous"], ddof=1)) / 30)
    assert paired < 0.3 * unpaired


def test_the_subset_is_decided_by_the_seed_alone(rows):
    same, again, other = (make_probe(rows, seed=seed).state_dict()["examples"] for seed in (1, 1, 2))
    assert same == again != other


def state_of(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def train(rows, probe_every, steps=6):
    """A few steps with dropout, whose masks come from the global random state."""
    model = tiny_model(attention_dropout=0.2).train()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state must be left alone
    probe = make_probe(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    collate = collator()
    losses = []
    for step in range(steps):
        loss = model(**collate([rows[step], rows[step + 1]])).loss
        loss.backward()
        if probe_every and step % probe_every == 0:
            # Between backward and step: gradients are pending and must survive.
            probe.read(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if probe_every:
            probe.read(model)
    draws = (torch.rand(2).tolist(), random.random(), np.random.rand())  # noqa: NPY002
    return state_of(model), losses, draws, model.training


def test_training_is_bit_identical_with_and_without_probes(rows):
    without, with_probes = train(rows, probe_every=0), train(rows, probe_every=2)
    assert with_probes == without
    assert without[3] is True


def test_rows_without_a_loss_take_no_part(rows):
    rows = [dict(row) for row in rows.select(range(8))]
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])
    model = tiny_model()
    probe = make_probe(rows, num_examples=8)
    first = probe.read(model)
    kept = [row for i, row in enumerate(rows) if i != 2]
    before = one_by_one(model, kept)
    second = probe.read(moved(model))
    assert (first.num_examples, second.num_examples) == (7, 7)
    assert first.mean == pytest.approx(before.mean(), rel=1e-6)
    assert second.paired_delta == pytest.approx((before - one_by_one(model, kept)).mean(), rel=1e-5)
    assert json.loads(json.dumps(probe.state_dict(), allow_nan=False))["previous"][2] is None


def test_a_diverged_model_gives_no_delta_rather_than_a_wrong_one(rows):
    probe, model = make_probe(rows), tiny_model()
    probe.read(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    reading = probe.read(model)
    assert math.isnan(reading.mean)
    assert (reading.paired_delta, reading.paired_se, reading.num_examples) == (None, None, 0)


def test_the_price_is_known_before_and_is_what_runs(rows):
    model, shapes = tiny_model(), []
    facts = model_facts(model)
    probe = make_probe(rows, forward_flops=lambda batch, length: forward_flops(facts, BatchShape(batch, length)))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    probe.read(model)
    assert len(shapes) > 1
    assert all(height * length <= 90 for height, length in shapes)
    assert probe.cost_flops == sum(forward_flops(facts, BatchShape(*shape)) for shape in shapes) > 0
    assert probe.cost_tokens == sum(height * length for height, length in shapes)


def test_a_dear_probe_reads_fewer_examples(rows):
    whole, half, least = (
        make_probe(rows, num_examples=30, forward_flops=lambda batch, length: float(batch * length), max_flops=limit)
        for limit in (1e9, 450.0, 1.0)
    )
    assert whole.num_examples == 30
    assert 16 < half.num_examples < 30
    assert half.cost_flops == pytest.approx(450.0, rel=0.1)
    assert least.num_examples == 16
    reading = half.read(tiny_model())
    assert reading.num_examples == half.num_examples


class Scores(HeldOut):
    """Values per example that are given, reading by reading."""

    def __init__(self, readings):
        self.values_of_readings = iter(readings)

    def outputs(self, _model, batch):
        return [None] * len(batch["input_ids"])

    def values(self, _outputs):
        return np.array(next(self.values_of_readings))


def test_chance_above_best_is_bonferronis(rows):
    draw = np.random.default_rng(0)
    readings = [level + 0.05 * draw.standard_normal(12) for level in (1.0, 0.5, 0.52, 0.6, 0.51)]
    probe, chances = make_probe(rows, quantity=Scores(readings)), []
    for _ in readings:
        probe.read(tiny_model())
        chances.append(probe.chance_above_best)
    assert chances[:2] == [0.0, 0.0]
    for index in (2, 3, 4):
        rise = readings[index] - readings[1]
        z = rise.mean() / (rise.std(ddof=1) / math.sqrt(12))
        assert chances[index] == pytest.approx(max(0.0, 1 - index * 0.5 * math.erfc(z / math.sqrt(2))))
    assert chances[3] > 0.95 > chances[4]


def test_a_reading_that_is_not_finite_is_never_the_best(rows):
    readings = [np.full(12, math.nan), np.full(12, 2.0), np.full(12, 1.0), np.full(12, math.inf), np.full(12, 1.5)]
    probe = make_probe(rows, quantity=Scores([np.full(12, 3.0), *readings]))
    chances = []
    for _ in range(6):
        probe.read(tiny_model())
        chances.append(probe.chance_above_best)
    assert chances == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_resumes_exactly(rows):
    model = tiny_model()
    whole = make_probe(rows)
    whole.read(model)
    whole.read(moved(model, 1))
    saved = json.loads(json.dumps(whole.state_dict(), allow_nan=False))
    resumed = make_probe(rows)
    resumed.load_state_dict(saved)
    moved(model, 2)
    assert resumed.read(model) == whole.read(model)
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.level == whole.level
    assert resumed.chance_above_best == whole.chance_above_best


def test_a_state_of_other_examples_is_refused(rows):
    saved = make_probe(rows, seed=0).state_dict()
    with pytest.raises(CheckpointError, match="held-out examples differ"):
        make_probe(rows, seed=1).load_state_dict(saved)


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="needs held-out examples"):
        make_probe([])


class RandomCollator:
    """Masks labels at random, from the global state and from a state of its own."""

    def __init__(self):
        self.generator = None
        self.calls = 0

    def __call__(self, rows):
        self.generator = self.generator or torch.Generator().manual_seed(0)
        self.calls += 1
        batch = collator()(rows)
        hidden = torch.rand(batch["labels"].shape) + torch.rand(batch["labels"].shape, generator=self.generator) > 1.0
        return {**batch, "labels": batch["labels"].masked_fill(hidden, -100)}


def test_a_random_collator_is_asked_once_and_left_as_found(rows):
    model, collate = tiny_model(), RandomCollator()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    probe = GainProbe(rows, collate, is_causal_lm=True, num_examples=12)
    assert torch.rand(1) == expected
    assert (collate.generator, collate.calls) == (None, 0)
    probe.read(model)
    assert probe.read(model).paired_delta == 0.0
    torch.manual_seed(99)
    assert GainProbe(rows, collate, is_causal_lm=True, num_examples=12).read(model).mean == probe.read(model).mean


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_work_and_agree(rows, world_size):
    model, forwards, parts = tiny_model(), [], []
    for rank in range(world_size):
        count = []
        hook = model.register_forward_hook(lambda *_, count=count: count.append(1))
        make_probe(rows, rank=rank, world_size=world_size, gather=lambda part: parts.append(part) or [part]).read(model)
        hook.remove()
        forwards.append(len(count))
    readings = [
        make_probe(rows, rank=rank, world_size=world_size, gather=lambda part: parts).read(model)
        for rank in range(world_size)
    ]
    alone = make_probe(rows).read(model)
    # A collective forward (FSDP) hangs unless every rank runs as many.
    assert len(set(forwards)) == 1
    assert forwards[0] <= math.ceil(12 / world_size)
    assert all(reading == readings[0] for reading in readings)
    assert readings[0].mean == pytest.approx(alone.mean, rel=1e-6)
    assert readings[0].num_examples == 12


SCRIPT = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.engines.ranks import Ranks
from hf_eff.testing.tiny import collator, tiny_model, tiny_target, tokenised
from hf_eff.testing.torchrun import leave

dist.init_process_group("gloo")
ranks, rows = Ranks(), tokenised(tiny_target(30)).remove_columns(["source"])
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

def train(sharded, probing):
    model = tiny_model().train()
    for module in [*model.model.layers, model] if sharded else []:
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    probe = GainProbe(rows, collator(), is_causal_lm=True, num_examples=9, batch_tokens=90,
                      rank=ranks.rank, world_size=ranks.size, gather=ranks.gather)
    readings = []
    for step in range(3):
        model(**collator()([rows[step], rows[step + 1]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if probing:
            reading = probe.read(model)
            readings.append([reading.mean, reading.paired_delta, reading.paired_se, reading.num_examples])
    weights = [p.full_tensor() if sharded else p for p in model.parameters()]
    return ranks.gather(readings), [w.double().sum().item() for w in weights]

found = {f"{sharded}-{probing}": train(sharded, probing) for sharded in (False, True) for probing in (False, True)}
leave(found, Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    torchrun(folder / "script.py", str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "fsdp2"])
def test_two_processes_read_the_same_and_train_as_if_unprobed(two_processes, sharded):
    (first, second), weights = two_processes[f"{sharded}-True"]
    assert first == second
    assert len(first) == 3
    assert first[2][1] > 0
    assert weights == two_processes[f"{sharded}-False"][1]
