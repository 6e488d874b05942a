"""Dependencies point one way, import is light, and a method's name is its address everywhere."""

import json
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import hf_eff
from hf_eff.contracts.spec import KINDS
from hf_eff.options import EffOptions
from hf_eff.registry import get_method, list_methods

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "huggingface_hub", "trl", "peft", "accelerate", "numpy", "pyarrow")
METHODS = [(kind, name) for kind in KINDS for name in list_methods(kind)]

# One user today, kept apart because each is a concept with tests of its own. A second user makes its line superfluous.
LONE_MODULES = {
    "hf_eff.numerics.adapter_shapes": "sizes of adapters; tested against PEFT's",
    "hf_eff.numerics.balanced_influence": "greedy choice by the least served target; tested against a naive loop",
    "hf_eff.numerics.curves": "Bayesian average over curve families; tested against closed forms",
    "hf_eff.numerics.facility_location": "lazy greedy cover; tested against brute force and a naive greedy",
    "hf_eff.numerics.gain_curve": "least squares of accuracy over compute; tested on curves of known rate",
    "hf_eff.numerics.gradient_subspace": "projections of gradients; tested against decompositions and plain loops",
    "hf_eff.numerics.k_center": "farthest-first traversal; tested against brute force",
    "hf_eff.numerics.near_duplicates": "MinHash candidates; tested on planted copies",
    "hf_eff.numerics.nearest": "inverted-file neighbours; tested against exact search",
    "hf_eff.numerics.novelty": "greedy choice of what is unlike; tested pair by pair",
    "hf_eff.numerics.round_robin": "every beginning of an order is even over bins; tested against water-filling",
    "hf_eff.numerics.sparse_projection": "sparse random signs; tested against its matrix",
    "hf_eff.numerics.text_quality": "measures of a text alone; tested on written cases",
    "hf_eff.numerics.two_sided_projection": "projection of both sides of a gradient; tested against its matrices",
    "hf_eff.hardware.compiled": "a C file for this processor; tested without a compiler and with a broken one",
    "hf_eff.hardware.estimated_power": "power times utilisation; tested with a fake clock",
    "hf_eff.numerics.action_index": "best gain per compute of an action; tested against a dense search",
    "hf_eff.numerics.freshness": "lifetime and uplift of scores; tested against dense references",
    "hf_eff.numerics.scaling_laws": "published laws of pretraining; tested against the authors' own values",
    "hf_eff.numerics.top_k": "the best of a stream; tested against sorting all of it",
    "hf_eff.numerics.trajectory_clusters": "clusters of loss curves; tested on planted families",
}


def _run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_contracts():
    # In a process of its own: import-linter switches off every logger that exists, which later tests listen to.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# light import


_LOADED = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def test_listing_loads_nothing_heavy():
    code = (
        "import hf_eff\n"
        "from hf_eff.registry import summaries\n"
        "names = hf_eff.list_methods()\n"
        "assert names and all(all(summaries(kind).values()) for kind in ('selection', 'memory', 'governor'))\n"
        "hf_eff.Budget.parse('2h'), hf_eff.EffError, hf_eff.NoEffectWarning\n"
    )
    assert _run(code + _LOADED) == []


def test_planning_loads_nothing_heavy():
    assert _run("from hf_eff import Plan, make_plan\nimport hf_eff.options\n" + _LOADED) == []


def test_the_probe_can_fail():
    assert "torch" in _run("from hf_eff import BudgetedTrainer\n" + _LOADED)


def test_asking_for_a_method_imports_no_other():
    code = (
        "import json, sys\n"
        "from hf_eff.registry import get_method\n"
        f"folders = tuple('hf_eff.%s.' % kind for kind in {KINDS!r})\n"
        "found = {}\n"
        f"for kind, name in {METHODS!r}:\n"
        "    before = set(sys.modules)\n"
        "    get_method(kind, name)\n"
        "    found[kind + '=' + name] = sorted(m for m in set(sys.modules) - before if m.startswith(folders))\n"
        "print(json.dumps(found))"
    )
    assert _run(code) == {f"{kind}={name}": [f"hf_eff.{kind}.{name}"] for kind, name in METHODS}


# address


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_address(kind, name):
    if not get_method(kind, name).config.__module__.startswith("hf_eff."):
        pytest.skip("from another package")
    missing = [
        path
        for path in (f"hf_eff/{kind}/{name}.py", f"model_cards/{kind}/{name}.md", f"tests/{kind}/test_{name}.py")
        if not (ROOT / path).is_file()
    ]
    assert not missing


def test_every_card_belongs_to_a_method():
    cards = {(path.parent.name, path.stem) for kind in KINDS for path in (ROOT / "model_cards" / kind).glob("*.md")}
    assert cards <= set(METHODS)


def test_no_vague_module_names():
    vague = {"utils", "helpers", "common", "misc", "base", "util", "helper"}
    assert not [path for path in (ROOT / "hf_eff").rglob("*.py") if path.stem in vague or path.parent.name in vague]


# rule of two


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("hf_eff", exclude_type_checking_imports=True, cache_dir=None)


@pytest.mark.parametrize("folder", ["numerics", "hardware"])
def test_shared_code_has_two_users(graph, folder):
    package = f"hf_eff.{folder}"
    lone = {}
    for module in sorted(graph.find_children(package)):
        users = {user for user in graph.find_modules_that_directly_import(module) if ".testing" not in user}
        if len(users) < 2 and module not in LONE_MODULES:
            lone[module] = sorted(users)
    assert not lone, "used once: move it into its user, or give a reason in LONE_MODULES"


def test_lone_modules_exist_and_are_lone(graph):
    for module in LONE_MODULES:
        users = {user for user in graph.find_modules_that_directly_import(module) if ".testing" not in user}
        assert len(users) == 1, f"{module}: {sorted(users)}; remove it from LONE_MODULES"


# ratchets: change these lists on purpose


def test_options_are_frozen():
    assert set(EffOptions.__dataclass_fields__) == {
        "selection",
        "selection_kwargs",
        "memory",
        "memory_kwargs",
        "governor",
        "governor_kwargs",
        "governor_mode",
        "budget",
        "out_of_memory",
        "price_per_hour",
        "power_watts",
    }


def test_public_names_are_frozen():
    assert set(hf_eff.__all__) == {
        *("BudgetedTrainer", "BlockwiseTrainer", "ZOTrainer", "BudgetedTrainingArguments", "BudgetedArguments"),
        *("BudgetedSFTTrainer", "BlockwiseSFTTrainer", "ZOSFTTrainer", "BudgetedSFTConfig"),
        *("BudgetedTrainerMixin", "GovernorCallback"),
        *("list_methods", "get_method", "method_card", "register_method"),
        *("AutoSelector", "AutoMemoryStrategy", "AutoGovernor"),
        *("Selection", "select_dataset", "load_selected", "combine_selections", "refresh_selection"),
        *("Recipe", "list_recipes"),
        *("Budget", "Plan", "make_plan", "profile_memory"),
        *("Objective", "ClassificationError", "GenerationObjective"),
        *("EffError", "EffWarning", "NoEffectWarning", "SelectionMismatchWarning"),
    }


@pytest.mark.parametrize("name", sorted(hf_eff.__all__))
def test_public_names_resolve(name):
    assert getattr(hf_eff, name).__module__.startswith("hf_eff.")
