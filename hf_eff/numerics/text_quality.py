"""Measures of a text that tell damaged, repetitive or evasive answers from others. No model, no dictionary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

NGRAM = 4
_FEW_NGRAMS, _FEW_LINES, _SHORT_LINE = 20, 4, 10
_OPENING = 200
"""Characters of an answer in which a refusal would show."""

REFUSALS = (
    r"(i'?m |i am )?(very |so |really )?sorry,? (but )?(i|as an ai)\b.{0,40}\b(can'?t|cannot|can not|unable|won'?t)\b",
    r"i apologi[sz]e,? (but )?(i|as an ai)\b.{0,40}\b(can'?t|cannot|can not|unable|won'?t)\b",
    r"(unfortunately,? )?i (can'?t|cannot|can not|won'?t|will not|am unable to|am not able to|'?m unable to) "
    r"(help|assist|fulfill?|comply|provide|answer|do that|generate|create|support|engage|discuss|offer)",
    r"i'm (unable|not able) to (help|assist|fulfill?|comply|provide|answer|generate|create|support|engage|discuss)",
    r"lo siento,? (pero )?no puedo",
    r"(je suis )?d[ée]sol[ée]e?,? (mais )?je ne (peux|suis) pas",
    r"(es )?tut mir leid,? (aber )?(ich|das) kann",
    r"(desculpe|sinto muito|lamento),? (mas )?n[ãa]o posso",
    r"(很|非常)?(抱歉|对不起)[,，]?(但)?我(不能|无法)",
    r"(к сожалению|извините|прошу прощения),? (но )?я не мог(у|ла)",
)
"""Beginnings of answers that decline. Sympathy ("I'm sorry to hear that") and introductions are not among them."""

BOILERPLATE = (
    r"\bas an ai\b(?! (engineer|researcher|company|lab|startup|student|expert))",
    r"\bas a (large )?language model\b",
    r"\bi am (just )?an ai (language model|assistant)\b",
    r"\bmy knowledge cut-?off\b",
    r"\blorem ipsum dolor\b",
)
"""Phrases of machines about themselves, and filler, anywhere in an answer."""

SCRIPTS = (
    "arabic",
    "armenian",
    "bengali",
    "cjk",
    "cyrillic",
    "devanagari",
    "ethiopic",
    "georgian",
    "greek",
    "gujarati",
    "gurmukhi",
    "hangul",
    "hebrew",
    "hiragana",
    "kannada",
    "katakana",
    "khmer",
    "lao",
    "latin",
    "malayalam",
    "myanmar",
    "sinhala",
    "tamil",
    "telugu",
    "thai",
    "tibetan",
)
"""Scripts that ``script_share`` knows, by the first word of their characters' Unicode names."""

# One expression each, made by code: a list written by hand needs only one missing comma to lose two entries.
_REFUSAL = re.compile("|".join(f"(?:{pattern})" for pattern in REFUSALS), re.IGNORECASE)
_BOILERPLATE = re.compile("|".join(f"(?:{pattern})" for pattern in BOILERPLATE), re.IGNORECASE)
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'"})


def normalised(text: str) -> str:
    r"""Text in Unicode's compatible form, lower-cased, with single spaces; punctuation stays.

    >>> normalised("  Two\tWORDS. ")
    'two words.'
    """
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def is_refusal(answer: str) -> bool:
    """Whether an answer begins by declining.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("I'm sorry for your loss.")
    (True, False)
    """
    opening = " ".join(answer[: 2 * _OPENING].split())[:_OPENING]
    return _REFUSAL.match(opening.translate(_QUOTES)) is not None


def is_boilerplate(answer: str) -> bool:
    """Whether an answer holds a stock phrase of ``BOILERPLATE``."""
    return _BOILERPLATE.search(answer.translate(_QUOTES)) is not None


def repeated_ngrams(text: str) -> float:
    """Share of word 4-grams that occurred before; 0 for texts of fewer than 20 of them.

    >>> repeated_ngrams("a b c d " * 10) > 0.8, repeated_ngrams("a b c d")
    (True, 0.0)
    """
    words = text.lower().split()
    grams = list(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if len(grams) >= _FEW_NGRAMS else 0.0


def repeated_lines(text: str) -> float:
    """Share of lines that occurred before; 0 for texts of fewer than 4 lines of 10 characters or more.

    Shorter lines, such as brackets and table rules, repeat in sound texts.
    """
    lines = [line for line in (line.strip() for line in text.splitlines()) if len(line) >= _SHORT_LINE]
    return 1 - len(set(lines)) / len(lines) if len(lines) >= _FEW_LINES else 0.0


def symbol_share(text: str) -> float:
    """Share of the visible characters that are neither letters nor digits nor marks on letters.

    >>> symbol_share("3 + 5"), symbol_share("...")
    (0.3333333333333333, 1.0)
    """
    return _share(text, lambda character: unicodedata.category(character)[0] not in "LNM")


def broken_share(text: str) -> float:
    """Share of the visible characters that no text should have: U+FFFD, control, private and unassigned ones."""
    return _share(
        text, lambda character: character == "\ufffd" or unicodedata.category(character) in ("Cc", "Co", "Cn", "Cs")
    )


def script_share(text: str, scripts: tuple[str, ...]) -> float:
    r"""Share of the letters that belong to some scripts; 1 for texts without letters.

    Args:
        text: What is read.
        scripts: Entries of ``SCRIPTS``.

    >>> script_share("caf\u00e9 42", ("latin",)), script_share("\u043a\u043e\u0444\u0435 x", ("latin",))
    (1.0, 0.2)
    """
    letters = [character for character in text if character.isalpha()]
    return sum(_script(letter) in scripts for letter in letters) / len(letters) if letters else 1.0


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "unnamed").lower().partition(" ")[0]


def _share(text: str, holds: Callable[[str], bool]) -> float:
    visible = [character for character in text if not character.isspace()]
    return sum(map(holds, visible)) / len(visible) if visible else 0.0
