"""A package of a third party, installed by pip: its methods stand beside the built-in ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "plugins" / "coin_flip"
TRAIN = """
import json, sys
from hf_eff import AutoGovernor, AutoSelector, BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.recipe import Recipe
from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_tokenizer
from hf_eff.cli.columns import tokenise
from transformers import DataCollatorForSeq2Seq

tokenizer = tiny_tokenizer()
options = {"selection": "coin_flip", "selection_kwargs": {"fraction": 0.5}, "governor": "first_steps"}
args = BudgetedTrainingArguments(output_dir=sys.argv[1], max_steps=4, per_device_train_batch_size=2, use_cpu=True,
    bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, **options)
trainer = BudgetedTrainer(model=tiny_model(), args=args, train_dataset=tokenise(tiny_pool(12), tokenizer, 32),
    processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer))
trainer.train()
pinned = Recipe("third", options=options).pinned()
print(json.dumps({
    "built": [type(AutoSelector.from_name("coin_flip")).__module__, AutoGovernor.from_name("first_steps").config.steps],
    "rows": len(trainer.selection), "steps": trainer.state.global_step, "methods": sorted(pinned.methods),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip has installed the package, out of its sources and without a network."""
    folder = tmp_path_factory.mktemp("plugin")
    sources = shutil.copytree(PLUGIN, folder / "sources")
    words = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"),
        *("--target", str(folder / "site"), str(sources)),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def run(installed, *words):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)


def test_pip_leaves_the_package_and_its_entry_points(installed):
    assert (installed / "hf_eff_coin_flip" / "selection.py").is_file()
    assert "coin_flip" in (installed / "hf_eff_coin_flip-0.3.dist-info" / "entry_points.txt").read_text()


def test_the_command_lists_its_methods_with_cards_and_filters(installed):
    done = run(installed, "-m", "hf_eff.cli", "methods", "--json")
    listing = json.loads(done.stdout)
    assert "coin_flip" in listing["selection"]
    assert "first_steps" in listing["governor"]
    done = run(installed, "-m", "hf_eff.cli", "methods", "first_steps")
    assert "| `steps` | `1` |  | at least 1 steps | Optimizer steps after which to stop. |" in done.stdout


def test_its_methods_train_and_enter_recipes(installed, tmp_path):
    done = run(installed, "-c", TRAIN, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "built": ["hf_eff_coin_flip.selection", 1],
        "rows": 6,
        "steps": 1,
        "methods": ["governor=first_steps", "memory=full", "selection=coin_flip"],
    }


def test_without_the_package_its_names_are_unknown():
    done = subprocess.run(
        [sys.executable, "-m", "hf_eff.cli", "methods", "coin_flip"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "is neither a kind" in done.stderr
