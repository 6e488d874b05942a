"""Each measure finds what it is for, and lets sound text pass."""

from __future__ import annotations

import re

import pytest

from hf_eff.numerics.text_quality import (
    BOILERPLATE,
    REFUSALS,
    SCRIPTS,
    broken_share,
    is_boilerplate,
    is_refusal,
    normalised,
    repeated_lines,
    repeated_ngrams,
    script_share,
    symbol_share,
)

DECLINES = (
    "I'm sorry, but I can't help with that.",
    "I apologize, but I am unable to write this.",
    "I cannot assist with that request.",
    "I'm not able to provide medical advice.",
    "Lo siento, no puedo ayudar con eso.",
    "Désolé, mais je ne peux pas répondre.",
    "Es tut mir leid, aber ich kann das nicht.",
    "Desculpe, mas não posso ajudar.",
    "很抱歉，我无法回答这个问题。",
    "Извините, но я не могу помочь.",
)
PHRASES = (
    "Well, as an AI, I have no opinion.",
    "As a large language model I do not eat.",
    "I am an AI assistant and enjoy nothing.",
    "That lies behind my knowledge cutoff.",
    "Lorem ipsum dolor sit amet.",
)


@pytest.mark.parametrize(("pattern", "answer"), list(zip(REFUSALS, DECLINES, strict=True)))
def test_every_refusal_pattern_works_by_itself(pattern, answer):
    assert re.match(pattern, answer, re.IGNORECASE)
    assert is_refusal(answer)


@pytest.mark.parametrize(("pattern", "answer"), list(zip(BOILERPLATE, PHRASES, strict=True)))
def test_every_stock_phrase_works_by_itself(pattern, answer):
    assert re.search(pattern, answer, re.IGNORECASE)
    assert is_boilerplate(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that your cat is ill. Cats can do that.",
        "I'm sorry for your loss.",
        "I am an engineer, and I can help you.",
        "I can't wait to tell you about Rome!",
        "He said: I'm sorry, but I can't help with that.",
        "Sorry seems to be the hardest word.",
        "As an AI engineer you will train models.",
        "Language models predict the next word.",
        "",
    ],
)
def test_sound_answers_are_neither(answer):
    assert not is_refusal(answer)
    assert not is_boilerplate(answer)


def test_curly_quotes_and_line_breaks_do_not_hide_a_refusal():
    assert is_refusal("I\u2019m sorry,\nbut I can\u2019t help with that.")


def test_repeated_ngrams_are_counted():
    words = " ".join(f"w{i}" for i in range(23))
    assert repeated_ngrams(words) == 0
    # 43 words with period 10 make 40 grams, of which 10 are distinct.
    looped = " ".join(f"w{i % 10}" for i in range(43))
    assert repeated_ngrams(looped) == pytest.approx(1 - 10 / 40)
    assert repeated_ngrams("no " * 10) == 0  # too short to judge


def test_repeated_lines_are_counted_but_for_short_ones():
    lines = ["a line that is long enough", "another line that is long"]
    assert repeated_lines("\n".join(lines * 2)) == 0.5
    assert repeated_lines("\n".join(lines)) == 0
    code = "\n".join(f"if condition_{i}:\n    return\n}}" for i in range(6))
    assert repeated_lines(code) == 0


def test_shares_are_of_visible_characters():
    assert symbol_share("ab  ") == 0
    assert symbol_share("a-b-") == 0.5
    assert symbol_share("") == broken_share(" \n") == 0
    assert broken_share("ab\ufffd\x00") == 0.5
    assert broken_share("a\tb\n") == 0
    assert symbol_share("हिन्दी") == 0  # vowel signs are part of the word


@pytest.mark.parametrize(
    ("text", "scripts", "share"),
    [
        ("plain words", ("latin",), 1.0),
        ("слово word", ("latin",), 4 / 9),
        ("слово word", ("latin", "cyrillic"), 1.0),
        ("你好 abc", ("cjk",), 2 / 5),
        ("2 + 2 = 4", ("cjk",), 1.0),
        ("ひらがなカタカナ", ("hiragana",), 0.5),
    ],
)
def test_scripts_are_told_apart(text, scripts, share):
    assert script_share(text, scripts) == pytest.approx(share)


def test_scripts_are_listed_once_and_sorted():
    assert list(SCRIPTS) == sorted(set(SCRIPTS))


def test_normal_form_drops_case_and_space_but_no_sign():
    assert normalised(" A +\n b ") == "a + b"
    assert normalised("\ufb01ne") == "fine"
    assert normalised("3 + 5") != normalised("3 - 5")
