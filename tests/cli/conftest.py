from __future__ import annotations

import pytest

from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_target, tiny_tokenizer


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with a toy model, a pool of two sources and a target of one of them."""
    folder = tmp_path_factory.mktemp("material")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_pool(24).to_json(folder / "pool.jsonl")
    tiny_target(8).to_json(folder / "target.jsonl")
    return folder


@pytest.fixture
def named(material):
    """Flags that name model, pool and target."""
    return [
        *("--model", str(material / "model")),
        *("--dataset", str(material / "pool.jsonl")),
        *("--eval_dataset", str(material / "target.jsonl")),
    ]
