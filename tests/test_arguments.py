import json

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import SFTConfig, TrlParser

from hf_eff import BudgetedSFTConfig, BudgetedTrainingArguments
from hf_eff.arguments import options_of, run_facts
from hf_eff.errors import OptionError, UnknownMethodError
from hf_eff.sft import _with_sft_config

FLAGS = [
    "--output_dir", "out", "--use_cpu", "True", "--memory", "badam", "--memory_kwargs", '{"switch_every": 5}',
    "--selection", "random", "--selection_kwargs", '{"fraction": "5e-1"}', "--budget", "2h, 3e15flop",
]  # fmt: skip


@pytest.mark.parametrize("cls", [BudgetedTrainingArguments, BudgetedSFTConfig])
def test_flags_reach_the_fields(cls):
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(FLAGS)
    assert args.memory_kwargs == {"switch_every": 5}
    options = options_of(args)
    assert (options.selection, options.memory, options.budget) == ("random", "badam", "2h, 3e15flop")


@pytest.mark.parametrize("cls", [BudgetedTrainingArguments, BudgetedSFTConfig])
def test_yaml_with_nested_mappings_and_overrides(cls, tmp_path):
    config = {"output_dir": "out", "use_cpu": True, "memory": "badam", "memory_kwargs": {"switch_every": 5}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    (args,) = TrlParser(cls).parse_args_and_config(["--config", str(path), "--budget", "1Gflop"])
    assert args.memory_kwargs == {"switch_every": 5}
    assert args.budget == "1Gflop"


@pytest.mark.parametrize("cls", [BudgetedTrainingArguments, BudgetedSFTConfig])
def test_round_trip_and_positional_output_dir(cls):
    args = cls("out", use_cpu=True, memory="badam", memory_kwargs={"switch_every": 5}, budget="1h")
    values = json.loads(args.to_json_string())
    assert values["memory_kwargs"] == {"switch_every": 5}
    assert args.output_dir == "out"


def test_mistakes_surface_when_the_arguments_are_made():
    with pytest.raises(UnknownMethodError, match="Did you mean 'badam'"):
        BudgetedTrainingArguments("out", use_cpu=True, memory="badan")
    with pytest.raises(OptionError, match=r"BAdamConfig has no option 'swtch_every'. Did you mean 'switch_every'"):
        BudgetedTrainingArguments("out", use_cpu=True, memory="badam", memory_kwargs={"swtch_every": 5})
    with pytest.raises(OptionError, match="is not an amount with a unit"):
        BudgetedTrainingArguments("out", use_cpu=True, budget="two hours")


def test_methods_that_freeze_tell_ddp_in_time():
    assert BudgetedTrainingArguments("out", use_cpu=True).ddp_find_unused_parameters is None
    assert BudgetedTrainingArguments("out", use_cpu=True, memory="badam").ddp_find_unused_parameters is True
    kept = BudgetedTrainingArguments("out", use_cpu=True, memory="badam", ddp_find_unused_parameters=False)
    assert kept.ddp_find_unused_parameters is False


def test_run_facts_read_what_a_plan_needs():
    args = BudgetedSFTConfig("out", use_cpu=True, bf16=True, packing=True, gradient_accumulation_steps=3, optim="sgd")
    facts = run_facts(args, "sft")
    assert (facts.accumulation, facts.packing, facts.bf16, facts.optim) == (3, True, True, "sgd")
    assert facts.compute_bytes == 2.0
    assert facts.optimizer_bytes == 0.0
    assert facts.checkpointing  # SFTConfig turns it on


def test_other_argument_classes_become_sft_config():
    ours = BudgetedTrainingArguments("out", use_cpu=True, budget="1h", learning_rate=1e-3)
    _, named = _with_sft_config((), {"args": ours})
    assert isinstance(named["args"], BudgetedSFTConfig)
    assert named["args"].budget == "1h"
    assert named["args"].learning_rate == 1e-3
    stock = TrainingArguments("out", use_cpu=True)
    assert _with_sft_config((None, stock), {})[0][1] is stock
    sft = SFTConfig("out", use_cpu=True)
    assert _with_sft_config((), {"args": sft})[1]["args"] is sft
