"""``hf-eff profile``: compare the memory that methods need, term by term, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.registry import list_methods, resolve


def run(argv: Sequence[str]) -> int:
    """Print one row a method with the bytes of each memory term."""
    parser = SentenceErrors(prog="hf-eff profile", description=COMMANDS["profile"], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hub id, folder or 'smollm2'; only its configuration is read")
    parser.add_argument("--memory", help="memory methods, separated by commas; all of them by default")
    parser.add_argument("--batch_size", type=int, default=1, help="rows of a micro-batch (1)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--cache_dir", help="folder that keeps the converted 'smollm2'")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(argv))
    names = options.memory.split(",") if options.memory else list_methods("memory")
    for name in names:
        resolve("memory", name)  # a wrong name is told before anything is read
    print(_profile(options, names))
    return 0


def _profile(options: Any, names: list[str]) -> str:
    import json

    from hf_eff.cli.sources import load_config
    from hf_eff.profile import profile_memory

    config = load_config(options.model, options.cache_dir)
    found = profile_memory(config, memory=names, batch_size=options.batch_size, max_length=options.max_length)
    return json.dumps(found.rows, indent=2) if options.json else str(found)
