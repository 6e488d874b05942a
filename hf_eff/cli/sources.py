"""Models, tokenizers and rows by the names people type: a Hub id, a folder, a file or an embedded name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli.embedded import (
    FAMILIES,
    load_smollm2,
    load_smollm2_config,
    load_smollm2_tokenizer,
    reasoning_pool,
    reasoning_target,
)
from hf_eff.errors import DataError, OptionError
from hf_eff.hub import fetch_split

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL = "smollm2"
EMBEDDED_DATA = "reasoning-gym"
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def load_model(
    name: str, dtype: str = "float32", cache_dir: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its tokenizer.

    Args:
        name: Hub id, folder, or ``"smollm2"``.
        dtype: Type of the weights, such as ``"float32"`` or ``"bfloat16"``.
        cache_dir: Where to keep the converted embedded model.

    Raises:
        OptionError: It cannot be loaded.
    """
    if name == EMBEDDED_MODEL:
        return load_smollm2(dtype, cache_dir)
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    family = AutoModelForSeq2SeqLM if load_config(name).is_encoder_decoder else AutoModelForCausalLM
    try:
        return family.from_pretrained(name, dtype=dtype), load_tokenizer(name)
    except (OSError, ValueError, KeyError) as error:
        raise _model_problem(name, error) from error


def load_config(name: str, cache_dir: str | None = None) -> PretrainedConfig:
    """Shapes of a model, without weights.

    Raises:
        OptionError: There is no readable configuration under that name.
    """
    if name == EMBEDDED_MODEL:
        return load_smollm2_config(cache_dir)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _model_problem(name, error) from error


def load_tokenizer(name: str, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, able to pad.

    Raises:
        OptionError: There is none under that name.
    """
    if name == EMBEDDED_MODEL:
        return load_smollm2_tokenizer(cache_dir)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _model_problem(name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model_problem(name: str, error: Exception) -> OptionError:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return OptionError(f"model={name!r} cannot be loaded ({reason}); give a Hub id, a folder or 'smollm2'.")


def load_rows(name: str, *, split: str = "train", config: str | None = None, held_out: bool = False) -> Dataset:
    """Rows of a dataset.

    Args:
        name: Hub id, folder, file (json, jsonl, csv, parquet, arrow), or ``"reasoning-gym[:family]"``.
        split: Part of a Hub dataset or of a folder with several.
        config: Configuration of a Hub dataset.
        held_out: Of ``reasoning-gym``, take the rows that are in no pool.

    Raises:
        DataError: It cannot be read or is empty.
    """
    try:
        rows = _read(name, split, config, held_out=held_out)
    except DataError:
        raise
    except (IndexError, StopIteration):  # what datasets makes of a file or table without rows
        raise DataError(f"dataset={name!r} has no rows.") from None
    except _unreadable() as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(f"dataset={name!r} cannot be read ({reason}).") from error
    if len(rows) == 0:
        raise DataError(f"dataset={name!r} has no rows.")
    return rows


def _unreadable() -> tuple[type[Exception], ...]:
    """What reading a file, a folder or the Hub may raise for the user's reasons (not for ours)."""
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, DatasetsError)  # Arrow's, the Hub's and our hub's errors are kinds of these


def _read(name: str, split: str, config: str | None, *, held_out: bool) -> Dataset:
    from datasets import load_dataset

    family, path = name.partition(":"), Path(name)
    if family[0] == EMBEDDED_DATA:
        return _reasoning(family[2], held_out=held_out)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _saved(path, split)
    if path.suffix in FORMATS:
        if not path.is_file():
            raise DataError(f"dataset={name!r} does not exist; give a Hub id, a folder or a file.")
        return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    if path.is_file():
        raise DataError(f"dataset={name!r} is a file of unknown format; use one of {sorted(FORMATS)}.")
    if not path.exists() and name.startswith((".", "/", "~")):
        raise DataError(f"dataset={name!r} does not exist; give a Hub id, a folder or a file.")
    return fetch_split(name, config=config, split=split, revision=None)


def _saved(path: Path, split: str) -> Dataset:
    """What ``save_to_disk`` wrote."""
    from datasets import DatasetDict, load_from_disk

    found: Any = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        if split not in found:
            raise DataError(f"dataset={str(path)!r} has no split {split!r}; it has {sorted(found)}.")
        return found[split]
    return found


def _reasoning(family: str, *, held_out: bool) -> Dataset:
    if held_out:
        if not family:
            raise DataError(f"{EMBEDDED_DATA!r} as target needs a family, such as {EMBEDDED_DATA}:{FAMILIES[0]}.")
        return reasoning_target(family)
    return reasoning_pool([family] if family else FAMILIES)
