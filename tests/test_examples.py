from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_target, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 4}


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_quickstart(tmp_path):
    trainer = example("quickstart").main(
        tiny_model(),
        tiny_tokenizer(),
        tiny_pool(60),
        tiny_target(8),
        output_dir=str(tmp_path),
        memory_kwargs={"switch_every": 2},
        max_steps=8,
        **{**TINY, "per_device_train_batch_size": 1},
    )
    assert len(trainer.selection) == 3  # 5% of 60
    assert trainer.state.global_step == 8
    assert trainer.plan.resolved.options.memory == "badam"
    for name in ("model.safetensors", "report.md", "selection/manifest.json", "governor.jsonl", "README.md"):
        assert (tmp_path / name).is_file(), name


def test_compare_memory(tmp_path, capsys):
    peaks = example("compare_memory").main(
        lambda: (tiny_model(), tiny_tokenizer()),
        tiny_pool(12),
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
    )
    table = capsys.readouterr().out
    assert list(peaks) == ["full", "lora", "badam", "mezo"]
    assert all(name in table for name in peaks)
    assert peaks["badam"]["predicted"] < peaks["full"]["predicted"]
    assert all(peak["predicted"] > 0 for peak in peaks.values())


def test_governed_sft(tmp_path):
    options = {**TINY, "num_train_epochs": 10, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    trainer, looks = example("governed_sft").main(
        tiny_model(), tiny_tokenizer(), tiny_pool(24), tiny_target(8), "5Gflop", str(tmp_path), **options
    )
    assert 0 < trainer.ledger.spent()["flops"] <= 5e9
    assert len(looks) > 2
    assert all(look.decision.reason for look in looks)
    assert trainer.report["binding"]["stopped_by"] in ("flops", None)


def test_zo_exact_match(tmp_path):
    options = {**TINY, "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    trainer = example("zo_exact_match").main(tiny_model(), tiny_tokenizer(), tiny_pool(12), 2, str(tmp_path), **options)
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "replay.jsonl").is_file()
    assert not (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert (tmp_path / "replay.jsonl").stat().st_size < 16 * 1024


def test_governor_dpo(tmp_path):
    trainer, governor = example("governor_dpo").main(
        tiny_model(),
        tiny_model(),
        tiny_tokenizer(),
        "1Tflop",
        str(tmp_path),
        12,
        **{**TINY, "max_steps": 3, "activation_checkpointing": False},
    )
    assert trainer.state.global_step == 3
    assert governor.ledger.binding() == "flops"
    assert (tmp_path / "governor.jsonl").is_file()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_the_public_names_only(path):
    import hf_eff

    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("from hf_eff import")]
    names = {name.strip() for line in lines for name in line.removeprefix("from hf_eff import").split(",")}
    assert names
    assert names <= set(hf_eff.__all__)
