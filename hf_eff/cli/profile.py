"""``hf-eff profile``: compare the memory that methods need, term by term, what fits, and what to change first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json, stdout_reserved
from hf_eff.errors import OptionError
from hf_eff.registry import list_methods, resolve

if TYPE_CHECKING:
    from hf_eff.profile import MemoryTable

_SETTING = (
    *("dtype", "bf16", "activation_checkpointing", "optim", "optim_args", "optim_target_modules"),
    *("max_grad_norm", "device", "world_size", "backend"),
)


def run(argv: Sequence[str]) -> int:
    """Print one row a method with the bytes of each memory term."""
    options = _parser().parse_args(list(argv))
    names = [name.strip() for name in options.memory.split(",")] if options.memory else list_methods("memory")
    for name in names:
        resolve("memory", name)  # a wrong name is told before anything is read
    if options.figure is not None:
        from hf_eff.report.memory_figure import check_figure

        check_figure(options.figure)
    with stdout_reserved(options.json):
        found = _profile(options, names)
        if options.figure is not None:
            found.save_figure(options.figure)
    if options.json:
        print_json(found.to_dict())
    else:
        print(found)
    return 0


def _parser() -> SentenceErrors:
    parser = SentenceErrors(prog="hf-eff profile", description=COMMANDS["profile"], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hub id, folder or 'smollm2'; only its configuration is read")
    parser.add_argument("--memory", help="memory methods, separated by commas, '+' composes; all of them by default")
    parser.add_argument("--memory_kwargs", help="options of the methods as JSON; each method takes its own")
    parser.add_argument("--batch_size", type=int, default=2, help="rows of a micro-batch (2)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--budget", help="what the device may hold, such as 24GiB; finds what fits in it")
    parser.add_argument("--dtype", help="type of the weights: float32, bfloat16, float16; the configuration's own")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--activation_checkpointing", action="store_true", help="every layer is checkpointed")
    parser.add_argument("--optim", default="adamw_torch", help="optimizer, as transformers names it (adamw_torch)")
    parser.add_argument("--optim_args", help="options of the optimizer, such as rank=64,scale=2")
    parser.add_argument("--optim_target_modules", default="", help="modules that a low-rank optimizer projects")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="largest norm of the gradients, 0 for any (1)")
    parser.add_argument("--device", help="kind of device, cpu or cuda; this machine's")
    parser.add_argument("--world_size", type=int, default=1, help="processes that share the work (1)")
    parser.add_argument("--backend", help="how they share it: ddp or fsdp2")
    parser.add_argument("--measure", action="store_true", help="also run two steps of each method and measure them")
    parser.add_argument("--figure", type=Path, help="file for stacked bars: .png, .svg or .pdf")
    parser.add_argument("--cache_dir", help="folder that keeps the converted 'smollm2'")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _profile(options: argparse.Namespace, names: list[str]) -> MemoryTable:
    from hf_eff.cli.sources import load_config
    from hf_eff.profile import profile_memory

    return profile_memory(
        load_config(options.model, options.cache_dir),
        memory=names,
        batch_size=options.batch_size,
        max_length=options.max_length,
        budget=options.budget,
        measure=options.measure,
        memory_kwargs=_kwargs(options.memory_kwargs),
        **{name: getattr(options, name) for name in _SETTING},
    )


def _kwargs(text: str | None) -> dict[str, Any]:
    """The options of methods.

    Raises:
        OptionError: The text is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise OptionError(f"--memory_kwargs {text!r} is not JSON ({error.msg}).") from None
    if not isinstance(found, dict):
        raise OptionError(f"--memory_kwargs must be a mapping of option names to values, got {text!r}.")
    return found
