"""``hf-eff replay``: rebuild the weights of a zeroth-order run from the model it started from and its log."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json, stdout_reserved
from hf_eff.cli.sources import EMBEDDED_MODEL, load_model, load_tokenizer
from hf_eff.errors import DataError, OptionError
from hf_eff.files import require_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_eff.engines.replay_header import LogHeader
    from hf_eff.engines.replay_log import ReplayLog


def run(argv: Sequence[str]) -> int:
    """Replay, compare, write."""
    options = _parser().parse_args(list(argv))
    with stdout_reserved(options.json):
        facts = replay_run(options)
    if options.json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        if value is not None:
            print(f"{name:<10}{value}")
    return 0


def replay_run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the flags say.

    Returns:
        JSON-able: ``steps`` done, ``of`` so many, the ``log``, its ``base``, the digest of the ``weights``, whether it
        was ``verified`` and the ``output`` folder.

    Raises:
        DataError: There is no log.
        OptionError: A flag does not fit the log, or the model cannot be loaded.
        CheckpointError: The log is damaged, or the model is not the one that the run started from.
    """
    from hf_eff.engines.log_checkpoint import last_step, rebuild, recorded_weights
    from hf_eff.engines.replay_log import ReplayLog

    path = _log_path(options.log)
    log = ReplayLog.load(path)
    until = _until(options.until_step, log)
    if options.output is not None:
        _refuse_existing(options.output)
    model = _initial_model(options, log, path.parent)
    weights, verified = rebuild(model, log, recorded_weights(path), until)
    if options.output is not None:
        with _appearing(options.output) as folder:
            model.save_pretrained(str(folder))
            _save_tokenizer(options, log.header, folder)
    return {
        "steps": until,
        "of": last_step(log),
        "log": f"{path} (whole)",
        "base": f"{_base_name(options, log.header)} (as the run's)",
        "weights": weights,
        "verified": "equal to the run's" if verified else f"the log holds no digest of the weights after step {until}",
        "output": None if options.output is None else str(options.output),
    }


def _parser() -> SentenceErrors:
    parser = SentenceErrors(prog="hf-eff replay", description=COMMANDS["replay"], allow_abbrev=False)
    parser.add_argument("log", type=Path, help="replay.jsonl, or the folder of a run or checkpoint that holds it")
    parser.add_argument("--model", help="Hub id, folder or 'smollm2' of the model that the run started from")
    parser.add_argument("--revision", help="revision of a Hub model (default: the one that the log names)")
    parser.add_argument("--until-step", type=int, help="optimizer steps after which to end (default: all)")
    parser.add_argument("--output", type=Path, help="new folder for the weights; without it they are only checked")
    parser.add_argument("--adapter", type=Path, help="first weights of an adapter (default: beside the log)")
    parser.add_argument("--cache_dir", help="folder that keeps the converted 'smollm2'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _log_path(given: Path) -> Path:
    from hf_eff.engines.log_checkpoint import REPLAY_LOG

    path = given / REPLAY_LOG if given.is_dir() else given
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist; give the log of a zeroth-order run, or the folder of the run.")
    return path


def _until(given: int | None, log: ReplayLog) -> int:
    from hf_eff.engines.log_checkpoint import last_step

    last = last_step(log)
    if given is not None and not 0 <= given <= last:
        raise OptionError(f"--until-step must be from 0 to {last}, the steps of this log, got {given}.")
    return last if given is None else given


# the model at the start


def _base_name(options: argparse.Namespace, header: LogHeader) -> str:
    name = options.model or header.origin.get("model")
    if name is None:
        raise OptionError("the log does not name the model that the run started from; give --model.")
    return str(name)


def _initial_model(options: argparse.Namespace, log: ReplayLog, folder: Path) -> Any:
    """The base model on the log's kind of device, with the adapter that the run began with."""
    from hf_eff.hardware.probe import device_name

    header, origin = log.header, log.header.origin
    if header.device not in ("cpu", device_name()):
        raise OptionError(
            f"the run was on {header.device!r}, whose random numbers this machine does not have; replay it on one "
            "that has."
        )
    model: Any = _load(_base_name(options, header), options, header)
    if origin.get("methods"):
        model = _changed(model, origin["methods"], header.seed)
    elif origin.get("adapter"):
        model = _with_adapter(model, options.adapter or folder, given=options.adapter is not None)
    return model.to(header.device)


def _load(name: str, options: argparse.Namespace, header: LogHeader) -> PreTrainedModel:
    import transformers

    origin = header.origin
    dtype = str(origin.get("dtype") or header.parameters[0][2]).removeprefix("torch.")
    if name == EMBEDDED_MODEL:
        return load_model(name, dtype, options.cache_dir)[0]
    revision = options.revision or (origin.get("revision") if options.model in (None, origin.get("model")) else None)
    family = getattr(transformers, origin.get("architecture") or "", transformers.AutoModelForCausalLM)
    try:
        loaded: PreTrainedModel = family.from_pretrained(name, dtype=dtype, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise OptionError(f"--model {name!r} cannot be loaded ({reason}); give a Hub id, a folder or 'smollm2'.") from (
            error
        )
    return loaded


def _changed(model: Any, methods: dict[str, Any], seed: int) -> Any:
    """The model as the run's memory methods changed it, from the same seed."""
    from hf_eff.memory import MemoryStack
    from hf_eff.options import choose

    chosen = [each for name, values in methods.items() for each in choose("memory", name, values)]
    return MemoryStack(chosen).prepare_model(model, seed)


def _with_adapter(model: Any, folder: Path, *, given: bool) -> Any:
    """The model with the adapter that the run kept beside its log, or above a checkpoint's."""
    from hf_eff.engines.replay_origin import INITIAL_ADAPTER

    places = [folder] if given else [folder / INITIAL_ADAPTER, folder.parent / INITIAL_ADAPTER]
    found = next((place for place in places if (place / "adapter_config.json").is_file()), None)
    if found is None:
        raise DataError(
            f"the run trained an adapter that came with its model; its first weights are not in {str(places[0])!r}, so "
            f"give the folder {INITIAL_ADAPTER!r} of the run with --adapter."
        )
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(found), is_trainable=True)


# what is written


def _refuse_existing(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"--output {str(folder)!r} exists already; name a new folder.")
    require_writable(folder.parent)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name that gets its own once it is whole.

    Yields:
        The temporary folder.
    """
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_tokenizer(options: argparse.Namespace, header: LogHeader, folder: Path) -> None:
    """Make the folder ready for use where the base model has a tokenizer."""
    try:
        tokenizer = load_tokenizer(_base_name(options, header), options.cache_dir)
    except OptionError:
        return
    tokenizer.save_pretrained(str(folder))
