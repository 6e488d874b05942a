"""What ``hf-eff select`` would spend, what training on its choice costs, and whether it pays. Loads no weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli.plan import sampled_facts
from hf_eff.cli.sources import load_config, load_tokenizer
from hf_eff.errors import DataError
from hf_eff.numerics.refresh_law import break_even_compute
from hf_eff.units import format_amount

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_eff.contracts.cost import Facts
    from hf_eff.numerics.payback import PayBack
    from hf_eff.plan import Plan

_ROWS_OF_A_STEP = 8  # FLOPs do not depend on it but for the last batch


def selection_plan(options: argparse.Namespace, pool: Dataset, target: Dataset | None) -> dict[str, Any]:
    """Predicted cost of selecting and of training, and the verdict.

    Args:
        options: Those of ``hf-eff select``.
        pool: Candidates.
        target: Target rows, or None.

    Returns:
        JSON-able: ``selection_flops``, ``training_flops``, ``selected_rows``, ``rows``, ``payback`` and ``notes``.

    Raises:
        DataError: No model is named.
        PlanError: The combination cannot work.
    """
    from hf_eff.contracts.cost import Facts, RunFacts
    from hf_eff.engines.facts import model_facts_from_config
    from hf_eff.numerics.payback import PayBack
    from hf_eff.options import EffOptions
    from hf_eff.plan import make_plan

    if options.model is None:
        raise DataError("--dry-run needs --model, whose configuration and tokenizer it reads.")
    tokenizer = load_tokenizer(options.model, options.cache_dir)
    proxy = options.selection_kwargs.get("proxy_model")
    scorer = model_facts_from_config(load_config(options.model, options.cache_dir))
    facts = Facts(
        model=scorer,
        pool=sampled_facts(pool, target, tokenizer, options.max_length or 1024),
        run=RunFacts(epochs=options.train_epochs, batch_size=_ROWS_OF_A_STEP),
        proxy=None if proxy is None else model_facts_from_config(load_config(proxy, options.cache_dir)),
    )
    scored = make_plan(EffOptions(selection=options.selection, selection_kwargs=options.selection_kwargs), facts)
    speedup = scored.resolved.pool.expected_speedup
    if options.measured is not None:
        speedup = measured_speedup(options.measured, options.selection)
    return {
        "selection": [chosen.spec.name for chosen in scored.resolved.pool_stages],
        "rows": len(pool),
        "selected_rows": scored.selected_rows,
        **_verdict(PayBack(scored.flops["select"], _training_flops(options, facts, scored), speedup)),
        "notes": [note for note in scored.warnings if "selection" in note],
    }


def _training_flops(options: argparse.Namespace, facts: Facts, scored: Plan) -> float:
    """FLOPs of training ``train_model``, or without one the model that scores, on the rows to keep."""
    from hf_eff.engines.facts import model_facts_from_config
    from hf_eff.options import EffOptions
    from hf_eff.plan import make_plan

    if options.train_model is None:
        return scored.flops["train"]
    model = model_facts_from_config(load_config(options.train_model, options.cache_dir))
    plain = EffOptions(selection="random", selection_kwargs={"num_examples": scored.selected_rows})
    return make_plan(plain, facts.replace(model=model)).flops["train"]


def _verdict(payback: PayBack) -> dict[str, Any]:
    """JSON-able: infinite amounts are None. ``break_even_flops`` are those of selecting and training together."""
    uses, budget = payback.break_even_uses, break_even_compute(payback.selection_flops, payback.speedup)
    return {
        "selection_flops": payback.selection_flops,
        "training_flops": payback.training_flops,
        "expected_speedup": payback.speedup,
        "needed_speedup": payback.needed_speedup,
        "break_even_uses": uses if uses < float("inf") else None,
        "break_even_flops": budget if budget < float("inf") else None,
        "pays": payback.pays(),
        "verdict": str(payback),
    }


def measured_speedup(path: Path, selection: str) -> float:
    """How much faster than random rows a choice taught in trainings that were done before.

    Args:
        path: JSON lines, one training each, with ``selection`` (a method's name), ``flops`` of the training and
            ``value``, higher is better: accuracy, or the negative of a loss.
        selection: The method to compare with ``random``; each needs three trainings of different cost.

    Returns:
        Ratio of the rates of their gain curves, at least 1.

    Raises:
        DataError: The file cannot be read or holds too little.
    """
    from hf_eff.numerics.gain_curve import fit_gain_curve

    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        full = max(float(row["flops"]) for row in rows)
        points = {
            name: [(float(row["flops"]), float(row["value"])) for row in rows if row["selection"] == name]
            for name in (selection, "random")
        }
        rates = [
            fit_gain_curve([cost for cost, _ in found], [value for _, value in found], full).rate
            for found in points.values()
            if found
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"measured={str(path)!r} holds no usable trainings ({error!r}).") from error
    if len(rates) < 2:
        raise DataError(f"measured={str(path)!r} needs trainings on {selection!r} and on 'random' rows.")
    return max(1.0, rates[0] / rates[1])


def pay_back_lines(facts: Mapping[str, Any]) -> list[str]:
    """The plan for people."""
    uses = facts["break_even_uses"]
    rows = {
        "selection": " then ".join(facts["selection"]),
        "rows": f"{facts['selected_rows']:,} of {facts['rows']:,}",
        "selecting": format_amount("flops", facts["selection_flops"]),
        "training": format_amount("flops", facts["training_flops"]),
        "break-even": "never" if uses is None else f"{uses:.3g} uses{_from_budget(facts['break_even_flops'])}",
        "verdict": facts["verdict"],
    }
    return [f"{name:<12}{value}" for name, value in rows.items()] + [f"note: {note}" for note in facts["notes"]]


def _from_budget(flops: float) -> str:
    return f", or one of {format_amount('flops', flops)} and more for selecting and training" if flops else ""
