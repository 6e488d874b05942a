"""What ``hf-eff select`` would spend, what training on its choice costs, and whether it pays. Loads no weights."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_eff.cli.plan import sampled_facts
from hf_eff.cli.sources import load_config, load_tokenizer
from hf_eff.errors import DataError
from hf_eff.units import format_amount

if TYPE_CHECKING:
    from datasets import Dataset

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
    scorer = model_facts_from_config(load_config(options.model, options.cache_dir))
    facts = Facts(
        model=scorer,
        pool=sampled_facts(pool, target, tokenizer, options.max_length or 1024),
        run=RunFacts(epochs=options.train_epochs, batch_size=_ROWS_OF_A_STEP),
    )
    wanted = EffOptions(selection=options.selection, selection_kwargs=options.selection_kwargs)
    proxy = options.selection_kwargs.get("proxy_model")
    if proxy is not None:
        facts = facts.replace(proxy=model_facts_from_config(load_config(proxy, options.cache_dir)))
    scored = make_plan(wanted, facts)
    trained = scored
    if options.train_model is not None:
        model = model_facts_from_config(load_config(options.train_model, options.cache_dir))
        plain = dataclasses.replace(wanted, selection="random", selection_kwargs={"num_examples": scored.selected_rows})
        trained = make_plan(plain, facts.replace(model=model))
    payback = PayBack(scored.flops["select"], trained.flops["train"], scored.resolved.pool.expected_speedup)
    uses = payback.break_even_uses
    return {
        "selection": [chosen.spec.name for chosen in scored.resolved.pool_stages],
        "rows": len(pool),
        "selected_rows": scored.selected_rows,
        "selection_flops": payback.selection_flops,
        "training_flops": payback.training_flops,
        "expected_speedup": payback.speedup,
        "needed_speedup": payback.needed_speedup,
        "break_even_uses": uses if uses < float("inf") else None,
        "pays": payback.pays(),
        "verdict": str(payback),
        "notes": [note for note in scored.warnings if "selection" in note],
    }


def pay_back_lines(facts: Mapping[str, Any]) -> list[str]:
    """The plan for people."""
    uses = facts["break_even_uses"]
    rows = {
        "selection": " then ".join(facts["selection"]),
        "rows": f"{facts['selected_rows']:,} of {facts['rows']:,}",
        "selecting": format_amount("flops", facts["selection_flops"]),
        "training": format_amount("flops", facts["training_flops"]),
        "break-even": "never" if uses is None else f"{uses:.3g} uses",
        "verdict": facts["verdict"],
    }
    return [f"{name:<12}{value}" for name, value in rows.items()] + [f"note: {note}" for note in facts["notes"]]
