"""When a policy probes and what its probes cost: a purse that fills with the compute spent."""

from __future__ import annotations

import math

from hf_eff.contracts.cost import Facts
from hf_eff.contracts.governor import Telemetry
from hf_eff.contracts.memory import BatchShape
from hf_eff.numerics.flops import forward_flops, training_flops
from hf_eff.numerics.planned_step import planned_length
from hf_eff.numerics.probe_size import affordable_examples

WIDEST_GAP = 1 / 120
"""Largest share of the budget between two probes of a gain policy, unless the purse is too small for it."""
PURSE_ADVANCE = 0.2
"""Share of the budget that counts as spent before it is, so that the first probes can be paid."""


def purse_allows(telemetry: Telemetry, probe_cost: float, share: float) -> bool:
    """Whether one more probe keeps all of them within ``share`` of the compute spent, the advance included.

    Args:
        telemetry: The look before the probe; its compute limit is finite.
        probe_cost: Governing currency that the probe takes.
        share: Cap on the probes' part.
    """
    limit = telemetry.compute_limit
    return telemetry.probe_spent + probe_cost <= share * min(telemetry.compute + PURSE_ADVANCE * limit, limit)


def probe_gap(growth: float, share: float, since_start: float, limit: float, probe_cost: float) -> float:
    """Compute between two probes: geometric and at most ``WIDEST_GAP`` of the budget, or what the purse pays for.

    Args:
        growth: Next gap as a share of the compute since the first probe.
        share: Cap on the probes' part of the compute.
        since_start: Compute from the first probe to the last one.
        limit: Budget.
        probe_cost: Cost of a probe.
    """
    affordable = probe_cost / max(share, 1e-300)
    return max(min(growth * since_start, WIDEST_GAP * limit), affordable)


def planned_flops(facts: Facts) -> tuple[float, float]:
    """FLOPs of one optimizer step and of all that are planned."""
    run = facts.run
    batch = run.batch_size * run.accumulation * facts.hardware.world_size
    steps = run.max_steps if run.max_steps > 0 else run.epochs * math.ceil((facts.pool.num_rows or 0) / batch)
    step = training_flops(facts.model, BatchShape(rows=batch, length=math.ceil(planned_length(facts))))
    return step, step * steps


def probe_flops(facts: Facts, num_examples: int, max_flops: float) -> float:
    """FLOPs of one probe of at most ``num_examples`` rows; 0 where there are none.

    Args:
        facts: Model and held-out rows.
        num_examples: Rows wanted.
        max_flops: Cost above which fewer rows are read.
    """
    rows, length = min(num_examples, facts.pool.num_reference), math.ceil(facts.pool.mean_reference_tokens)
    if rows == 0 or length == 0:
        return 0.0
    row = forward_flops(facts.model, BatchShape(rows=1, length=length))
    return row * affordable_examples(rows, row, max_flops)
