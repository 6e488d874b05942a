"""Whether a run pays for enough probes that its governor can decide anything. Pure."""

from __future__ import annotations

from typing import Any

from hf_eff.contracts.cost import Facts
from hf_eff.engines.probe_spacing import planned_flops, probe_flops
from hf_eff.options import ResolvedOptions

_AMPLE = 4
"""Multiple of the fewest probes that is suggested: a stop has to be confirmed by later ones."""


def probe_note(resolved: ResolvedOptions, facts: Facts, flops: float, reached: float = 1.0) -> str | None:
    """Say that the governor will only watch, or None where it can act.

    Args:
        resolved: The run's options.
        facts: Facts of the run while training.
        flops: What the plan sets aside for probes.
        reached: Share of the planned steps that the budget covers.
    """
    address = resolved.governor.spec.address
    config: Any = resolved.governor.config
    fewest = getattr(config, "fewest_probes", 0)
    if not fewest or facts.pool.streaming:
        return None
    limit = reached * planned_flops(facts)[1]
    probe = getattr(config, "looks_cost", 1) * probe_flops(facts, config.num_examples, config.probe_allowance(limit))
    paid = int(reached * flops / probe + 1e-9) if probe > 0 else fewest
    if paid >= fewest:
        return None
    wanted = _AMPLE * fewest * probe / limit
    remedy = f"governor_kwargs={{'probe_share': {wanted:.1g}}} pays for more" if wanted <= 1 else "train longer"
    return (
        f"{address} can pay for {paid} probe{'' if paid == 1 else 's'} in this run and decides nothing before it has "
        f"{fewest}; {remedy}."
    )
