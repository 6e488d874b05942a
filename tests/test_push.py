"""A run on the Hub: what is sent, that it is read back, and that no failure costs the local run anything."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.cli import main
from hf_eff.errors import EffWarning, OptionError
from hf_eff.hub import HubError
from hf_eff.publish import PushRecord, push_folder_of_run
from hf_eff.publish.bundle import bundle_files
from hf_eff.publish.evaluation import data_origins, evaluation_of, write_eval_results
from hf_eff.publish.links import write_links
from hf_eff.reallocation import read_phases
from hf_eff.recipe import Recipe
from hf_eff.selection import Selection
from hf_eff.testing.toys import scripted
from hf_eff.testing.trial import registered
from tests.local_hub import LocalHub
from tests.online import go_online

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}
SHORT = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_strategy": "no"}
HALF = {"selection": "random", "selection_kwargs": {"fraction": 0.5}}
BLOCKS = {"switch_every": 1, "layers_per_block": 2}
FULL = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture
def hub():
    with LocalHub() as server:
        yield server


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    go_online(monkeypatch, hub, tmp_path / "home")
    return hub


@pytest.fixture
def trained(model, pool, target, tokenizer, tmp_path):
    """Make a trainer and train it; more arguments by name."""

    def train(**options):
        from hf_eff.cli.columns import tokenise

        args = BudgetedTrainingArguments(
            output_dir=str(tmp_path / "out"), **QUIET, **{**SHORT, **HALF, **FULL, **options}
        )
        rows, held = tokenise(pool, tokenizer, 32), tokenise(target, tokenizer, 32)
        from transformers import DataCollatorForSeq2Seq

        trainer = BudgetedTrainer(
            model=model, args=args, train_dataset=rows, eval_dataset=held,
            processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer),
        )  # fmt: skip
        trainer.train()
        return trainer

    return train


def snapshot(folder):
    """Hash of every file of a run but the note about its push."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "_push.json"
    }


# What is sent


def test_a_run_arrives_with_everything_that_describes_it_and_nothing_else(online, trained, tmp_path):
    trainer = trained(memory="badam", memory_kwargs=BLOCKS, hub_model_id="alice/run")
    (tmp_path / "out" / "replay.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "out" / "governor.svg").write_text("<svg/>")
    pushed = trainer.push_to_hub(selection_repo="alice/sel", collection="My run")
    files = online.files("model", "alice/run")
    assert set(files) >= {
        *("model.safetensors", "config.json", "tokenizer.json", "README.md", "plan.json", "report.json", "report.md"),
        *("selection_manifest.json", "recipes/run.yaml", "replay.jsonl", "governor.svg"),
    }
    assert not [name for name in files if name.endswith((".bin", ".pt", ".parquet")) or name.startswith("_")]
    card = files["README.md"].decode()
    for part in ("## Plan", "## Predicted and measured", "## Evaluation", "![governor](governor.svg)", "[alice/sel]"):
        assert part in card, part
    head = yaml.safe_load(card.split("---\n")[1])
    assert {"hf_eff", "memory-badam", "selection-random"} <= set(head["tags"])
    assert "hf-eff train --recipe alice/run" in card
    assert json.loads(files["selection_manifest.json"])["selection"]["num_selected"] == len(trainer.selection)
    assert json.loads(files["report.json"])["evaluation"]["metrics"]["eval_loss"] > 0
    # The selection has a home of its own, and a collection links the two.
    assert any(name.endswith("train.parquet") for name in online.files("dataset", "alice/sel"))
    (collection,) = online.collections.values()
    assert [(item["id"], item["type"]) for item in collection["items"]] == [
        ("alice/run", "model"),
        ("alice/sel", "dataset"),
    ]
    assert (pushed.repo_id, pushed.selection_repo, pushed.collection) == ("alice/run", "alice/sel", collection["slug"])
    assert pushed.oid == online.repos["model", "alice/run"].branches["main"]
    assert online.repos["model", "alice/run"].private
    # The repository of the run is its recipe, too.
    recipe = Recipe.from_pretrained("alice/run")
    assert recipe.options["memory_kwargs"] == BLOCKS
    assert recipe.training["max_steps"] == 2


@pytest.mark.filterwarnings("ignore::hf_eff.errors.OutsideIntendedUseWarning")
def test_the_rows_of_every_data_phase_arrive(online, trained, tmp_path):
    script = {"script": "1 refresh, 2 refresh", "actions": "refresh", "window_steps": 1}
    with registered(scripted.SPEC):
        trainer = trained(governor="scripted", governor_kwargs=script, max_steps=4, hub_model_id="alice/run")
        trainer.push_to_hub(selection_repo="alice/sel")
    phases = read_phases(tmp_path / "out").phases
    assert len({phase.digest for phase in phases}) == 3
    sent = [Selection.from_pretrained("alice/sel", name) for name in ("run", "run-phase-1", "run-phase-2")]
    assert [each.digest for each in sent] == [phase.digest for phase in phases]
    recorded = json.loads(online.files("model", "alice/run")["data_phases.json"])["phases"]
    assert [phase["digest"] for phase in recorded] == [each.digest for each in sent]


@pytest.mark.filterwarnings("ignore::hf_eff.errors.OutsideIntendedUseWarning")
def test_phases_of_an_earlier_run_in_the_folder_are_forgotten(trained, tmp_path):
    script = {"script": "1 refresh", "actions": "refresh", "window_steps": 1}
    with registered(scripted.SPEC):
        trained(governor="scripted", governor_kwargs=script, max_steps=3)
    assert (tmp_path / "out" / "data_phases.json").is_file()
    trained()
    assert not (tmp_path / "out" / "data_phases.json").exists()


def test_an_adapter_is_sent_as_an_adapter(online, trained):
    pytest.importorskip("peft")
    trained(memory="lora", hub_model_id="alice/adapter").push_to_hub()
    files = online.files("model", "alice/adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(files)
    assert "model.safetensors" not in files


def test_no_token_reaches_a_file_or_the_log(online, trained, tmp_path, caplog, capfd):
    with caplog.at_level(logging.DEBUG, logger="hf_eff"):
        trainer = trained(
            hub_model_id="alice/run", hub_token=online.token, push_to_hub=True, save_strategy="steps", save_steps=1
        )
        trainer.save_model()
        online.fail("POST .*/repos/create", times=99)
        with pytest.raises(HubError) as caught:
            trainer.push_to_hub()
        online.heal()
        trainer.push_to_hub()
    secret = online.token.encode()
    assert [str(path) for path in (tmp_path / "out").rglob("*") if path.is_file() and secret in path.read_bytes()] == []
    assert not [name for name, content in online.files("model", "alice/run").items() if secret in content]
    assert online.token not in caplog.text + "".join(capfd.readouterr()) + str(caught.value)
    assert trainer.args.hub_token == online.token


def test_a_file_that_holds_a_token_is_not_sent(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.md").write_bytes(b" " * (2**20 - 10) + b"hf_" + b"Ab1" * 12)
    with pytest.raises(
        HubError, match=r"'notes.md' holds what looks like an access token, so nothing was sent"
    ) as caught:
        bundle_files(tmp_path)
    assert "Ab1Ab1" not in str(caught.value)


def test_rows_pickles_scratch_and_links_stay(tmp_path):
    for name in (
        *("model.safetensors", "checkpoint-1/model.safetensors", "_push/a", "_selection_report/report.md", ".hidden"),
        *("training_args.bin", "optimizer.pt", "x/rng_state_0.pth", "rows.parquet", "selection/train.parquet", "a.tmp"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    assert set(bundle_files(tmp_path)) == {"model.safetensors"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(HubError, match="holds nothing to push"):
        bundle_files(tmp_path)


# Failures


def unplug(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def damage(hub, monkeypatch):
    """The Hub keeps something else than it was sent."""
    keep = hub.keep
    monkeypatch.setattr(hub, "keep", lambda content: keep(content.replace(b"hf_eff.plan", b"hf_eff.plam")))


def delay(hub, monkeypatch):
    """Answers come later than the client waits, which is ten seconds otherwise."""
    import httpx2
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", lambda: httpx2.Client(timeout=0.5))
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)
    hub.delay("POST .*/commit/", 2.0, times=99)


FAULTS = {
    "500": (lambda hub, _: hub.fail("POST .*/commit/", 500, times=99), "failed: .*500"),
    "timeout": (delay, "failed: .*timed out"),
    "412": (lambda hub, _: hub.conflict(times=99), "somebody else committed to it meanwhile"),
    "revoked": (lambda hub, _: hub.revoke(hub.token), "creating model 'alice/run' failed: .*401"),
    "unplugged": (unplug, "creating model 'alice/run' failed: "),
    "damaged": (damage, r"does not hold what was sent after commit \w+: \['plan.json'\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_fails_leaves_the_run_whole_and_can_be_sent_later(
    fault, online, trained, tmp_path, capsys, monkeypatch
):
    strike, sentence = FAULTS[fault]
    trainer = trained(hub_model_id="alice/run")
    out = tmp_path / "out"
    with monkeypatch.context() as during:
        strike(online, during)
        with pytest.raises(HubError, match=sentence) as caught:
            trainer.push_to_hub()
    assert f"Nothing is lost: the run is whole in '{out}'; send it later with: hf-eff push {out}" in str(caught.value)
    assert online.token not in str(caught.value)
    before = snapshot(out)
    assert {"model.safetensors", "report.json", "plan.json", "README.md", "selection/train.parquet"} <= set(before)
    assert Selection.load(out / "selection").digest == trainer.selection.digest
    record = PushRecord.read(out)
    assert (record.repo_id, record.commit) == ("alice/run", None)
    assert record.problem
    online.heal()
    capsys.readouterr()
    assert main(["push", str(out), "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    sent = online.files("model", "alice/run", pushed["oid"])
    # The card alone may gain its links.
    assert {name: kept for name, kept in snapshot(out).items() if name != "README.md"} == {
        name: kept for name, kept in before.items() if name != "README.md"
    }
    assert hashlib.sha256(sent["model.safetensors"]).hexdigest() == before["model.safetensors"]
    assert (PushRecord.read(out).commit, PushRecord.read(out).problem) == (pushed["oid"], None)


def test_intermediate_pushes_never_end_a_run_and_are_read_back(online, trained, caplog):
    online.fail("POST .*/commit/", 500, times=1)
    with caplog.at_level(logging.WARNING, logger="hf_eff"):
        trained(
            hub_model_id="alice/run", push_to_hub=True, save_strategy="steps", save_steps=1, hub_always_push=True,
            hub_strategy="checkpoint",
        )  # fmt: skip
    assert "A checkpoint is not on the Hub, and training goes on" in caplog.text
    assert online.history("model", "alice/run")[0] == "Training in progress, step 2"
    files = online.files("model", "alice/run")
    assert {"model.safetensors", "last-checkpoint/optimizer.pt", "last-checkpoint/hf_eff_state.json"} <= set(files)
    assert "training_args.bin" not in files
    assert "last-checkpoint/training_args.bin" not in files
    assert sum("POST /api/models/alice/run/paths-info/" in line for line in online.log) == 1


# Offline


def test_offline_a_run_starts_ends_and_is_sent_later(hub, trained, tmp_path, monkeypatch, caplog, capsys):
    assert constants.HF_HUB_OFFLINE
    with pytest.warns(EffWarning, match=r"will not be on the Hub by itself .*HF_HUB_OFFLINE.*hf-eff push"):
        trainer = trained(push_to_hub=True, hub_model_id="alice/run", save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.WARNING, logger="hf_eff"):
        assert trainer.push_to_hub(selection_repo="alice/sel") is None
    assert "HF_HUB_OFFLINE is set. Nothing is lost" in caplog.text
    out = tmp_path / "out"
    assert (out / "model.safetensors").is_file()
    assert main(["push", str(out)]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    go_online(monkeypatch, hub, tmp_path / "home")
    assert main(["push", str(out), "--collection", "Later"]) == 0
    printed = capsys.readouterr().out
    assert "The run is in alice/run, read back: " in printed
    assert "alice/sel" in printed
    assert "model.safetensors" in hub.files("model", "alice/run")
    assert len(hub.collections) == 1


def test_a_bare_name_gets_the_users(online, trained):
    trainer = trained(push_to_hub=True, hub_model_id="bare")
    assert trainer.hub_model_id == "alice/bare"
    assert trainer.push_to_hub(private=False).repo_id == "alice/bare"


def test_a_push_in_the_background_is_a_future(online, trained):
    future = trained(hub_model_id="alice/run").push_to_hub(blocking=False)
    assert future.result(60).oid == online.repos["model", "alice/run"].branches["main"]


def test_without_any_field_of_ours_the_parent_pushes(trained, monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, *args, **kwargs: ("parent", args, kwargs))
    assert trained(selection="all", selection_kwargs=None).push_to_hub("message", private=True) == (
        "parent",
        ("message",),
        {"private": True},
    )


# The command


def test_a_folder_of_a_selection_goes_to_a_dataset(online, trained, tmp_path, capsys):
    trained()
    folder = tmp_path / "out" / "selection"
    assert main(["push", str(folder)]) == 2
    assert "no repository is named for the selection" in capsys.readouterr().err
    assert main(["push", str(folder), "--repo-id", "alice/chosen", "--name", "half"]) == 0
    assert any(name.startswith("selections/half/") for name in online.files("dataset", "alice/chosen"))


def test_wrong_uses_are_sentences(tmp_path, capsys):
    assert main(["push", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["push", str(tmp_path)]) == 2
    assert "give --repo-id user/name" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "--repo-id", "a/b", "--message", "hf_" + "Ab1" * 12]) == 2
    assert "Ab1Ab1" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(OptionError, match="no repository is named"):
        push_folder_of_run(tmp_path, PushRecord())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"repo_id": 1}', "\x00"])
def test_a_damaged_note_is_an_empty_one(tmp_path, text):
    (tmp_path / "_push.json").write_text(text)
    assert PushRecord.read(tmp_path) == PushRecord()


# Parts


def test_links_are_replaced_not_repeated(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Card\n\ntext\n")
    write_links(tmp_path, "a/run", None, None)
    assert card.read_text() == "# Card\n\ntext\n"
    write_links(tmp_path, "a/run", "a/one", None)
    write_links(tmp_path, "a/run", "a/two", "a/collection")
    text = card.read_text()
    assert text.count("## On the Hub") == 1
    assert "a/one" not in text
    assert "[a/two]" in text
    assert text.startswith("# Card\n\ntext\n")


HISTORY = [
    {"eval_loss": 2.0, "step": 1, "eval_runtime": 3.0},
    {"loss": 1.0, "step": 2},
    {"eval_code_loss": 1.5, "eval_samples_per_second": 9.0, "step": 2, "eval_x": float("nan")},
]
ORIGIN = {"repo_id": "org/code", "revision": "a" * 40, "config": None, "split": "test", "num_rows": 1000}


def test_the_last_value_of_each_metric_counts():
    found = evaluation_of(HISTORY, {"eval": {"code": ORIGIN}})
    assert found == {"metrics": {"eval_loss": 2.0, "eval_code_loss": 1.5}, "step": 2, "datasets": {"code": ORIGIN}}
    assert evaluation_of([{"loss": 1.0}], {}) is None


def test_results_on_a_dataset_of_the_hub_are_in_its_format(tmp_path):
    from huggingface_hub import parse_eval_result_entries

    path = write_eval_results(tmp_path, evaluation_of(HISTORY, {"eval": {"code": ORIGIN}}))
    assert path == tmp_path / ".eval_results" / "hf_eff.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.dataset_revision) == (
        "org/code",
        "default",
        1.5,
        "a" * 40,
    )
    assert entry.notes == "loss on 1000 rows of split test, at step 2, measured by the trainer"
    assert ".eval_results/hf_eff.yaml" in bundle_files(tmp_path)
    assert write_eval_results(tmp_path / "none", evaluation_of(HISTORY, {"eval": {"": None}})) is None


def test_rows_of_this_machine_have_no_origin(pool):
    assert data_origins(pool, {"code": pool, "none": None}) == {"train": None, "eval": {"code": None, "none": None}}


class HubRows:
    """A split as ``datasets`` keeps it after loading it from the Hub."""

    split, _indices, column_names = "train", None, ["text"]
    cache_files = ({"filename": f"/cache/alice___pool/default/0.0.0/{'a' * 40}/pool-train.arrow"},)

    def __len__(self):
        return 2


def test_rows_of_the_hub_are_known_by_repository_and_revision():
    origin = data_origins(HubRows(), None)["train"]
    expected = {"repo_id": "alice/pool", "revision": "a" * 40, "config": "default", "split": "train", "num_rows": 2}
    assert origin == expected


def test_no_warning_where_the_hub_answers(online, trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error", EffWarning)
        trained(push_to_hub=True, hub_model_id="alice/run")
    assert ("model", "alice/run") in online.repos
