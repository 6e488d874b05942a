"""``hf-eff governor sim``: the shipped simulations and replays, which say what a policy is worth."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_eff.cli.output import print_json
from hf_eff.errors import DataError, OptionError
from hf_eff.files import write_json

_ROOT = Path(__file__).parent.parent
TRACES = ("traces", "benchmarks/traces")
"""Where recorded runs lie: in an installed package, in a checkout."""
FEWEST_CURVES = 40
"""Two of each family in the smallest table that has all of them need as many."""
BENDS = (0.0, 3.0)
"""How much returns diminish in the problems of refreshing."""
_FORMAT = "hf_eff.governor_simulation"


def add_parser(actions: Any) -> argparse.ArgumentParser:
    """Add ``sim`` to the actions of ``hf-eff governor``; its options carry ``run``."""
    parser: argparse.ArgumentParser = actions.add_parser(
        "sim",
        help="run the shipped simulations",
        description="stop: policies on synthetic loss curves. refresh: when to score the pool again. trace: policies "
        "replayed on recorded training runs. calibration: whether stated chances come true. All are repeatable.",
        allow_abbrev=False,
    )
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"], help="which one; default: all")
    parser.add_argument("--curves", type=int, default=200, help="synthetic curves in a table; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first curve; the next ones follow")
    parser.add_argument("--policy", action="append", default=[], metavar="NAME", help="also this governor, by its name")
    parser.add_argument("--traces", type=Path, help="folder of recorded runs; default: those that are shipped")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object to a file, too")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the tables that were asked for.

    Raises:
        OptionError: Too few curves, or a negative seed.
        DataError: There are no recorded runs.
    """
    if options.curves < FEWEST_CURVES or options.seed < 0:
        raise OptionError(
            f"--curves must be {FEWEST_CURVES} or more and --seed 0 or more, got {options.curves} and {options.seed}."
        )
    facts: dict[str, Any] = {"format": _FORMAT, "format_version": 1, "curves": options.curves, "seed": options.seed}
    for name in PARTS if options.part == "all" else (options.part,):
        found, text = PARTS[name](options)
        facts[name] = found
        if not options.json:
            print(f"{text}\n", flush=True)
    if options.json:
        print_json(facts)
    if options.output is not None:
        write_json(options.output, facts)
    return 0


def _stop(options: argparse.Namespace) -> tuple[Any, str]:
    from hf_eff.simulation.stopping import PROBE_COST, criteria, render_criteria, render_rows, stop_tables

    tables = stop_tables(range(options.seed, options.seed + options.curves), _policies(options))
    checked = criteria(tables["inside"])
    heads = {
        "inside": f"Regret, nats: {options.curves} curves",
        "outside": f"The same on families outside the estimator's grid: {options.curves // 2} curves",
        "unpriced": f"Governors without a price, all families: {options.curves // 4} curves",
    }
    notes = {"inside": f"\n\n{render_criteria(checked)}"}
    parts = [
        f"## {heads[name]} from seed {options.seed}, a probe costs {PROBE_COST:g} of the budget\n\n"
        f"{render_rows(rows)}{notes.get(name, '')}"
        for name, rows in tables.items()
    ]
    facts: dict[str, Any] = {name: [dataclasses.asdict(row) for row in rows] for name, rows in tables.items()}
    facts["criteria"] = [{**dataclasses.asdict(each), "holds": each.holds} for each in checked]
    return facts, "\n\n".join(parts)


def _refresh(options: argparse.Namespace) -> tuple[Any, str]:
    from hf_eff.report.markdown import table
    from hf_eff.simulation.refreshing import refresh_table

    problems = options.curves // 2
    found, parts = {}, []
    for bend in BENDS:
        rows = refresh_table(options.seed, problems, bend)
        cells = [[each if isinstance(each, str) else f"{each:.3f}" for each in row.values()] for row in rows]
        head = f"## Regret of refreshing ({problems} problems, seed {options.seed}, returns diminish with k = {bend:g})"
        parts.append(f"{head}\n\n{table(list(rows[0]), cells)}")
        found[f"bend={bend:g}"] = rows
    return found, "\n\n".join(parts)


def _trace(options: argparse.Namespace) -> tuple[Any, str]:
    from hf_eff.simulation.traces import PRICES, read_traces, render_traces, trace_rows

    traces = read_traces(_folder(options))
    rows = trace_rows(traces, _policies(options))
    prices = f"{len(PRICES)} prices of {PRICES[0]:g} to {PRICES[-1]:g} nats for the whole run"
    text = f"## Regret on recorded runs ({len(traces)} runs, {prices})\n\n{render_traces(rows)}"
    return [dataclasses.asdict(row) for row in rows], text


def _calibration(options: argparse.Namespace) -> tuple[Any, str]:
    from hf_eff.simulation.calibration import calibration_on_curves, calibration_on_traces, render_calibration
    from hf_eff.simulation.curves import INSIDE, OUTSIDE, make_curves
    from hf_eff.simulation.stopping import PROBE_COST
    from hf_eff.simulation.traces import read_traces

    count = options.curves // 5  # none is stopped early, so each takes longer than in a table
    seeds = range(options.seed, options.seed + count)
    found = {
        "inside": calibration_on_curves(make_curves(INSIDE, seeds), PROBE_COST),
        "outside": calibration_on_curves(make_curves(OUTSIDE, seeds), PROBE_COST),
        "traces": calibration_on_traces(read_traces(_folder(options))),
    }
    heads = {
        "inside": f"{count} synthetic curves from seed {options.seed}",
        "outside": f"{count} curves of families outside the grid from seed {options.seed}",
        "traces": "recorded runs at all prices",
    }
    parts = [f"## Calibration: {heads[name]}\n\n{render_calibration(each)}" for name, each in found.items()]
    return {name: dataclasses.asdict(each) for name, each in found.items()}, "\n\n".join(parts)


PARTS: dict[str, Callable[[argparse.Namespace], tuple[Any, str]]] = {
    "stop": _stop,
    "refresh": _refresh,
    "trace": _trace,
    "calibration": _calibration,
}


def _policies(options: argparse.Namespace) -> Any:
    """Governors asked for besides those of every table.

    Raises:
        UnknownMethodError: One is not registered.
    """
    from functools import partial

    from hf_eff.registry import get_method
    from hf_eff.simulation.stopping import registered

    return {get_method("governor", name).name: partial(registered, name, {}) for name in options.policy}


def _folder(options: argparse.Namespace) -> Path:
    """Folder of the recorded runs.

    Raises:
        DataError: There is none.
    """
    if options.traces is not None:
        return Path(options.traces)
    for folder in (_ROOT / TRACES[0], _ROOT.parent / TRACES[1]):
        if folder.is_dir():
            return folder
    raise DataError("this installation carries no recorded runs; name a folder of them with --traces.")
