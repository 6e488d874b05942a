import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_eff.engines.checkpoints import is_complete
from hf_eff.engines.log_checkpoint import weights_sha256
from hf_eff.engines.replay_log import ReplayLog
from hf_eff.errors import CheckpointError, PlanError
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.tiny import tiny_model
from hf_eff.testing.trial import Trial, outcome_of, registered

KEEPERS = [
    dataclasses.replace(spec, tiny={**spec.tiny, "save": "log"})
    for spec in (get_method("memory", name) for name in list_methods("memory"))
    if "save" in spec.config.__dataclass_fields__
]
MEZO = next(spec for spec in KEEPERS if spec.name == "mezo")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def known():
    with registered(MEZO):
        yield


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


def saving(tmp_path, **arguments):
    return Trial(MEZO, tmp_path, max_steps=4, arguments={**EVERY_STEP, **arguments})


def interrupted(trial, step=2, change=lambda trainer: None):
    """A run to the checkpoint of ``step``, and the trainer that goes on."""
    first = trial.build("run", max_steps=step)
    first.train()
    second = trial.build("run")
    change(second)
    return first, second


@pytest.mark.parametrize("spec", KEEPERS, ids=lambda spec: spec.name)
def test_resumed_from_the_log_equals_uninterrupted(spec, tmp_path):
    trial = Trial(spec, tmp_path, accumulation=2)
    assert trial.interrupted(2).differences(trial.whole()) == []
    assert (tmp_path / "stopped-2" / "checkpoint-2" / "replay.jsonl").is_file()


@pytest.mark.parametrize("memory", ["mezo", "lora+mezo"])
def test_over_sft_and_with_an_adapter(memory, tmp_path):
    options = {"save": "log"} if memory == "mezo" else {"mezo": {"save": "log"}, "lora": {"r": 4, "alpha": 8}}
    trial = Trial(MEZO, tmp_path, "sft", arguments={"memory": memory, "memory_kwargs": options})
    assert trial.interrupted(3).differences(trial.whole()) == []
    assert not [name for name in WEIGHTS if (tmp_path / "stopped-3" / "checkpoint-3" / name).exists()]


def test_a_checkpoint_is_kilobytes_and_the_end_is_whole(tmp_path):
    trainer = saving(tmp_path).build("run")
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert not [name for name in WEIGHTS if (checkpoint / name).exists()]
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 64 * 1024
    trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_run_folder_has_the_log_of_every_zeroth_order_run(tmp_path):
    trainer = Trial(get_method("memory", "mezo"), tmp_path, max_steps=2).build("run", memory_kwargs={})
    trainer.train()
    log = ReplayLog.load(tmp_path / "run" / "replay.jsonl")
    end = json.loads((tmp_path / "run" / "replay.jsonl").read_text().splitlines()[-1])
    assert len(log) == 2
    assert end["weights"] == weights_sha256(trainer.model, log)
    assert log.header.origin["architecture"] == "LlamaForCausalLM"
    trainer.save_log(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "replay.jsonl").read_text() == (tmp_path / "run" / "replay.jsonl").read_text()
    other = Trial(get_method("memory", "full"), tmp_path, max_steps=1).build("other")
    with pytest.raises(PlanError, match="no replay log"):
        other.save_log(tmp_path)
    other.train()
    assert not (tmp_path / "other" / "replay.jsonl").exists()


def test_old_checkpoints_go_and_each_stands_alone(tmp_path):
    trial = saving(tmp_path, save_total_limit=1)
    whole = trial.build("whole")
    whole.train()
    _, second = interrupted(trial, 3)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    second.train(resume_from_checkpoint=True)
    assert outcome_of(second).differences(outcome_of(whole)) == []


def test_a_damaged_log_is_passed_over(tmp_path):
    trial = saving(tmp_path)
    whole = trial.build("whole")
    whole.train()
    _, second = interrupted(trial, 3)
    path = tmp_path / "run" / "checkpoint-3" / "replay.jsonl"
    path.write_text(path.read_text().replace("0x1.", "0x1.0", 1))
    assert not is_complete(path.parent)
    with pytest.raises(CheckpointError, match="incomplete"):
        second.train(resume_from_checkpoint=str(path.parent))
    second.train(resume_from_checkpoint=True)
    assert outcome_of(second).differences(outcome_of(whole)) == []


def test_a_model_with_other_weights_cannot_go_on(tmp_path):
    first, second = interrupted(saving(tmp_path), change=lambda trainer: _shift(trainer.model))
    with pytest.raises(CheckpointError, match="started from other weights"):
        second.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="load those anew"):
        first.train(resume_from_checkpoint=True)  # its model has been trained


def _shift(model):
    with torch.no_grad():
        model.model.norm.weight += 1


def test_a_difference_between_the_samples_is_found_in_the_end(tmp_path):
    def change(trainer):
        with torch.no_grad():
            trainer.model.model.embed_tokens.weight.view(-1)[1] += 1

    _, second = interrupted(saving(tmp_path), change=change)
    with pytest.raises(CheckpointError, match="the rebuilt weights are not those of the run"):
        second.train(resume_from_checkpoint=True)


def test_an_adapter_that_no_seed_makes_again(tmp_path):
    """Each process begins with other random numbers; the run's folder has the first ones."""

    class WithAdapter(Trial):
        seed = 0

        def _plain(self, model, arguments):
            WithAdapter.seed += 1
            torch.random.default_generator.manual_seed(WithAdapter.seed)
            config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian", task_type="CAUSAL_LM")
            return super()._plain(get_peft_model(tiny_model(2, 32), config), arguments)

    trial = WithAdapter(MEZO, tmp_path, max_steps=4, arguments=EVERY_STEP)
    first, second = interrupted(trial, 2)
    assert not torch.equal(*(next(_random_factors(each.model)) for each in (first, second)))
    second.train(resume_from_checkpoint=True)
    WithAdapter.seed = 0
    whole = trial.build("whole")
    whole.train()
    assert outcome_of(second).differences(outcome_of(whole)) == []


def _random_factors(model):
    return (parameter for name, parameter in model.named_parameters() if "lora_A" in name)


def test_the_best_model_cannot_be_loaded_from_a_log(tmp_path):
    with pytest.raises(PlanError, match=r"save='log' keeps no weights for load_best_model_at_end=True"):
        saving(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1).build("run")
