"""Predicted bytes of optimizer state against the real optimizers, for every name of the installed transformers."""

import dataclasses
import importlib.util
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_eff.arguments import run_facts
from hf_eff.contracts.cost import TensorFacts, TrainableFacts
from hf_eff.engines.facts import model_facts
from hf_eff.engines.tensor_facts import with_details
from hf_eff.errors import OptionError
from hf_eff.hardware.memory_meter import optimizer_tensors, storage_bytes
from hf_eff.numerics.optimizer_bytes import (
    is_stateless,
    largest_tensor,
    optimizer_state_bytes,
    trained_tensors,
    updates_in_backward,
)
from hf_eff.testing.tiny import tiny_model

NAMES = [each.value for each in OptimizerNames]
PACKAGES = {
    "bitsandbytes": [name for name in NAMES if "ademamix" in name or "lion" in name or "rmsprop_bnb" in name]
    + ["adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"],
    "torchao": ["adamw_torch_4bit", "adamw_torch_8bit"],
    "galore_torch": ["galore_adamw", "galore_adamw_layerwise", "galore_adafactor"],
    "apollo_torch": ["apollo_adamw", "apollo_adamw_layerwise"],
    "lomo_optim": ["lomo"],
    "grokadamw": ["grokadamw"],
    "schedulefree": ["schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"],
    "optimi": ["stable_adamw"],
    "torchdistx": ["adamw_anyprecision"],
    "torch": ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"],
}
ELSEWHERE = {"adamw_torch_xla", "adamw_torch_npu_fused", "galore_adamw_8bit", "galore_adamw_8bit_layerwise", "adalomo"}
"""Names that need another device."""
BROKEN = {"galore_adafactor_layerwise"}  # transformers sets lr and relative_step together
CASES = [(name, package) for package, names in PACKAGES.items() for name in names]


@pytest.fixture(autouse=True)
def no_overrides():
    """bitsandbytes remembers the embeddings of earlier models by ``id``, which Python uses again."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


def facts_of(model):
    return with_details(model_facts(model), model)


def of(optim, *shapes, kind="linear", size=4.0, **options):
    tensors = tuple(TensorFacts(name=f"t{i}", shape=shape, bytes=size, kind=kind) for i, shape in enumerate(shapes))
    params = sum(math.prod(shape) for shape in shapes)
    part = TrainableFacts(params=params, lowest_block=0, block_matmul_params=(), tensors=tensors)
    return optimizer_state_bytes(optim, EMPTY, part, **options)


EMPTY = dataclasses.replace(model_facts(tiny_model(layers=1)), blocks=(), trainable=None)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_transformers_is_known(name):
    assert of(name, (64, 64), target_modules="all-linear").device >= 0


def test_every_name_is_measured_or_named_as_not_measurable():
    assert sorted([name for name, _ in CASES] + [*ELSEWHERE, *BROKEN]) == sorted(NAMES)


def test_an_unknown_name_is_refused():
    with pytest.raises(OptionError, match="optim='adamv' has no known state"):
        of("adamv", (4, 4))


def step(model, name, tmp_path, **options):
    """Bytes predicted, and held by the real optimizer after a step."""
    low_rank = "galore" in name or "apollo" in name
    if low_rank:
        options = {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=16", **options}
    args = TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to="none", **options)
    trainer = Trainer(model=model, args=args)
    optimizer = trainer.create_optimizer()
    getattr(optimizer, "train", lambda: None)()
    ids = torch.arange(3, 67).view(2, 32)
    loss = model(input_ids=ids, labels=ids).loss
    if hasattr(optimizer, "fused_backward"):
        optimizer.fused_backward(loss, 1e-3)
    else:
        loss.backward()
        optimizer.step()
    run, facts = run_facts(args), facts_of(model)
    predicted = optimizer_state_bytes(
        run.optim, facts, facts.trainable, optim_args=run.optim_args, target_modules=run.optim_target_modules
    )
    assert predicted.host == 0
    return predicted.device, storage_bytes(optimizer_tensors(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "package"), CASES)
def test_real_state(name, package, dtype, tmp_path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = tiny_model(layers=2, width=128, tie_word_embeddings=False).to(dtype)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):  # torchao would compile its step
        warnings.simplefilter("ignore")
        predicted, held = step(model, name, tmp_path)
    assert predicted == pytest.approx(held, rel=0.02, abs=64)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("sgd", "momentum=0.9"),
        ("rmsprop", "momentum=0.9,centered=true"),
        ("rmsprop", "momentum=0.5"),
        ("galore_adamw", "rank=8,proj_type=reverse_std"),
        ("galore_adamw", "rank=8,proj_type=right"),
        ("galore_adamw", "rank=8,proj_type=left"),
        ("galore_adamw", "rank=500"),
        ("adafactor", ""),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_real_state_with_options(name, args, dtype, tmp_path):
    if "galore" in name:
        pytest.importorskip("galore_torch")
    predicted, held = step(tiny_model(width=64).to(dtype), name, tmp_path, optim_args=args or None)
    assert predicted == pytest.approx(held, rel=0.02)


def test_tied_embeddings_and_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    model = peft.get_peft_model(tiny_model(width=128), peft.LoraConfig(r=32, target_modules="all-linear"))
    predicted, held = step(model, "adamw_8bit", tmp_path)
    assert predicted == pytest.approx(held, rel=0.02)


# -- worked out by hand ---------------------------------------------------------------------------------------------


def test_low_bit_states_by_hand():
    assert of("adamw_8bit", (64, 64)).device == 2 * (4096 + 4 * 16)
    assert of("adamw_8bit", (63, 65)).device == 8 * 63 * 65  # below 4096 entries
    assert of("adamw_8bit", (64, 64), kind="embedding").device == 8 * 4096  # embeddings stay whole
    assert of("lion_8bit", (64, 65)).device == 4160 + 4 * 17
    assert of("adamw_torch_4bit", (64, 64)).device == 2 * (2048 + 4 * 16 + 64) + 4
    assert of("adamw_torch_8bit", (64, 65)).device == 8 * 4160 + 4  # no multiple of a block


def test_factored_states_by_hand():
    assert of("adafactor", (30, 50), (7,), (3, 4, 5)).device == 4 * 80 + 4 * 7 + 4 * (12 + 15) + 3 * 4


def test_projected_states_by_hand():
    wide, tall = (32, 96), (96, 32)
    for shape in (wide, tall):  # two moments of rank 8 along the longer side, and the singular vectors of the shorter
        assert of("galore_adamw", shape, optim_args="rank=8", target_modules="all-linear").device == 4 * (
            2 * 8 * 96 + 32 * 32
        )
        half = of("galore_adamw", shape, size=2.0, optim_args="rank=8", target_modules="all-linear").device
        assert half == 2 * (2 * 8 * 96 + 8 * 32)
        assert of("apollo_adamw", shape, optim_args="rank=8", target_modules="all-linear").device == 2 * half
        assert of("galore_adamw", shape, optim_args="rank=8").device == 8 * 32 * 96  # no target
    eight = of("galore_adamw_8bit", (64, 512), size=2.0, optim_args="rank=8", target_modules="all-linear").device
    assert eight == 2 * (4096 + 4 * 16) + 2 * 8 * 64


def test_kahan_and_types():
    assert of("adamw_anyprecision", (8, 8)).device == 8 * 64 + 4
    options = "use_kahan_summation=true,momentum_dtype=bfloat16,variance_dtype=bfloat16"
    assert of("adamw_anyprecision", (8, 8), optim_args=options).device == 6 * 64 + 4
    assert of("stable_adamw", (8, 8), size=2.0).device == 6 * 64 + 4
    assert of("adamw_torch", (8, 8), size=2.0).device == 4 * 64 + 4
    assert of("adamw_torch", (8, 8), size=2.0, in_float32=True).device == 8 * 64 + 4


def test_paged_states_leave_an_accelerator():
    shapes = ((400, 400), (100, 100))
    cpu = of("paged_adamw_32bit", *shapes)
    cuda = of("paged_adamw_32bit", *shapes, device="cuda")
    assert (cpu.device, cpu.host) == (8 * 170_000, 0)
    assert (cuda.device, cuda.host) == (80_000, 1_280_000)
    assert of("adamw_bnb_8bit", *shapes, device="cuda").host == 0


def test_names_that_keep_nothing_or_update_early():
    assert {name for name in NAMES if is_stateless(name)} == {"sgd", "lomo"}
    assert not is_stateless("sgd", "momentum=0.9")
    assert is_stateless("sgd", "momentum=0")
    early = {"lomo", "adalomo"} | {name for name in NAMES if "layerwise" in name}
    assert {name for name in NAMES if updates_in_backward(name)} == early


def test_target_modules_are_matched_as_transformers_matches_them():
    from transformers.trainer_utils import check_target_module_exists

    from hf_eff.numerics.optimizer_bytes import _is_target

    model = tiny_model()
    tensors = facts_of(model).trainable.tensors
    for targets in (
        ["attn"],
        ["q_proj", "mlp"],
        r".*layers\.\d+\.mlp\..*",
        ["model.layers.0.mlp.up_proj"],
        [".*gate.*"],
    ):
        for tensor in tensors:
            module = tensor.name.removesuffix(".weight").replace("{}", "0")
            expected = bool(check_target_module_exists(targets, module))
            given_targets = targets if isinstance(targets, str) else tuple(targets)
            assert bool(_is_target(tensor, given_targets)) == expected, (targets, module)


# -- parts of a model -----------------------------------------------------------------------------------------------


def test_tensors_of_a_model_add_up():
    model = tiny_model()
    facts = facts_of(model)
    groups, scale = trained_tensors(facts, facts.trainable)
    assert scale == 1
    assert sum(math.prod(tensor.shape) * count for tensor, count in groups) == facts.params
    assert largest_tensor(facts, facts.trainable) == 262 * 64
    assert len(facts.trainable.tensors) == 11  # two norms and seven matrices a layer, the embedding and the last norm


def test_a_block_takes_the_tensors_in_its_layers():
    facts = facts_of(tiny_model())
    sizes = tuple(block.matmul_params if i == 2 else 0 for i, block in enumerate(facts.blocks))
    block = TrainableFacts(params=facts.blocks[2].params, lowest_block=2, block_matmul_params=sizes)
    groups, scale = trained_tensors(facts, block)
    assert (len(groups), scale) == (9, 1)
    assert optimizer_state_bytes("adamw_torch", facts, block).device == 8 * block.params + 4 * 9


@given(st.integers(1, 10**6), st.sampled_from(NAMES))
def test_parts_without_tensors_are_estimated(params, name):
    part = TrainableFacts(params=params, lowest_block=0, block_matmul_params=())
    state = optimizer_state_bytes(name, EMPTY, part, target_modules="all-linear")
    assert 0 <= state.device + state.host <= 13 * params + 4 * (params + 64) + 8192


def test_nothing_trains_nothing_is_held():
    nothing = TrainableFacts(params=0, lowest_block=0, block_matmul_params=())
    assert optimizer_state_bytes("adamw_torch", EMPTY, nothing).device == 0
