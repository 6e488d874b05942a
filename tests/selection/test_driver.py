"""The driver: from a dataset to a recorded selection, and every way in which it cannot be made."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import warnings
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from hf_eff import Selection, load_selected, select_dataset
from hf_eff.contracts.cost import Cost
from hf_eff.contracts.selection import Picks
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob
from hf_eff.errors import (
    BudgetExceededError,
    DataError,
    ManifestError,
    NoEffectWarning,
    OptionError,
    PlanError,
    UnknownMethodError,
)
from hf_eff.hub import HubError
from hf_eff.manifest import read_manifest
from hf_eff.registry import register_method, unregister_method
from hf_eff.report.selection_report import FOLDER
from hf_eff.selection import choose_pool, describe_dataset, make_pool, run_selection
from hf_eff.testing.selection_scene import make_context
from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_target, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
POOL = tiny_pool(24)


def select(method="random", pool=POOL, **options):
    return select_dataset(pool, method, processing_class=TOKENIZER, **{"fraction": 0.25, **options})


@pytest.fixture
def toy():
    """Register a method whose answer a test chooses."""
    names = []

    def register(picks, *, name="toy", slot="pool", **traits):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class ToyConfig(MethodConfig):
            group_column: str | None = knob(None, "Column of groups.")

        class Toy:
            def select(self, context):
                return picks(context) if callable(picks) else picks

        spec = MethodSpec(
            name=name,
            kind="selection",
            slot=slot,
            summary="A test.",
            config=ToyConfig,
            build=lambda config: Toy(),
            cost=lambda config, facts: Cost(),
            traits=Traits(**traits),
        )
        register_method(spec)
        names.append(name)
        return spec

    yield register
    for name in names:
        unregister_method("selection", name)


# -- what is recorded


def test_a_selection_says_where_it_comes_from():
    model = tiny_model(layers=2, width=16)
    chosen = select("perplexity", model=model, band="high", seed=4, max_length=40)
    about, data = chosen.manifest["selection"], chosen.manifest["dataset"]
    assert (about["method"], about["name"], about["seed"], about["num_selected"]) == ("perplexity", "perplexity", 4, 6)
    assert about["params"] == {
        "fraction": 0.25,
        "num_examples": None,
        "num_tokens": None,
        "band": "high",
        "tokens": "loss",
    }
    assert about["budget"] == {"kind": "fraction", "value": 0.25}
    pool = make_pool(POOL, processing_class=TOKENIZER)
    assert about["num_tokens"] == pool.lengths[chosen.indices].sum()
    assert (data["num_rows"], data["columns"]) == (24, ["completion", "prompt", "source"])
    assert data["repo_id"] is None
    assert chosen.manifest["scorer"]["model"]["class"] == "LlamaForCausalLM"
    assert chosen.manifest["scorer"]["max_length"] == 40
    assert len(chosen.manifest["scorer"]["tokenizer_sha256"]) == 64
    assert chosen.manifest["cost"]["flops"] > 0
    assert chosen.manifest["cost"]["tokens"] >= pool.lengths.sum()
    assert chosen.manifest["scores"]["max"] == pytest.approx(float(chosen.scores.max()))
    assert chosen.all_scores.shape == (24,)
    np.testing.assert_array_equal(chosen.scores, chosen.all_scores[chosen.indices].astype(np.float32))
    assert all(reason.startswith("perplexity ") for reason in chosen.reasons)
    assert chosen.apply(POOL)["prompt"][:] == [POOL[int(i)]["prompt"] for i in chosen.indices]
    json.dumps(chosen.manifest, allow_nan=False)


def test_the_rows_themselves_are_nowhere_in_the_files(tmp_path):
    pool = Dataset.from_dict({"prompt": [f"SECRET{i}" for i in range(8)], "completion": [" PRIVATE"] * 8})
    select(pool=pool, output_dir=tmp_path)
    shared = [path for path in tmp_path.rglob("*") if path.is_file() and FOLDER not in path.parts]
    assert len(shared) == 2
    for path in shared:
        assert b"SECRET" not in path.read_bytes()
        assert b"PRIVATE" not in path.read_bytes()


def test_invalid_rows_are_counted_by_reason():
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 5
    rows += [{"input_ids": [3, 4], "labels": [-100, -100]}] * 2 + [{"input_ids": [], "labels": []}]
    chosen = select_dataset(Dataset.from_list(rows), "random", fraction=1.0)
    assert sorted(chosen.indices.tolist()) == [0, 1, 2, 3, 4]
    assert chosen.manifest["selection"]["invalid"] == {"empty": 1, "no_loss_tokens": 2}
    assert chosen.manifest["selection"]["num_invalid"] == 3


def test_ids_of_the_dataset_are_recorded(tmp_path):
    named = POOL.add_column("uid", [f"row-{i}" for i in range(24)])
    chosen = select(pool=named, id_column="uid", output_dir=tmp_path)
    assert chosen.row_ids == [f"row-{i}" for i in chosen.indices]
    assert Selection.load(tmp_path).row_ids == chosen.row_ids
    assert select(pool=named.to_list(), id_column="uid").row_ids == chosen.row_ids
    with pytest.raises(DataError, match="id_column='nope' is not a column of the pool"):
        select(id_column="nope")


def test_equal_seeds_give_equal_digests_and_other_seeds_do_not():
    digests = [select(seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_the_order_of_the_pool_does_not_change_what_is_chosen():
    shuffled = POOL.shuffle(seed=1)
    for method, options in (("random", {}), ("length", {}), ("perplexity", {"model": tiny_model(layers=2, width=16)})):
        chosen = [
            sorted(map(str, select(method, pool=pool, **options).apply(pool).to_list())) for pool in (POOL, shuffled)
        ]
        assert chosen[0] == chosen[1], method


def test_lists_of_rows_are_pools_too():
    rows = POOL.to_list()
    chosen = select(pool=rows)
    assert chosen.digest == select().digest
    assert chosen.indices.tolist() == select().indices.tolist()
    assert [row["prompt"] for row in chosen.apply(rows)] == [rows[i]["prompt"] for i in chosen.indices]
    assert len(chosen.apply(POOL)) == 6


def test_a_hub_dataset_is_recorded_by_id_and_revision(tmp_path):
    folder = tmp_path / "datasets" / "user___data" / "main" / "0.0.0" / ("a1" * 20)
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / "data-train.arrow")) as writer:
        for row in POOL:
            writer.write(row)
        writer.finalize()
    dataset = Dataset.from_file(str(folder / "data-train.arrow"))
    pool = make_pool(dataset, processing_class=TOKENIZER)

    def origin(rows):
        facts = describe_dataset(rows, pool)
        assert str(tmp_path) not in json.dumps(facts)
        return facts["repo_id"], facts["config"], facts["revision"]

    assert origin(dataset) == ("user/data", "main", "a1" * 20)
    # What was derived from it is not what the Hub holds.
    for derived in (dataset.shuffle(seed=0), dataset.map(lambda row: {"prompt": row["prompt"] + "!"}), POOL):
        assert origin(derived) == (None, None, None)


# -- what it leaves alone


def test_model_random_state_and_pool_are_as_before():
    model = tiny_model(layers=2, width=16).train()
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    before = POOL.to_list()
    select("perplexity", model=model)
    assert model.training
    assert torch.equal(model.model.norm.weight.grad, torch.ones_like(model.model.norm.weight))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]  # noqa: NPY002
    assert POOL.to_list() == before


# -- budgets


def test_a_budget_is_never_passed_and_refused_before_the_batch():
    model = tiny_model(layers=2, width=16)
    spent = select("perplexity", model=model, batch_tokens=64).manifest["cost"]
    again = select(
        "perplexity", model=model, batch_tokens=64, budget=f"{spent['flops']:.0f}flop, {spent['tokens']:.0f}tok"
    )
    assert again.manifest["cost"]["flops"] == spent["flops"]
    for budget in (f"{spent['flops'] * 0.99:.0f}flop", f"{spent['tokens'] - 1:.0f}tok"):
        with pytest.raises(BudgetExceededError, match="the next scoring batch needs"):
            select("perplexity", model=model, batch_tokens=64, budget=budget)


# -- errors, one sentence each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": Dataset.from_list([])}, "the pool is empty: the dataset has 0 rows"),
        ({"fraction": None, "num_examples": 25}, "num_examples=25 is more than the 24 valid rows of the pool"),
        ({"fraction": 0.01}, "fraction=0.01 of 24 valid rows is less than one row"),
        ({"method": "perplexity"}, r"selection='perplexity' scores with a model; pass model="),
        (
            {"method": "less", "model": tiny_model(layers=2, width=16)},
            r"selection='less' needs target rows that stand for the task; pass target=",
        ),
        (
            {"pool": Dataset.from_dict({"input_ids": [[3, 4]] * 3, "labels": [[-100, -100]] * 3})},
            "none of the 3 rows of the pool has a token that carries loss",
        ),
        ({"pool": Dataset.from_dict({"a": [1]})}, "in no known format"),
    ],
    ids=["empty", "too_small", "nothing", "model", "target", "invalid", "format"],
)
def test_what_cannot_be_selected_is_said_in_one_sentence(options, message):
    with pytest.raises(DataError, match=message) as caught:
        select(**options)
    assert str(caught.value).count("\n") == 0


def test_a_target_without_loss_tokens_is_named(toy):
    toy(Picks(np.array([0])), needs_reference_set=True)
    target = Dataset.from_dict({"input_ids": [[3, 4]] * 3, "labels": [[-100, -100]] * 3})
    with pytest.raises(DataError, match="none of the 3 target rows has a token that carries loss"):
        select_dataset(POOL, "toy", processing_class=TOKENIZER, target=target)


def test_groups_of_the_target_reach_the_method(toy):
    seen = []
    toy(lambda context: seen.append(context.reference.groups) or Picks(np.array([0])), needs_reference_set=True)
    target = tiny_target(4).add_column("task", list("abab"))
    select_dataset(POOL, "toy", processing_class=TOKENIZER, target=target, group_column="task")
    select_dataset(POOL, "toy", processing_class=TOKENIZER, target=target)
    assert seen == [list("abab"), ["sum"] * 4]


def test_wrong_names_and_options_get_a_hint():
    with pytest.raises(UnknownMethodError, match="Did you mean 'random'"):
        select("randm")
    with pytest.raises(OptionError, match=r"has no option 'fracton'\. Did you mean 'fraction'"):
        select_dataset(POOL, "random", processing_class=TOKENIZER, fracton=0.1)


def test_two_methods_for_one_slot_are_refused_by_name(toy):
    with pytest.raises(PlanError, match=r"'random' and 'length' both fill the slot 'pool'; keep one"):
        select("random+length")
    toy(Picks(np.array([0])), name="inner", slot="batch")
    assert [chosen.spec.name for chosen in choose_pool("random+inner", {}).stages] == ["random"]
    with pytest.raises(PlanError, match="selection='inner' selects during training only"):
        choose_pool("inner", {})


def test_a_method_for_decoders_refuses_other_models(toy):
    spec = toy(Picks(np.array([0])), needs_causal_lm=True)
    with pytest.raises(PlanError, match="selection='toy' works on decoder-only language models only"):
        run_selection(choose_pool("toy", {}), make_context(spec, is_causal_lm=False), dataset_facts={"num_rows": 24})


@pytest.mark.parametrize(
    ("picks", "message"),
    [
        (Picks(np.array([], dtype=int)), "chose no rows"),
        (Picks(np.array([0, 24])), "outside the pool of 24 rows"),
        (Picks(np.array([-1])), "outside the pool"),
        (Picks(np.array([0.0])), "outside the pool"),
        (Picks(np.array([3, 3])), "chose a row twice"),
        (Picks(np.array([1]), scores=np.zeros(3)), "gave 3 scores for 24 candidates"),
        (Picks(np.array([1]), weights=np.array([np.nan])), "weights that are not finite"),
        (Picks(np.array([1]), weights=np.array([-1.0])), "weights that are not finite, non-negative"),
        (Picks(np.array([1, 2]), weights=np.array([1.0])), "one a choice"),
    ],
    ids=["none", "high", "negative", "float", "twice", "scores", "nan", "minus", "short"],
)
def test_a_method_that_breaks_its_contract_is_named(toy, picks, message):
    toy(picks)
    with pytest.raises(DataError, match=rf"selection='toy' .*{message}"):
        select_dataset(POOL, "toy", processing_class=TOKENIZER)


def test_choosing_an_invalid_row_breaks_the_contract(toy):
    toy(Picks(np.array([2])))
    pool = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}] * 2 + [{"input_ids": [3], "labels": [3]}])
    with pytest.raises(DataError, match="chose rows without a token that carries loss"):
        select_dataset(pool, "toy")


def test_a_method_that_keeps_everything_says_so():
    with pytest.warns(NoEffectWarning, match="selection='length' kept all 24 rows; training on them equals 'all'"):
        select("length", fraction=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select("random", fraction=1.0)  # a baseline may
        select_dataset(POOL, "all", processing_class=TOKENIZER)


# -- saving, publishing, loading


def test_output_dir_holds_the_selection(tmp_path):
    chosen = select(output_dir=tmp_path)
    loaded = Selection.load(tmp_path)
    assert isinstance(loaded, Selection)
    assert loaded.digest == chosen.digest == Selection.from_pretrained(tmp_path).digest


def test_load_selected_takes_a_dataset_or_a_folder_of_one(tmp_path):
    chosen = select(output_dir=tmp_path / "selection")
    POOL.to_parquet(tmp_path / "data" / "train.parquet")
    expected = chosen.apply(POOL)["prompt"][:]
    assert load_selected(POOL, tmp_path / "selection")["prompt"][:] == expected
    assert load_selected(POOL, chosen)["prompt"][:] == expected
    assert load_selected(str(tmp_path / "data"), chosen)["prompt"][:] == expected
    with pytest.raises(OptionError, match="the manifest names no Hub dataset"):
        load_selected(None, chosen)
    with pytest.raises(HubError, match="fetching dataset 'user/never-cached' failed"):
        load_selected(POOL, "user/never-cached")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A repository in a folder, behind the functions of hf_eff.hub."""
    root = tmp_path / "remote"

    def push(folder, repo_id, repo_type, message, token=None, *, parent):
        assert (repo_id, repo_type, parent) == ("user/sel", "dataset", "p" * 40)
        shutil.copytree(folder, root, dirs_exist_ok=True)
        return "c" * 40

    def pull(repo_id, destination, repo_type="dataset", *, patterns, revision=None, token=None):
        for path in (path for path in root.rglob("*") if path.is_file()):
            name = path.relative_to(root).as_posix()
            if any(fnmatch(name, pattern) for pattern in patterns):
                (Path(destination) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, Path(destination) / name)
        return Path(destination)

    def listed(*args, **place):
        return {path.relative_to(root).as_posix(): 1 for path in root.rglob("*") if path.is_file()}

    monkeypatch.setattr("hf_eff.hub.create", lambda repo_id, *args, private: repo_id)
    monkeypatch.setattr("hf_eff.hub.head", lambda *args, **place: "p" * 40)
    monkeypatch.setattr("hf_eff.hub.list_files", listed)
    monkeypatch.setattr("hf_eff.hub.push_folder", push)
    monkeypatch.setattr("hf_eff.hub.pull_folder", pull)
    return root


def test_selections_share_a_repository_that_plain_datasets_reads(hub, tmp_path):
    from datasets import load_dataset

    first, second = select(seed=0), select("length")
    first.push_to_hub("user/sel", "random-25")
    second.push_to_hub("user/sel")
    assert Selection.from_pretrained("user/sel", "random-25").digest == first.digest
    assert Selection.from_pretrained("user/sel", name="length").digest == second.digest
    with pytest.raises(ManifestError, match=r"holds the selections \['length', 'random-25'\]; pass name="):
        Selection.from_pretrained("user/sel")
    with pytest.raises(ManifestError, match="holds no selection 'other'"):
        Selection.from_pretrained("user/sel", "other")
    card = (hub / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert [config["config_name"] for config in head["configs"]] == ["length", "random-25"]
    assert head["tags"] == ["hf_eff", "selection-manifest"]
    assert "| random-25 | local | random | 6 of 24 |" in card
    rows = load_dataset(str(hub), "random-25", split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["index"][:] == first.indices.tolist()
    assert read_manifest(hub / "selections" / "length" / "manifest.json")["selection"]["method"] == "length"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "a b"])
def test_names_that_are_no_names_are_refused(hub, name):
    with pytest.raises(OptionError, match="a selection's name may hold letters, digits"):
        select().push_to_hub("user/sel", name)
    with pytest.raises(OptionError, match="a selection's name may hold"):
        Selection.from_pretrained("user/sel", name)
