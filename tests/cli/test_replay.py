from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.cli import main
from hf_eff.testing.tiny import collator, tiny_config, tiny_model, tiny_pool, tiny_tokenizer, tokenised


def train(folder, model, rows=None, collate=None, **options):
    args = BudgetedTrainingArguments(
        **{
            "output_dir": str(folder),
            "memory": "mezo",
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "save_strategy": "steps",
            "save_steps": 2,
            "seed": 3,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
    )
    collate = collate or collator()
    rows = tokenised(tiny_pool(8)) if rows is None else rows
    trainer = BudgetedTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(2, 32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """A run of all weights, from a folder."""
    folder = tmp_path_factory.mktemp("run")
    trainer = train(folder, AutoModelForCausalLM.from_pretrained(base))
    trainer.save_model()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def replayed(capsys, *words):
    capsys.readouterr()  # what training printed
    code = main(["replay", *map(str, words), "--json"])
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else (code, captured.err)


def test_the_last_weights_are_rebuilt_bit_for_bit(finished, base, tmp_path, capsys):
    facts = replayed(capsys, finished, "--model", base, "--output", tmp_path / "rebuilt")
    assert same(weights(tmp_path / "rebuilt"), weights(finished))
    assert not same(weights(tmp_path / "rebuilt"), weights(base))
    assert (facts["steps"], facts["of"], facts["verified"]) == (4, 4, "equal to the run's")
    assert (tmp_path / "rebuilt" / "model.safetensors").is_file()
    assert (tmp_path / "rebuilt" / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["rebuilt"]  # nothing temporary is left


def test_any_step_is_rebuilt_bit_for_bit(finished, base, tmp_path, capsys):
    facts = replayed(capsys, finished, "--model", base, "--until-step", 2, "--output", tmp_path / "two")
    assert same(weights(tmp_path / "two"), weights(finished / "checkpoint-2"))
    assert facts["verified"] != "equal to the run's"  # the log has the digest of its end only
    replayed(capsys, finished / "replay.jsonl", "--model", base, "--until-step", 0, "--output", tmp_path / "none")
    assert same(weights(tmp_path / "none"), weights(base))


def test_the_log_names_its_base(finished, base, capsys):
    assert replayed(capsys, finished)["base"] == f"{base} (as the run's)"


def test_text_is_for_people(finished, base, capsys):
    assert main(["replay", str(finished), "--model", str(base)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["steps"] == lines["of"] == "4"
    assert len(lines["weights"]) == 64
    assert "output" not in lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_made_again_from_its_seed(base, tmp_path, capsys, dtype):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    options = {"lora": {"r": 4, "alpha": 8}, "mezo": {"save": "log"}}
    trainer = train(tmp_path / "run", model, memory="lora+mezo", memory_kwargs=options)
    assert not (tmp_path / "run" / "initial_adapter").exists()
    facts = replayed(capsys, tmp_path / "run", "--model", base, "--output", tmp_path / "rebuilt")
    assert facts["verified"] == "equal to the run's"
    rebuilt = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), tmp_path / "rebuilt")
    expected = dict(trainer.model.named_parameters())
    found = dict(rebuilt.named_parameters())
    assert any("lora_B" in name and expected[name].abs().max() > 0 for name in expected)
    assert same(found, expected)
    replayed(capsys, tmp_path / "run" / "checkpoint-2", "--model", base)


def test_the_first_weights_of_a_users_own_adapter_are_kept(base, tmp_path, capsys):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    trainer = train(tmp_path / "run", model)
    assert (tmp_path / "run" / "initial_adapter" / "adapter_model.safetensors").is_file()
    facts = replayed(capsys, tmp_path / "run", "--model", base, "--output", tmp_path / "rebuilt")
    assert facts["verified"] == "equal to the run's"
    rebuilt = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "rebuilt")
    assert same(dict(rebuilt.named_parameters()), dict(trainer.model.named_parameters()))
    shutil.move(tmp_path / "run" / "initial_adapter", tmp_path / "elsewhere")
    assert "give the folder 'initial_adapter' of the run with --adapter" in replayed(capsys, tmp_path / "run")[1]
    given = replayed(capsys, tmp_path / "run", "--model", base, "--adapter", tmp_path / "elsewhere")
    assert given["verified"] == "equal to the run's"


def test_a_classifier_is_loaded_as_what_it_is(tmp_path, capsys):
    from transformers import default_data_collator

    torch.random.default_generator.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(2, 32, num_labels=3))
    model.save_pretrained(tmp_path / "base")
    rows = [{"input_ids": list(range(10, 20)), "labels": place % 3} for place in range(8)]
    trainer = train(tmp_path / "run", model, rows, default_data_collator, save_strategy="no")
    replayed(capsys, tmp_path / "run", "--model", tmp_path / "base", "--output", tmp_path / "rebuilt")
    rebuilt = LlamaForSequenceClassification.from_pretrained(tmp_path / "rebuilt")
    assert same(dict(rebuilt.named_parameters()), dict(trainer.model.named_parameters()))


# what is refused


def test_another_base_is_refused(finished, tmp_path, capsys):
    tiny_model(2, 32, seed=1).save_pretrained(tmp_path / "other")
    code, error = replayed(capsys, finished, "--model", tmp_path / "other", "--output", tmp_path / "out")
    assert code == 1
    assert "started from other weights" in error
    assert not (tmp_path / "out").exists()


def test_a_base_that_differs_where_no_sample_was_taken_is_refused_in_the_end(finished, tmp_path, capsys):
    model = tiny_model(2, 32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(-1)[1] += 1  # samples of it are every 8 entries
    model.save_pretrained(tmp_path / "other")
    code, error = replayed(capsys, finished, "--model", tmp_path / "other")
    assert code == 1
    assert "the rebuilt weights are not those of the run" in error


def test_another_frozen_base_is_refused(tmp_path, base, capsys):
    train(tmp_path / "run", AutoModelForCausalLM.from_pretrained(base), memory="lora+mezo", save_strategy="no")
    tiny_model(2, 32, seed=1).save_pretrained(tmp_path / "other")
    code, error = replayed(capsys, tmp_path / "run", "--model", tmp_path / "other")
    assert code == 1
    assert "the weights that it left frozen are other ones" in error
    assert str(base) in error


@pytest.mark.parametrize("damage", ["coefficient", "cut", "nonsense"])
def test_a_damaged_log_is_refused(run, base, capsys, damage):
    path = run / "replay.jsonl"
    lines = path.read_text().splitlines()
    if damage == "coefficient":
        lines[1] = lines[1].replace("0x1.", "0x1.0", 1)
    path.write_text("\n".join(lines[:-1] if damage == "cut" else lines if damage == "coefficient" else ["{", "x"]))
    code, error = replayed(capsys, run, "--model", base)
    assert code == 1
    assert "damaged" in error or "no whole replay log" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_the_log_is_refused(finished, base, capsys, step):
    code, error = replayed(capsys, finished, "--model", base, f"--until-step={step}")
    assert (code, error.strip()) == (2, f"hf-eff: --until-step must be from 0 to 4, the steps of this log, got {step}.")


def test_a_missing_log_or_model_and_a_full_folder_are_usage_errors(finished, base, tmp_path, capsys):
    assert replayed(capsys, tmp_path, "--model", base)[0] == 2
    code, error = replayed(capsys, finished, "--model", tmp_path / "nothing")
    assert code == 2
    assert "cannot be loaded" in error
    code, error = replayed(capsys, finished, "--model", base, "--output", finished)
    assert code == 2
    assert "exists already" in error
