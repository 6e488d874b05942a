"""Every ``optim`` name of transformers: a run cut by a checkpoint and resumed equals the uninterrupted one, bitwise."""

import gc
import importlib.util
from functools import cache

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.errors import CheckpointError
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tokenised

NAMES = [each.value for each in OptimizerNames]
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim"}
PACKAGES |= {"grokadamw": "grokadamw", "schedule": "schedulefree", "stable": "optimi"}
TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
PLAIN = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
CANNOT_RUN = {
    "adamw_torch_xla": "needs torch_xla",
    "adamw_torch_npu_fused": "needs torch_npu",
    "adamw_anyprecision": "needs torchdistx, which is no longer released",
    "galore_adafactor_layerwise": "transformers leaves relative_step=True beside a learning rate, which raises",
    "galore_adamw_8bit": "galore_torch calls CUDA kernels",
    "galore_adamw_8bit_layerwise": "galore_torch calls CUDA kernels",
}
HIDES_STATE = ["galore_adamw", "apollo_adamw", "grokadamw", "adalomo"]
HIDES_STATE += ["galore_adamw_layerwise", "apollo_adamw_layerwise"]
FAST = [*HIDES_STATE, "galore_adafactor", "lomo", "adamw_torch", "adafactor", "adamw_8bit", "schedule_free_adamw"]
FAST += ["stable_adamw"]
"""The other names are optimizers of the same packages, with the same way to keep state."""
LOADS_AND_DIFFERS = [name for name in HIDES_STATE if name not in ("galore_adamw", "apollo_adamw")]
CUT, END = 2, 4


def require_package(name):
    if name.startswith(("galore", "apollo", "lomo", "adalomo", "grokadamw", "schedule", "stable")):
        package = next(package for start, package in PACKAGES.items() if name.startswith(start))
    elif name in TORCHAO:
        package = "torchao"
    else:
        package = "torch" if name in PLAIN or name in CANNOT_RUN else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def adalomo_on_cpu(request, monkeypatch):
    """lomo_optim places AdaLomo's moments by ``.cuda()``, and does nothing else that needs an accelerator."""
    if "adalomo" in request.node.name:
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect():
    """accelerate collects garbage after each training, which takes longer than these trainings."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def rows():
    return tokenised(tiny_pool(8))


def build(folder, name, kind=BudgetedTrainer, dtype=torch.float32, dropout=0.1, **changes):
    options = {"optim": name, "max_grad_norm": 0.0, "warmup_steps": 1, "learning_rate": 1e-2, "max_steps": END}
    if name.startswith(("galore", "apollo")):  # the projection changes between the checkpoint and the end
        options |= {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=3"}
    if name.startswith("schedule_free"):
        options["lr_scheduler_type"] = "constant"
    if name == "schedule_free_radam":  # its first steps move nothing
        options["max_steps"] = 2 * END
    arguments = {
        **options,
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": CUT,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    if kind is BudgetedTrainer:
        args = BudgetedTrainingArguments(**{"budget": "1e12flop", **arguments})
    else:
        args = TrainingArguments(**arguments)
    model = tiny_model(layers=2, width=32, attention_dropout=dropout).to(dtype)
    trainer = kind(model=model, args=args, train_dataset=rows(), data_collator=collator())
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def whole_and_resumed(folder, name, **changes):
    whole = build(folder, name, **changes)
    whole.train()
    resumed = build(folder, name, **changes)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}"))
    return whole, resumed


def check_resume(folder, name, **changes):
    whole, resumed = whole_and_resumed(folder, name, **changes)
    assert whole.state.global_step == resumed.state.global_step == whole.args.max_steps
    assert equal(weights(whole), weights(resumed))
    start = dict(tiny_model(layers=2, width=32).to(whole.model.dtype).named_parameters())
    assert not equal(weights(whole), start)


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in CANNOT_RUN],
)
def test_resumes_exactly(tmp_path, name):
    require_package(name)
    check_resume(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CANNOT_RUN)
def test_names_that_cannot_run_here_still_cannot(tmp_path, name):
    require_package(name)
    if name.startswith("galore_adamw_8bit") and torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises((ValueError, AssertionError, ImportError)):
        build(tmp_path, name).train()


@pytest.mark.parametrize("name", ["adafactor", "galore_adafactor", "galore_adamw", "apollo_adamw"])
def test_state_that_is_wider_than_bf16_weights_stays_so(tmp_path, name):
    require_package(name)
    check_resume(tmp_path, name, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", HIDES_STATE)
def test_with_all_fields_at_their_defaults_too(tmp_path, name):
    require_package(name)
    check_resume(tmp_path, name, budget=None)


# control: what transformers does


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_transformers_alone_cannot_load_projectors(tmp_path, name):
    require_package(name)
    build(tmp_path, name, Trainer).train()
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        build(tmp_path, name, Trainer).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CUT}"))


@pytest.mark.parametrize("name", LOADS_AND_DIFFERS)
def test_transformers_alone_starts_their_state_anew(tmp_path, name):
    require_package(name)
    whole, resumed = whole_and_resumed(tmp_path, name, kind=Trainer)
    assert not equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "adalomo"])
def test_a_checkpoint_without_the_state_is_refused(tmp_path, name):
    require_package(name)
    build(tmp_path, name, Trainer).train()
    with pytest.raises(CheckpointError, match="without hf_eff"):
        build(tmp_path, name, budget=None).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CUT}"))


# updates in the backward


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_layerwise", "lomo"])
def test_trains_as_transformers_does_at_a_constant_rate(tmp_path, name):
    require_package(name)
    same = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    stock = build(tmp_path / "stock", name, Trainer, **same)
    stock.train()
    ours = build(tmp_path / "ours", name, **same)
    ours.train()
    assert equal(weights(stock), weights(ours))


def test_layerwise_optimizers_follow_the_schedule(tmp_path):
    require_package("galore_adamw")
    # without dropout: transformers' layerwise optimizer draws one number from the global generator
    layerwise = build(tmp_path / "layerwise", "galore_adamw_layerwise", dropout=0.0)
    layerwise.train()
    at_once = build(tmp_path / "at_once", "galore_adamw", dropout=0.0)
    at_once.train()
    assert equal(weights(layerwise), weights(at_once))


def test_transformers_alone_leaves_layerwise_rates_constant(tmp_path):
    require_package("galore_adamw")
    stock = build(tmp_path, "galore_adamw_layerwise", Trainer)
    stock.train()
    rates = {group["lr"] for each in stock.optimizer.optimizer.optimizer_dict.values() for group in each.param_groups}
    assert rates == {stock.args.learning_rate}


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "lomo"])
def test_a_second_run_updates_once(tmp_path, name):
    require_package(name)
    twice, once = build(tmp_path / "twice", name), build(tmp_path / "once", name)
    twice.train()
    for parameter, start in zip(twice.model.parameters(), once.model.parameters(), strict=True):
        parameter.data.copy_(start)
    torch.manual_seed(3)
    once_seed = torch.get_rng_state()
    twice.train()
    torch.set_rng_state(once_seed)
    once.train()
    assert equal(weights(twice), weights(once))
