"""``hf-eff profile``: compare the memory that methods need, term by term, without weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json
from hf_eff.registry import list_methods, resolve

if TYPE_CHECKING:
    from hf_eff.profile import MemoryTable


def run(argv: Sequence[str]) -> int:
    """Print one row a method with the bytes of each memory term."""
    parser = SentenceErrors(prog="hf-eff profile", description=COMMANDS["profile"], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hub id, folder or 'smollm2'; only its configuration is read")
    parser.add_argument("--memory", help="memory methods, separated by commas; all of them by default")
    parser.add_argument("--batch_size", type=int, default=2, help="rows of a micro-batch (2)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--activation_checkpointing", action="store_true", help="every block is checkpointed")
    parser.add_argument("--cache_dir", help="folder that keeps the converted 'smollm2'")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(argv))
    names = options.memory.split(",") if options.memory else list_methods("memory")
    for name in names:
        resolve("memory", name)  # a wrong name is told before anything is read
    found = _profile(options, names)
    if options.json:
        print_json(found.to_dict())
    else:
        print(found)
    return 0


def _profile(options: argparse.Namespace, names: list[str]) -> MemoryTable:
    from hf_eff.cli.sources import load_config
    from hf_eff.profile import profile_memory

    return profile_memory(
        load_config(options.model, options.cache_dir),
        memory=names,
        batch_size=options.batch_size,
        max_length=options.max_length,
        bf16=options.bf16,
        activation_checkpointing=options.activation_checkpointing,
    )
