"""quality_filter: planted duplicates are found, nothing else is, and the books balance."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from hf_eff.engines.pooling import RowFormat, make_pool
from hf_eff.engines.quality_rules import REASONS
from hf_eff.errors import DataError
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick
from hf_eff.testing.tiny import tiny_tokenizer

SPEC = get_method("selection", "quality_filter")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHARES = (0.0, 0.05, 0.3)


def vocabulary(generator, size):
    return ["".join(generator.choices(LETTERS, k=generator.randrange(2, 10))) for _ in range(size)]


def edited(words, share, generator):
    places = generator.sample(range(len(words)), round(share * len(words)))
    fresh = dict(zip(places, vocabulary(generator, len(places)), strict=True))
    return [fresh.get(place, word) for place, word in enumerate(words)]


def planted(count=60, seed=0):
    """Rows, each with a copy in which 0, 5 or 30 % of the words were replaced; the copies' shares by row."""
    generator = random.Random(seed)
    known = vocabulary(generator, 3000)
    originals = [generator.choices(known, k=60) for _ in range(count)]
    copies = [edited(words, SHARES[place % 3], generator) for place, words in enumerate(originals)]
    rows = [{"prompt": " ".join(words[:20]), "completion": " ".join(words[20:])} for words in (*originals, *copies)]
    return rows, {count + place: SHARES[place % 3] for place in range(count)}


def bad_rows():
    return [
        {"prompt": "Help me.", "completion": "I'm sorry, but I can't help with that."},
        {"prompt": "Who are you?", "completion": "As a large language model, I have no name."},
        {"prompt": "Say it.", "completion": "again and again and " * 12},
        {"prompt": "Draw a line.", "completion": "-=-=" * 12},
        {"prompt": "Nothing.", "completion": ""},
    ]


def context_of(rows, **changes):
    pool = make_pool(rows, processing_class=tiny_tokenizer(), row_format=RowFormat(max_length=None))
    return make_context(SPEC, pool=pool, **changes)


def kept(rows, **options):
    return pick(SPEC, context_of(rows), **{"fraction": None, **options})


def test_planted_duplicates_are_dropped_and_nothing_else():
    rows, shares = planted()
    count = len(rows) // 2
    found = set(kept(rows).positions.tolist())
    # Which of the two goes is decided by length and content, so count pairs that lost one.
    lost = {place for place in shares if not {place, place - count} <= found}
    assert all({place, place - count} & found for place in shares)
    wanted = {place for place, share in shares.items() if share < 0.3}
    assert len(lost & wanted) / len(wanted) >= 0.95
    assert len(lost & wanted) / len(lost) >= 0.95


def test_a_second_run_drops_nothing():
    rows = [*planted()[0], *bad_rows()]
    first = sorted(kept(rows).positions.tolist())
    again = [rows[place] for place in first]
    assert sorted(kept(again).positions.tolist()) == list(range(len(again)))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_the_rows_does_not_matter(seed):
    rows = [*planted()[0], *bad_rows()]
    turned = random.Random(seed).sample(rows, len(rows))
    contexts = [context_of(each) for each in (rows, turned)]
    found = [chosen_hashes(pick(SPEC, context, fraction=None), context.pool) for context in contexts]
    assert found[0] == found[1]


@pytest.mark.parametrize("size", [{}, {"fraction": 0.5}, {"num_examples": 7}, {"num_tokens": 3000}])
def test_reasons_and_kept_rows_add_up(size):
    rows = [*planted()[0], *bad_rows()]
    picks = kept(rows, **size)
    notes = json.loads(json.dumps(dict(picks.notes)))
    assert notes["kept"] == len(picks.positions)
    assert sum(notes["dropped"].values()) + notes["kept"] == notes["rows"] == len(rows)
    assert set(notes["dropped"]) == {*REASONS, "size"}
    wanted = {"refusal": 1, "boilerplate": 1, "repetition": 1, "charset": 1, "empty": 1, "exact duplicate": 20}
    assert {name: notes["dropped"][name] for name in wanted} == wanted
    assert (notes["dropped"]["size"] > 0) == bool(size)


def test_sizes_count_what_is_left():
    rows = [*planted()[0], *bad_rows()]
    left = len(kept(rows).positions)
    assert len(kept(rows, fraction=0.5).positions) == left // 2
    assert len(kept(rows, num_examples=left).positions) == left
    with pytest.raises(DataError, match=rf"num_examples={left + 1} is more than the {left} rows that pass"):
        kept(rows, num_examples=left + 1)


def test_grades_decide_who_is_kept_where_there_are_any():
    rows = [{"prompt": f"Question {word}", "completion": f"Answer about {word}"} for word in LETTERS]
    graded = [{**row, "grade": float(place * 7 % 26)} for place, row in enumerate(rows)]
    picks = kept(graded, score_column="grade", num_examples=5)
    assert [graded[place]["grade"] for place in picks.positions] == [25, 24, 23, 22, 21]
    assert picks.reasons[0] == "passes every rule; grade 25"
    assert picks.scores.tolist() == [row["grade"] for row in graded]
    strict = kept(graded, score_column="grade", min_score=20.0)
    assert len(strict.positions) == 6
    assert strict.notes["dropped"]["score"] == 20


def test_without_grades_a_smaller_size_does_not_prefer_long_rows():
    generator = random.Random(0)
    known = vocabulary(generator, 500)
    rows = [{"prompt": "q", "completion": " ".join(generator.choices(known, k=2 + place))} for place in range(80)]
    picks = kept(rows, num_examples=40)
    assert picks.scores is None
    # Of 80 ranks a mean of 40 draws has a standard deviation of 2.6.
    assert abs(np.mean(picks.positions) - 39.5) < 4 * 2.6


def test_an_impossible_size_is_refused_before_reading():
    with pytest.raises(DataError, match="num_examples=99 is more than the 5 valid rows"):
        kept([{"prompt": "a", "completion": f"{'xyzzy'[place]}"} for place in range(5)], num_examples=99)
