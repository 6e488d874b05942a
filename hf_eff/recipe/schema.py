"""What a recipe may say: a closed set of fields with plain types, none of which reaches a file, a secret or code.

A recipe is data from strangers. What decides where files go, who may write them or which code runs is no field of it:
output folders, tokens, resuming, trackers, ``trust_remote_code``. Those stay with the person who runs it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from hf_eff.errors import OptionError
from hf_eff.options import EffOptions

FORMAT, VERSION = "hf_eff.recipe", 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION_NUMBER = re.compile(r"\d{1,6}(\.\d{1,6}){0,2}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_EMBEDDED_ROWS = re.compile(r"reasoning-gym(:[\w-]{1,64})?")
_ESCAPE = re.compile(r"^\s*([/~]|\\\\|[A-Za-z]:[/\\])|(^|[/\\])\.\.([/\\]|$)|^\s*file:", re.IGNORECASE)
_MAX_TEXT, _MAX_ITEMS, _MAX_DEPTH = 4000, 1000, 6
_LARGEST_INT = 2**63

TOP = ("format", "format_version", "name", "version", "summary", "made_with", "options", "training", "run", "methods")
OPTIONS = tuple(field.name for field in fields(EffOptions))
TRAINING: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "max_steps",
            "seed",
            "data_seed",
            "save_total_limit",
            "max_length",
        ),
        (int,),
    ),
    **dict.fromkeys(
        (
            "num_train_epochs",
            "learning_rate",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "warmup_ratio",
            "warmup_steps",
            "label_smoothing_factor",
            "neftune_noise_alpha",
            "eval_steps",
            "save_steps",
            "logging_steps",
        ),
        (float,),
    ),
    **dict.fromkeys(
        (
            "bf16",
            "fp16",
            "gradient_checkpointing",
            "activation_checkpointing",
            "group_by_length",
            "dataloader_drop_last",
            "packing",
            "padding_free",
            "completion_only_loss",
            "assistant_only_loss",
        ),
        (bool,),
    ),
    **dict.fromkeys(
        (
            "lr_scheduler_type",
            "optim",
            "optim_args",
            "train_sampling_strategy",
            "eval_strategy",
            "save_strategy",
            "logging_strategy",
            "packing_strategy",
            "loss_type",
        ),
        (str,),
    ),
    "optim_target_modules": (list, str),
    "lr_scheduler_kwargs": (dict,),
}
RUN: Mapping[str, tuple[type, ...]] = {
    "task": (str,),
    "model": (str,),
    "dataset": (str,),
    "eval_dataset": (str,),
    "dataset_config": (str,),
    "split": (str,),
    "eval_split": (str,),
    "text_column": (str,),
    "prompt_column": (str,),
    "completion_column": (str,),
    "max_tokens": (int,),
    "dtype": (str,),
}
_PARTS = ("training", "run")
_CHOICES = {"task": ("sft", "trainer"), "dtype": ("float32", "bfloat16", "float16")}
_OWN = {
    "output_dir": "where results go",
    "logging_dir": "where results go",
    "resume_from_checkpoint": "what is read from this machine",
    "push_to_hub": "what is published",
    "hub_model_id": "what is published",
    "hub_token": "a secret",
    "deepspeed": "a file of this machine",
    "fsdp": "how this machine works",
    "fsdp_config": "a file of this machine",
    "report_to": "who is told",
    "trust_remote_code": "whether foreign code runs",
    "model_init_kwargs": "whether foreign code runs",
}
"""Arguments that people will try, and why only the person who runs a recipe may set them."""


def checked(values: Any) -> dict[str, Any]:
    """A copy of what a recipe file held, every part of it allowed and of its plain type.

    Raises:
        OptionError: Something is unknown, missing, of a wrong type, too large or leads out of the folder.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"a recipe must hold 'field: value' lines, got {type(values).__name__}.")
    _refuse_unknown("the recipe", values, TOP)
    if values.get("format") != FORMAT or values.get("format_version") != VERSION:
        raise OptionError(
            f"a recipe starts with 'format: {FORMAT}' and 'format_version: {VERSION}', got "
            f"{_shown(values.get('format'))} and {_shown(values.get('format_version'))}."
        )
    _refuse_reach(values, "")
    parts = {name: _mapping(values, name) for name in ("options", "training", "run", "methods")}
    _refuse_unknown("options", parts["options"], OPTIONS)
    return {
        "name": _matching(values, "name", NAME, "lower-case letters, digits, '.', '_' and '-'"),
        "version": _matching(values, "version", _VERSION_NUMBER, "a number such as '1.0', in quotes"),
        "summary": _text(values, "summary"),
        "made_with": _text(values, "made_with"),
        "options": {key: value for key, value in parts["options"].items() if value is not None},
        "training": _typed("training", parts["training"], TRAINING),
        "run": _checked_run(_typed("run", parts["run"], RUN)),
        "methods": _checked_methods(parts["methods"]),
    }


def without_refused(values: dict[str, Any]) -> dict[str, Any]:
    """A copy without the entries of ``training`` and ``run`` that a recipe may not hold.

    For recipes made of a run on this machine: its folders stay here. Options of hf_eff are not left out, because
    without one of them the recipe would be for another run.
    """
    parts = {name: {key: item for key, item in values[name].items() if _fits(name, key, item)} for name in _PARTS}
    return {**values, **parts}


def _fits(part: str, key: str, item: Any) -> bool:
    try:
        checked({"format": FORMAT, "format_version": VERSION, "name": "x", "version": "1", part: {key: item}})
    except OptionError:
        return False
    return True


def _refuse_unknown(where: str, values: Mapping[Any, Any], known: Iterable[str]) -> None:
    names = list(known)
    for key in values:
        if key in names:
            continue
        if key in _OWN:
            raise OptionError(f"{where}: {key!r} decides {_OWN[key]}, so a recipe cannot set it.")
        near = difflib.get_close_matches(str(key), names, n=1)
        raise OptionError(f"{where} has no field {_shown(key)}.{f' Did you mean {near[0]!r}?' if near else ''}")


def _refuse_reach(value: Any, where: str, depth: int = 0) -> None:
    """Refuse what is too deep or too large, what is no plain data, and text that names a place on this machine."""
    place = where or "the recipe"
    if depth > _MAX_DEPTH:
        raise OptionError(f"{place} is nested more than {_MAX_DEPTH} levels deep.")
    if isinstance(value, (Mapping, list, tuple)) and len(value) > _MAX_ITEMS:
        raise OptionError(f"{place} has more than {_MAX_ITEMS} entries.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or len(key) > 200:
                raise OptionError(f"{place} has the key {_shown(key)}; keys are short texts.")
            _refuse_reach(item, f"{where}.{key}" if where else key, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_reach(item, where, depth + 1)
    else:
        _refuse_scalar(value, place)


def _refuse_scalar(value: Any, place: str) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if len(value) > _MAX_TEXT:
            raise OptionError(f"{place} has more than {_MAX_TEXT} characters.")
        if any(not letter.isprintable() and letter not in "\n\t" for letter in value):
            raise OptionError(f"{place} holds control characters.")
        if _ESCAPE.search(value):
            raise OptionError(f"{place} is {_shown(value)}; a recipe names no place outside its own folder.")
    elif isinstance(value, int):
        if abs(value) >= _LARGEST_INT:
            raise OptionError(f"{place} is too large a number.")
    elif not isinstance(value, float) or not math.isfinite(value):
        raise OptionError(f"{place} must be text, a finite number, true, false, a list or a mapping.")


def _mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = values.get(name)
    if part is not None and not isinstance(part, Mapping):
        raise OptionError(f"{name} must hold 'field: value' lines, got {_shown(part)}.")
    return dict(part or {})


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise OptionError(f"{name} must be text, got {_shown(value)}.")
    return value or ""


def _matching(values: Mapping[str, Any], name: str, pattern: re.Pattern[str], meaning: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or pattern.fullmatch(value) is None or ".." in value:
        raise OptionError(f"{name} must be {meaning}, got {_shown(value)}.")
    return value


def _typed(where: str, values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    _refuse_unknown(where, values, types)
    return {key: _as_type(f"{where}.{key}", value, types[key]) for key, value in values.items() if value is not None}


def _as_type(where: str, value: Any, types: tuple[type, ...]) -> Any:
    """The value in its type; YAML 1.1 leaves ``1e-3`` as text."""
    if float in types and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(where, value)
    if isinstance(value, bool) != (bool in types) or not isinstance(value, types):
        raise OptionError(f"{where} must be {' or '.join(each.__name__ for each in types)}, got {_shown(value)}.")
    return value


def _number(where: str, value: float | str) -> float | int:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{where} must be a finite number, got {_shown(value)}.")
    return value if isinstance(value, int) else number


def _checked_run(values: dict[str, Any]) -> dict[str, Any]:
    for key, allowed in _CHOICES.items():
        if key in values and values[key] not in allowed:
            raise OptionError(f"run.{key} must be one of {list(allowed)}, got {_shown(values[key])}.")
    for key in ("model", "dataset", "eval_dataset"):
        value = values.get(key)
        if value is None or _REPO_ID.fullmatch(value) or (key != "model" and _EMBEDDED_ROWS.fullmatch(value)):
            continue
        raise OptionError(f"run.{key} must be the id of a Hub repository, got {_shown(value)}.")
    return values


def _checked_methods(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Method to its version when the recipe was written, and to the defaults that its options had then."""
    for address, then in values.items():
        if "=" not in address or not isinstance(then, Mapping) or not isinstance(then.get("defaults"), Mapping):
            raise OptionError(
                f"methods.{address} must be 'kind=name' with 'version' and 'defaults', got {_shown(then)}."
            )
        _refuse_unknown(f"methods.{address}", then, ("version", "defaults"))
    return {address: dict(then) for address, then in values.items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
