"""Two processes over gloo: sharded training agrees over ranks and with one process, and resumes exactly."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts
from hf_eff.errors import PlanError
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.tiny import tiny_model

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


def loaded(path):
    spec = importlib.util.spec_from_file_location(f"beside_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORKER = loaded(HERE / "workers" / "fsdp2.py")
MEMORY = [get_method("memory", name) for name in list_methods("memory")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The worker's folder, and what its ranks wrote there; one launch for all tests."""
    found = loaded(HERE / "test_two_processes.py").launched(tmp_path_factory, "fsdp2")
    base = tmp_path_factory.getbasetemp()
    folder = base / "fsdp2" if (base / "fsdp2").exists() else base.parent / "fsdp2"
    return folder, found


@pytest.mark.parametrize("name", WORKER.CASES)
def test_ranks_agree_and_resuming_is_exact(shared, name):
    result = shared[1][name]
    assert "failed" not in result, result.get("failed")
    assert result["sharded"] is not name.endswith("DDP")
    assert result["weights"][0] == result["weights"][1]
    assert result["resumed"] == result["weights"]
    assert result["spent"][0] == result["spent"][1]


@pytest.mark.filterwarnings("ignore::hf_eff.errors.EffWarning")  # six steps do not visit every layer
@pytest.mark.parametrize("name", [name for name in WORKER.CASES if "bf16" not in name])
def test_one_process_with_the_same_batches_ends_alike(shared, tmp_path, name):
    trainer = WORKER.build(tmp_path, WORKER.CASES[name], save_strategy="no")
    start = {key: each.detach().clone() for key, each in trainer.model.named_parameters()}
    trainer.train()
    alone, together = WORKER.whole_weights(trainer), load_file(shared[0] / name / "weights.safetensors")
    assert alone.keys() == together.keys()
    moved = torch.cat([(alone[key] - start[key]).flatten() for key in alone])
    apart = torch.cat([(alone[key] - together[key]).flatten() for key in alone])
    assert moved.norm() > 1e-3
    assert apart.norm() / moved.norm() < 5e-6


def test_state_of_sharded_blocks_is_that_of_one_block(shared):
    states = {name: result["states"] for name, result in shared[1].items()}
    per_layer = len([name for name, _ in tiny_model(1).model.layers[0].named_parameters()])
    assert states["badam, accumulated, sharded checkpoint"] == per_layer
    assert states["badam, state kept"] == 3 * per_layer
    assert states["fused"] == 0


# what the plan says


def planned(backend, **options):
    facts = Facts(
        model=model_facts(tiny_model()),
        pool=PoolFacts(num_rows=100, mean_tokens=32.0, max_tokens=64),
        hardware=HardwareFacts(total_bytes=2**34, world_size=2, backend=backend),
        run=RunFacts(batch_size=4, length=32, max_grad_norm=0.0),
    )
    return make_plan(EffOptions(**options), facts)


@pytest.mark.parametrize("spec", MEMORY, ids=lambda spec: spec.name)
def test_fsdp2_is_promised_where_it_is_shown_and_refused_elsewhere(spec):
    assert spec.traits.fsdp2 == (spec.name in WORKER.PROMISED)
    if spec.traits.fsdp2:
        assert planned("fsdp2", memory=spec.name).facts.hardware.backend == "fsdp2"
    else:
        with pytest.raises(PlanError, match=f"memory='{spec.name}' does not work under FSDP2"):
            planned("fsdp2", memory=spec.name)


TAKES_OVER = [spec for spec in MEMORY if spec.traits.owns_optimizer or spec.traits.freezes_parameters]


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp1"])
@pytest.mark.parametrize("spec", TAKES_OVER, ids=lambda spec: spec.name)
def test_deepspeed_and_fsdp1_are_refused_before_anything_is_built(spec, backend):
    with pytest.raises(PlanError, match=f"memory='{spec.name}' .*DeepSpeed and FSDP1"):
        planned(backend, memory=spec.name)


@pytest.mark.parametrize("memory", ["badam", "hift", "lisa"])
def test_ddp_that_waits_for_every_gradient_is_refused(memory):
    facts = planned("ddp", memory=memory).facts
    waiting = facts.replace(run=dataclasses.replace(facts.run, ddp_find_unused_parameters=False))
    with pytest.raises(PlanError, match="without gradients, which DDP would wait for; use ddp_find_unused_parameters"):
        make_plan(EffOptions(memory=memory), waiting)


@pytest.mark.parametrize("policy", ["offload", "disk"])
def test_state_is_not_moved_in_shards(policy):
    facts = planned("fsdp2", memory="full").facts
    on_gpu = facts.replace(hardware=HardwareFacts(device="cuda", total_bytes=2**34, world_size=2, backend="fsdp2"))
    with pytest.raises(PlanError, match=f"state_policy='{policy}' .*FSDP2"):
        make_plan(EffOptions(memory="badam", memory_kwargs={"state_policy": policy}), on_gpu)
