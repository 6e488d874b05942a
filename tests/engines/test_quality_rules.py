"""One rule a row, the first it fails, in a fixed order."""

from __future__ import annotations

import pytest

from hf_eff.engines.pooling import make_pool
from hf_eff.engines.quality_rules import REASONS, QualityConfig, judge
from hf_eff.errors import DataError, OptionError, ScoringStoppedError
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context, pool_of, toy_pool
from hf_eff.testing.tiny import tiny_tokenizer

SPEC = get_method("selection", "length")
GOOD = {"prompt": "Name a river in Europe.", "completion": "The Danube flows through ten countries."}


def row(answer=GOOD["completion"], prompt=GOOD["prompt"], **columns):
    return {"prompt": prompt, "completion": answer, **columns}


def reasons(rows, **options):
    pool = make_pool(rows, processing_class=tiny_tokenizer())
    verdict = judge(make_context(SPEC, pool=pool), QualityConfig(**options))
    return [None if place < 0 else REASONS[place] for place in verdict.failed.tolist()]


def reason(bad, **options):
    """Why a row is dropped beside two sound ones, a long and a short one, that differ."""
    extra = {name: value for name, value in {"grade": 9.0, "language": "en"}.items() if name in bad}
    sound = ("Mercury is the one that is closest to the sun.", "No.")
    return reasons([bad, *(row(answer, "Which planet is it?", **extra) for answer in sound)], **options)[0]


@pytest.mark.parametrize(
    ("bad", "options", "expected"),
    [
        (row(), {}, None),
        (row(" \n"), {}, "empty"),
        (row(), {"min_answer_tokens": 41}, "length"),
        (row(), {"max_answer_tokens": 39}, "length"),
        (row("x" * 100), {"max_tokens": 100}, "length"),
        (row("I'm sorry, but I can't help with that."), {}, "refusal"),
        (row("I'm sorry, but I can't help with that."), {"refusals": False}, None),
        (row("Well, as an AI, I swim in no river."), {}, "boilerplate"),
        (row("Well, as an AI, I swim in no river."), {"boilerplate": False}, None),
        (row(), {"patterns": (r"Danube\b",)}, "boilerplate"),
        (row("#!$%&/()=?-" * 20), {}, "charset"),
        (row("A river\ufffd\ufffd\ufffd\ufffd\ufffd is."), {}, "charset"),
        (row("Дунай течёт через десять стран.", "Назови реку."), {"scripts": ("latin",)}, "language"),
        (row("Дунай течёт через десять стран.", "Назови реку."), {"scripts": ("cyrillic", "latin")}, None),
        (row(language="de"), {"language_column": "language", "languages": ("en",)}, "language"),
        (row(language="en"), {"language_column": "language", "languages": ("en",)}, None),
        (row("the river flows on and " * 20), {}, "repetition"),
        (row("A line that comes again.\n" * 6), {}, "repetition"),
        (row("A line that comes again.\n" * 6), {"max_repeated_ngrams": 1.0, "max_repeated_lines": 1.0}, None),
        (row(grade=3.0), {"score_column": "grade", "min_score": 4.5}, "score"),
        (row(grade=4.5), {"score_column": "grade", "min_score": 4.5}, None),
        (row(grade=None), {"score_column": "grade"}, "score"),
        (row(grade=float("nan")), {"score_column": "grade"}, "score"),
    ],
)
def test_each_rule_drops_what_it_is_for(bad, options, expected):
    assert reason(bad, **options) == expected


def test_a_row_has_one_reason_the_first():
    bad = row("I'm sorry, but I can't help with that.", grade=1.0)
    options = {"score_column": "grade", "min_score": 2.0}
    assert reason(bad, **options) == "refusal"
    assert reason(bad, min_answer_tokens=39, **options) == "refusal"
    assert reason(bad, max_answer_tokens=5, **options) == "length"
    assert reason(bad, refusals=False, **options) == "score"


def test_case_and_space_make_no_difference_and_signs_do():
    rows = [row("3 + 5 is  eight"), row("3 + 5 IS eight"), row("3 - 5 is eight")]
    assert reasons(rows, near_duplicates=None) in (["exact duplicate", None, None], [None, "exact duplicate", None])
    assert reasons(rows[1:], near_duplicates=None) == [None, None]


def test_rows_without_loss_come_first():
    pool = toy_pool(4)
    silent = {"input_ids": pool.rows[0]["input_ids"], "labels": [-100] * len(pool.rows[0]["labels"])}
    verdict = judge(make_context(SPEC, pool=pool_of([silent, *pool.rows], None)), QualityConfig())
    assert [REASONS[place] for place in verdict.failed.tolist() if place >= 0] == ["no loss"]
    assert verdict.sound.tolist() == [1, 2, 3, 4]


LONG = "The Danube rises in the Black Forest and flows through ten countries before it reaches the Black Sea"


def test_of_a_group_the_best_grade_stays_then_the_longest_answer():
    rows = [row(LONG), row(f"{LONG} at last."), row(f"{LONG}.")]
    assert reasons(rows) == ["near duplicate", None, "near duplicate"]
    graded = [{**each, "grade": grade} for each, grade in zip(rows, (2.0, 1.0, 3.0), strict=True)]
    assert reasons(graded, score_column="grade") == ["near duplicate", "near duplicate", None]
    assert reasons(rows, near_duplicates=None) == [None, None, None]


def test_an_unsound_row_takes_no_sound_one_with_it():
    bad = row(f"{LONG}, and as an AI I have never seen it.")
    assert reasons([bad, row(LONG)], near_duplicates=0.5) == ["boilerplate", None]


def test_token_ids_stand_in_for_text():
    def tokens(*ids):
        return {"input_ids": list(ids), "labels": list(ids)}

    rows = [tokens(*range(10, 60)), tokens(*range(10, 60)), tokens(*range(11, 61)), tokens(*range(100, 150))]
    pool = pool_of(rows, None)
    verdict = judge(make_context(SPEC, pool=pool, tokenizer=None), QualityConfig())
    assert not verdict.reads_text
    assert verdict.counts(2)["read"] == "token ids"
    why = sorted(REASONS[place] for place in verdict.failed[:3] if place >= 0)
    assert why == ["exact duplicate", "near duplicate"]
    assert verdict.failed[3] == -1


def test_it_can_be_stopped():
    with pytest.raises(ScoringStoppedError, match="Quality rules: stopped on request"):
        judge(make_context(SPEC, stop_requested=lambda: True), QualityConfig())
    polled = []

    def stop():
        polled.append(1)
        return len(polled) > 1

    pool = make_pool([row(LONG), row(f"{LONG}.")], processing_class=tiny_tokenizer())
    with pytest.raises(ScoringStoppedError, match="Near duplicates: stopped on request"):
        judge(make_context(SPEC, pool=pool, stop_requested=stop), QualityConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ("en",)}, "needs language_column="),
        ({"min_score": 3.0}, "needs score_column="),
        ({"scripts": ("klingon",)}, r"scripts has \['klingon'\]; allowed are"),
        ({"patterns": ("(",)}, "is no regular expression"),
    ],
)
def test_options_that_cannot_work_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        QualityConfig(**options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([row()], {"score_column": "marks"}, "the pool has no column 'marks'; its columns are"),
        ([row(grade="high")], {"score_column": "grade"}, "column 'grade' must hold numbers, got 'high'"),
        ([row("As an AI, no.")], {}, "none of the 1 rows passes the quality rules: 1 of them fail 'boilerplate'"),
    ],
)
def test_data_that_cannot_be_judged_is_named(rows, options, message):
    with pytest.raises(DataError, match=message):
        reasons(rows, **options)


def test_columns_need_the_rows_of_the_user():
    with pytest.raises(DataError, match="the pool came without its columns; pass a dataset"):
        judge(make_context(SPEC), QualityConfig(score_column="grade"))
