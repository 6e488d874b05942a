import json
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_eff import measured_step, measured_step_worker
from hf_eff.contracts.cost import MEMORY_TERMS
from hf_eff.measured_step import StepRequest, measure_step
from hf_eff.options import EffOptions
from hf_eff.profile import ProfileSetting, profile_memory
from hf_eff.testing.tiny import tiny_config


def request(**setting):
    return StepRequest(tiny_config(), "LlamaForCausalLM", "float32", (), ProfileSetting(**setting).to_dict())


def words(tmp_path, memory, batch_size=2, length=32, config=None, frozen=(), **options):
    """What a process is told."""
    (config or tiny_config()).save_pretrained(tmp_path / measured_step.MODEL)
    kind = options.pop("kind", "LlamaForCausalLM")
    dtype = options.pop("dtype", "float32")
    return {
        "architecture": kind,
        "dtype": dtype,
        "frozen": list(frozen),
        "setting": ProfileSetting(**options).to_dict(),
        "memory": memory,
        "memory_kwargs": {"badam": {"switch_every": 1}} if "badam" in memory else {},
        "batch_size": batch_size,
        "length": length,
    }


def test_a_process_of_its_own_measures_a_step():
    """The one test here that starts a process and lets it finish."""
    row = profile_memory(tiny_config(), ["full"], 2, 32, measure=True).rows[0]
    found = row["measured"]
    assert set(found["bytes"]) == set(MEMORY_TERMS)
    for term in ("weights", "gradients", "optimizer"):
        assert found["bytes"][term] == pytest.approx(row[term], rel=0.001)
    assert found["predicted"] == {**{term: row[term] for term in MEMORY_TERMS}, "total": row["total"]}
    assert found["bytes"]["activations"] == pytest.approx(row["activations"], rel=0.15)
    assert found["total"] > found["bytes"]["weights"]


def test_a_process_that_dies_of_memory_is_no_crash():
    """The system refuses it memory early, in the middle of whatever it does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (600 * 2**20, hard))
    try:
        found = measure_step(request(), EffOptions(memory="full"), 2, 16, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert "failed" in found


@pytest.mark.parametrize(
    ("code", "stderr", "sentence", "out_of_memory"),
    [
        (-signal.SIGKILL, "", "ran out of memory: the system ended the process", True),
        (1, "Traceback\nMemoryError", "ran out of memory (MemoryError)", True),
        (-signal.SIGABRT, "terminate called\nstd::bad_alloc", "ran out of memory (std::bad_alloc)", True),
        (3, "something\nelse", "the process ended with code 3 (else)", False),
        (3, "", "the process ended with code 3 (it said nothing)", False),
    ],
)
def test_how_a_process_ends_is_told(monkeypatch, code, stderr, sentence, out_of_memory):
    monkeypatch.setattr(
        subprocess, "run", lambda *words, **options: SimpleNamespace(returncode=code, stderr=stderr, stdout="")
    )
    found = measure_step(request(), EffOptions(memory="full"), 2, 16, 0.0)
    assert found == {"failed": sentence, "out_of_memory": out_of_memory}


def test_a_process_is_started_with_this_interpreter(monkeypatch):
    def run(command, **options):
        asked = json.loads((measured_step.Path(command[-1]) / measured_step.REQUEST).read_text())
        assert command[:3] == [sys.executable, "-m", "hf_eff.measured_step_worker"]
        assert (asked["memory"], asked["batch_size"], asked["length"]) == ("badam", 3, 16)
        assert asked["memory_kwargs"] == {"badam": {"switch_every": 2}}
        assert (measured_step.Path(command[-1]) / measured_step.MODEL / "config.json").is_file()
        return SimpleNamespace(returncode=3, stderr="", stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    options = EffOptions(memory="badam", memory_kwargs={"badam": {"switch_every": 2}})
    assert "code 3" in measure_step(request(), options, 3, 16, 0.0)["failed"]


# the worker, in this process


@pytest.mark.filterwarnings("ignore:memory='badam' visits:hf_eff.errors.OutsideIntendedUseWarning")
@pytest.mark.parametrize("memory", ["full", "badam", "lora+badam"])
def test_what_trained_is_what_is_predicted(tmp_path, memory):
    found = measured_step_worker.run_step(words(tmp_path, memory, batch_size=4, length=64), tmp_path)
    for term in ("weights", "gradients", "optimizer"):
        assert found["predicted"][term] == pytest.approx(found["bytes"][term], rel=0.02), term
    assert found["predicted"]["activations"] == pytest.approx(found["bytes"]["activations"], rel=0.2)
    whole = profile_memory(tiny_config(), [memory], 4, 64).rows[0]
    assert found["predicted"]["activations"] <= whole["activations"]  # the row is for the costliest layer


def test_the_same_two_steps_go_through_the_public_trainer(tmp_path):
    seen = []

    class Watched(measured_step_worker.BudgetedTrainer):
        def train(self, *words, **options):
            done = super().train(*words, **options)
            seen.append((self.state.global_step, self.args.memory, len(self.train_dataset), self.plan.ladder))
            return done

    real, measured_step_worker.BudgetedTrainer = measured_step_worker.BudgetedTrainer, Watched
    try:
        measured_step_worker.run_step(words(tmp_path, "mezo", batch_size=3), tmp_path)
    finally:
        measured_step_worker.BudgetedTrainer = real
    assert seen == [(2, "mezo", 6, ())]  # nothing is tried in place of a step that does not fit


def test_types_frozen_parameters_and_checkpointing_reach_the_model(tmp_path):
    plain = measured_step_worker.run_step(words(tmp_path, "full", batch_size=4, length=64), tmp_path)
    frozen = ["model.embed_tokens.weight"]
    asked = words(tmp_path, "full", 4, 64, frozen=frozen, dtype="bfloat16", optim="sgd", activation_checkpointing=True)
    other = measured_step_worker.run_step(asked, tmp_path)
    assert other["bytes"]["weights"] == pytest.approx(plain["bytes"]["weights"] / 2, rel=0.01)
    assert other["bytes"]["gradients"] < plain["bytes"]["gradients"] / 2
    assert other["bytes"]["optimizer"] == 0
    assert other["bytes"]["activations"] < 0.7 * plain["bytes"]["activations"]


def test_other_kinds_of_language_models_train(tmp_path):
    from transformers import BertConfig, T5Config

    small = {
        "vocab_size": 100,
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 16,
        "num_heads": 2,
        "num_layers": 2,
        "decoder_start_token_id": 0,
    }
    found = measured_step_worker.run_step(
        words(tmp_path / "t5", "full", config=T5Config(**small), kind="T5ForConditionalGeneration"), tmp_path / "t5"
    )
    assert found["bytes"]["gradients"] > 0
    bert = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    found = measured_step_worker.run_step(
        words(tmp_path / "bert", "full", config=bert, kind="BertForMaskedLM"), tmp_path / "bert"
    )
    assert found["bytes"]["activations"] > 0


def test_errors_are_told_apart(tmp_path, monkeypatch):
    def written(error):
        def run_step(*words):
            raise error

        monkeypatch.setattr(measured_step_worker, "run_step", run_step)
        (tmp_path / measured_step.REQUEST).write_text("{}")
        measured_step_worker.main(tmp_path)
        return json.loads((tmp_path / measured_step.RESULT).read_text())

    short = written(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nmore"))
    assert short["out_of_memory"]
    assert short["failed"].startswith("ran out of memory (RuntimeError: DefaultCPUAllocator")
    assert "\n" not in short["failed"]
    assert written(MemoryError())["out_of_memory"]
    assert written(ValueError("no such thing")) == {"failed": "ValueError: no such thing", "out_of_memory": False}


def test_random_rows_are_equal_each_time():
    from hf_eff.testing.tiny import tiny_model

    first, second = (measured_step_worker.random_rows(tiny_model(), 3, 5) for _ in range(2))
    assert first == second
    assert [len(row["input_ids"]) for row in first] == [5, 5, 5]
    assert max(max(row["input_ids"]) for row in first) < 262
