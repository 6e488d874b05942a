"""``hf-eff governor``: replay the log of a run, by its own policy or by others; run the shipped simulations."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json
from hf_eff.errors import DataError, OptionError

if TYPE_CHECKING:
    from hf_eff.engines.decision_log import GovernorLog, LoggedDecision

LOG = "governor.jsonl"
FURTHER = ("hf_eff.cli.governor_sim",)
"""Modules with further actions: ``add_parser(actions)`` adds one, whose option ``run`` takes the parsed words."""
_SHOWN = 5


def run(argv: Sequence[str]) -> int:
    """Do the action that the first word names."""
    parser = SentenceErrors(
        prog="hf-eff governor", description="What a governor decided, and what another would have.", allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_replay(actions)
    for module in FURTHER:
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).add_parser(actions)
    options = parser.parse_args(list(argv))
    code: int = options.run(options)
    return code


class _Policy(argparse.Action):
    """``--policy NAME`` begins a policy, ``--option K=V`` belongs to the one before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Add a policy, or an option to the last one."""
        policies = list(getattr(namespace, "policies", None) or [])
        if option_string == "--policy":
            policies.append((values, {}))
        elif not policies:
            parser.error("--option comes after the --policy that it belongs to")
        else:
            name, given = policies[-1]
            policies[-1] = (name, {**given, **_assignment(values)})
        namespace.policies = policies


def _assignment(text: str) -> dict[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise OptionError(f"--option must be NAME=VALUE, got {text!r}.")
    try:
        return {name: json.loads(value)}
    except ValueError:
        return {name: value}


def _add_replay(actions: Any) -> None:
    parser = actions.add_parser(
        "replay",
        help="decide a recorded run again",
        description="Without --policy: whether the log is what its own policy decides on it; exit code 1 when not. "
        "With it: where each policy would have ended the run. Stopping does not change what came before, so for "
        "policies that only stop the answer is exact at the recorded probes, at no compute.",
        allow_abbrev=False,
    )
    parser.add_argument("log", type=Path, help=f"{LOG}, or the folder of a run that holds it")
    parser.add_argument("--policy", action=_Policy, dest="policies", metavar="NAME", help="a governor; may be repeated")
    parser.add_argument(
        "--option", action=_Policy, dest="policies", metavar="NAME=VALUE", help="option of the policy before it"
    )
    parser.add_argument(
        "--price", type=float, help="nats that a unit of the governing currency must buy: adds J and regret"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=replay)


def replay(options: argparse.Namespace) -> int:
    """Print what the flags ask for; 1 when the log is not what its own policy decides.

    Raises:
        DataError: There is no log, or it holds no look.
        OptionError: A flag is malformed, or a policy lacks an option.
        UnknownMethodError: A policy is not registered.
    """
    from hf_eff.governor import GovernorLog

    if options.price is not None and not (math.isfinite(options.price) and options.price >= 0.0):
        raise OptionError(f"--price must be 0 or more, got {options.price}.")
    log = GovernorLog(options.log / LOG if options.log.is_dir() else options.log)
    looks = _looks(log)
    facts = _facts(log, looks, options)
    if options.json:
        print_json(facts)
    else:
        print("\n".join(_lines(facts)))
    return 0 if facts["exact"] is not False else 1


def _looks(log: GovernorLog) -> list[LoggedDecision]:
    try:
        looks = log.decisions()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{str(log.path)!r} holds a record that is not complete ({error!r}).") from error
    if not looks:
        raise DataError(f"{str(log.path)!r} holds no look at the run; its governor took no probe.")
    return looks


def _facts(log: GovernorLog, looks: list[LoggedDecision], options: argparse.Namespace) -> dict[str, Any]:
    """JSON-able: the log, whether it replays exactly (None when others were asked for), and a row a policy."""
    from hf_eff.governor import best_outcome, compare, new_governor, outcome, recorded_outcome, recorded_policy

    price, policies = options.price, options.policies or [recorded_policy(log)]
    differences = None if options.policies else compare(log.path, new_governor(*policies[0]))
    ends = [(_label(name, given), outcome(looks, new_governor(name, given))) for name, given in policies]
    rows = [("recorded run", recorded_outcome(looks)), *ends]
    optimum = None if price is None else best_outcome(looks, price)
    least = None if optimum is None else optimum.priced(price)
    return {
        "log": str(log.path),
        "looks": len(looks),
        "exact": None if differences is None else not differences,
        "differences": [
            {"step": each.step, "logged": each.logged.action, "replayed": each.replayed.action}
            for each in differences or ()
        ],
        "price": price,
        "optimum": None if optimum is None else {"step": optimum.step, "compute": optimum.compute, "J": least},
        "policies": [_row(label, end, price, least) for label, end in rows],
    }


def _label(name: str, options: dict[str, Any]) -> str:
    """Name with the options that differ from the defaults."""
    from hf_eff.registry import get_method

    config = get_method("governor", name).config
    defaults, given = config().to_dict(), config.from_dict(options).to_dict()
    told = [f"{key}={value}" for key, value in given.items() if value != defaults[key]]
    return f"{name}({', '.join(told)})" if told else name


def _row(label: str, end: Any, price: float | None, least: float | None) -> dict[str, Any]:
    row = {"policy": label, **dataclasses.asdict(end)}
    if price is not None and least is not None:
        value = end.priced(price)
        row |= {"J": value, "regret": None if value is None else value - least}
    return row


def _lines(facts: dict[str, Any]) -> list[str]:
    """The facts for people."""
    lines = []
    if facts["exact"] is not None:
        verdict = "every decision replays exactly" if facts["exact"] else f"{len(facts['differences'])} differ"
        lines.append(f"{facts['log']}: {facts['looks']} looks, {verdict}.")
        lines += [
            f"  step {each['step']}: the log says {each['logged']}, the replay {each['replayed']}"
            for each in facts["differences"][:_SHOWN]
        ]
    columns = {"policy": "policy", "ends": "ends", "step": "step", "compute": "compute", "saved": "saved"}
    columns |= {"loss": "loss there", "best": "best so far"}
    if facts["price"] is not None:
        columns |= {"J": "J", "regret": "regret"}
    cells = [list(columns.values())]
    cells += [[_cell(name, row) for name in columns] for row in facts["policies"]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if facts["optimum"] is not None:
        found = facts["optimum"]
        lines.append(f"least J in hindsight: {found['J']:.5g} after step {found['step']}")
    for row in facts["policies"]:
        if row["departs_at"] is not None:
            lines.append(f"note: {row['policy']} would reallocate at step {row['departs_at']}; its row is not exact.")
        if row["action"] == "cooldown":
            lines.append(
                f"note: {row['policy']} lowers the rate from step {row['step']} on; that compute is not counted."
            )
    return lines


def _cell(name: str, row: dict[str, Any]) -> str:
    if name == "ends":
        return {"continue": "at its end", "stop": "stop", "cooldown": "cooldown"}[row["action"]]
    value = row[name]
    if value is None:
        return "-"
    if name == "saved":
        return f"{value:.1%}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
