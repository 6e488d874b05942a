"""Offloaded activations: where they wait changes, what is computed does not. The CPU plays the accelerator here."""

import pytest
import torch

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts
from hf_eff.engines.host_offload import HostStore, offload_layers
from hf_eff.errors import PlanError
from hf_eff.memory.offload import Offload, OffloadConfig, adapt, cost
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan
from hf_eff.testing.tiny import tiny_model


def batch():
    ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradients(model):
    torch.manual_seed(0)
    model.train()(**batch()).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def store(min_bytes=0):
    return HostStore(min_bytes, "cpu", pinned=False)


def facts_on(device):
    return Facts(
        model=model_facts(tiny_model(layers=4, width=32)),
        pool=PoolFacts(num_rows=8, mean_tokens=64, max_tokens=64),
        hardware=HardwareFacts(device=device),
        run=RunFacts(batch_size=2, length=64),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_bitwise_the_same(checkpointing):
    model = tiny_model(layers=3, width=32, attention_dropout=0.2)
    before = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = store()
    restore = offload_layers(model, kept)
    during = gradients(model)
    assert kept.moved_bytes > 0
    assert all(torch.equal(before[name], during[name]) for name in before)
    restore()
    moved = kept.moved_bytes
    gradients(model)
    assert kept.moved_bytes == moved
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_what_a_layer_saves_is_moved_once_and_parameters_are_not():
    model = tiny_model(layers=2, width=32)
    kept = store()
    seen = set()

    def pack(tensor):
        seen.add((tensor.data_ptr(), tensor.shape, tensor.stride()))
        return tensor

    layer = model.model.layers[0]
    hidden = torch.randn(2, 16, 32, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(16)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(hidden, position_embeddings=positions)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sizes = [torch.Size(shape).numel() * 4 for address, shape, _ in seen if address not in own]
    del out
    with kept.layer(layer):
        layer(hidden, position_embeddings=positions)
    assert kept.moved_bytes <= sum(sizes)
    assert kept.moved_bytes >= 0.5 * sum(sizes)


def test_small_tensors_and_forwards_without_gradients_stay():
    model = tiny_model(layers=2, width=32)
    kept = store(min_bytes=10**9)
    offload_layers(model, kept)
    gradients(model)
    with torch.no_grad():
        model(**batch())
    assert kept.moved_bytes == 0


def test_a_failing_layer_leaves_no_hook_behind():
    model = tiny_model(layers=2, width=32)
    kept = store()
    offload_layers(model, kept)
    with pytest.raises(AttributeError):
        model.model.layers[0](None)
    moved = kept.moved_bytes
    torch.ones(4, requires_grad=True).exp().sum().backward()
    assert kept.moved_bytes == moved


def test_a_cpu_is_refused_with_what_to_use_instead():
    with pytest.raises(PlanError, match=r"memory='offload' moves data off an accelerator.*memory='checkpointing'"):
        make_plan(EffOptions(memory="offload"), facts_on("cpu"))


def test_an_accelerators_bytes_wait_in_host_memory():
    assert adapt(OffloadConfig(), facts_on("cuda")).run.offload
    forecast = cost(OffloadConfig(), facts_on("cuda"))
    assert forecast.host_bytes > forecast.bytes["activations"] > 0


def test_on_a_cpu_the_method_leaves_the_model_alone():
    model = tiny_model(layers=2, width=32)
    method = Offload(OffloadConfig())
    method.train_begin(model, 0)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    assert method.log_entries() == {}
    method.train_end()


def test_a_model_without_layers_is_refused():
    with pytest.raises(PlanError, match="no stack of alike layers"):
        offload_layers(torch.nn.Linear(2, 2), store())
