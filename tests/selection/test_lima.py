"""lima: sound rows, equally many of every kind, the best of each first."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from hf_eff.engines.pooling import make_pool
from hf_eff.errors import DataError
from hf_eff.numerics.water_filling import water_fill
from hf_eff.registry import get_method
from hf_eff.selection.lima import LimaConfig
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_of, toy_pool
from hf_eff.testing.tiny import tiny_tokenizer

SPEC = get_method("selection", "lima")
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "ledge")


def rows_of(**sizes):
    """Rows of some sources whose answers all differ in length and wording."""
    return [
        {
            "prompt": f"Tell me of {WORDS[place % 12]} {place}",
            "completion": " ".join(WORDS[(place * step + 3) % 12] for step in range(1, place + 2)),
            "source": source,
        }
        for source, size in sizes.items()
        for place in range(size)
    ]


def context_of(rows):
    return make_context(SPEC, pool=make_pool(rows, processing_class=tiny_tokenizer()))


def kept(rows, **options):
    return pick(SPEC, context_of(rows), **{"fraction": None, "near_duplicates": None, **options})


POOL = (
    rows_of(a=11)
    + [{**row, "prompt": f"In b: {row['prompt']}"} for row in rows_of(b=7)]
    + [{**row, "prompt": f"In c: {row['prompt']}"} for row in rows_of(c=2)]
)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11, 17, 20])
def test_sources_are_water_filled_with_their_longest_answers(size):
    picks = kept(POOL, num_examples=size)
    taken = Counter(POOL[place]["source"] for place in picks.positions)
    assert sorted(taken[name] for name in "abc") == sorted(water_fill([11, 7, 2], size).tolist())
    lengths = make_pool(POOL, processing_class=tiny_tokenizer()).loss_lengths
    for name in "abc":
        members = [place for place, row in enumerate(POOL) if row["source"] == name]
        best = sorted(members, key=lambda place: -lengths[place])[: taken[name]]
        assert [place for place in picks.positions.tolist() if place in members] == best
    assert picks.notes["kept_by_kind"] == {f"source {name}": taken[name] for name in sorted(taken)}


def test_grades_take_the_place_of_length():
    graded = [{**row, "grade": float(-len(row["completion"]))} for row in POOL]
    picks = kept(graded, num_examples=3, score_column="grade")
    assert [POOL[place]["completion"].count(" ") for place in picks.positions] == [0, 0, 0]
    assert picks.reasons[0].startswith("grade -")


def test_one_source_is_divided_by_its_prompts():
    rows = [{"prompt": f"What is {word}?", "completion": f"A {word} of {i}"} for i, word in enumerate(WORDS)]
    rows += [
        {"prompt": f"Describe the {word} of old", "completion": f"Old {word}, {i}"} for i, word in enumerate(WORDS[:2])
    ]
    picks = kept(rows, num_examples=4)
    assert picks.notes["kinds"] == "prompt"
    assert picks.notes["kept_by_kind"] == {
        "prompts in 'describe' of under 8 words": 2,
        "prompts in 'what' of under 4 words": 2,
    }


def test_rare_openings_share_a_kind():
    rows = [{"prompt": f"x{i} do it", "completion": f"{word} {i}"} for i, word in enumerate(WORDS * 3)]
    rows += [{"prompt": f"What {word} {i}", "completion": f"{i} {word}"} for i, word in enumerate(WORDS)]
    kinds = kept(rows, num_examples=len(rows)).notes["kept_by_kind"]
    assert kinds["prompts in 'what' of under 4 words"] == 12
    assert kinds["prompts in other words of under 4 words"] == 36 - 31
    assert len(kinds) == 33


def test_a_thousand_is_the_default_and_small_pools_are_no_error():
    assert LimaConfig().size == {"kind": "num_examples", "value": 1000}
    assert LimaConfig(fraction=0.5).size == {"kind": "fraction", "value": 0.5}
    rows = [
        {"input_ids": [5, 6 + i % 200, 6 + i // 200], "labels": [5, 6 + i % 200, 6 + i // 200]} for i in range(1200)
    ]
    options = {"fraction": None, "near_duplicates": None, "max_symbols": 1.0, "max_broken": 1.0}
    large = make_context(SPEC, pool=pool_of(rows, None), tokenizer=None)
    assert len(pick(SPEC, large, **options).positions) == 1000
    small = make_context(SPEC, pool=pool_of(rows[:30], None), tokenizer=None)
    assert sorted(pick(SPEC, small, **options).positions.tolist()) == list(range(30))
    with pytest.raises(DataError, match="none of the 0 rows of the pool has a token that carries loss"):
        pick(SPEC, make_context(SPEC, pool=pool_of([], None)), fraction=None)


def test_unsound_rows_are_left_out_and_counted():
    bad = {"prompt": "Help.", "completion": "I'm sorry, but I can't help with that.", "source": "d"}
    picks = kept([*POOL, bad], fraction=1.0)
    assert len(POOL) not in picks.positions
    notes = json.loads(json.dumps(dict(picks.notes)))
    assert notes["dropped"]["refusal"] == 1
    assert sum(notes["dropped"].values()) + notes["kept"] == notes["rows"] == len(POOL) + 1
    assert notes["paper_recipe"]["epochs"] == 15
    assert np.isnan(picks.scores[len(POOL)])


def test_the_order_of_the_rows_does_not_matter():
    order = np.random.default_rng(3).permutation(len(POOL))
    contexts = [context_of(rows) for rows in (POOL, [POOL[place] for place in order])]
    picks = [pick(SPEC, context, fraction=None, num_examples=9) for context in contexts]
    found = [chosen_hashes(each, context.pool) for each, context in zip(picks, contexts, strict=True)]
    assert found[0] == found[1]


def test_kinds_by_source_need_sources():
    pool = toy_pool(8)
    pool.sources = None
    with pytest.raises(DataError, match="kinds='source' needs the source of every row"):
        pick(SPEC, make_context(SPEC, pool=pool), kinds="source")
    assert pick(SPEC, make_context(SPEC, pool=toy_pool(8)), kinds="prompt").notes["kinds"] == "prompt"
