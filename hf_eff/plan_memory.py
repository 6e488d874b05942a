"""What memory methods cost together, and the ladder: what to try, in which order, when memory runs out. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import SLOTS
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.largest_fit import largest
from hf_eff.numerics.optim_rules import updates_in_backward
from hf_eff.numerics.planned_step import planned_recompute_flops
from hf_eff.options import Chosen, ResolvedOptions, choose

SHORTEST_SEGMENT = 128
"""Tokens below which a row is not cut further."""
_RESTARTABLE = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_bnb_8bit")
_UNSPLIT_BACKENDS = ("fsdp1", "fsdp2", "deepspeed")


@dataclass(frozen=True)
class Rung:
    """One thing to try when memory runs out, on top of the rungs before it.

    Attributes:
        name: ``"row_chunks"``, ``"checkpointing"``, ``"badam"`` or ``"length_split"``.
        exact: Whether training goes on as it would have without, but for the order of sums.
        bytes: Predicted peak with this rung and those before it, for the longest rows.
    """

    name: str
    exact: bool
    bytes: float


def memory_cost(resolved: ResolvedOptions, facts: Facts) -> tuple[Facts, Cost]:
    """Adapt facts by every memory method but the last of the chain, which predicts on what it then sees.

    Returns:
        The facts with every method applied, and the cost, recomputation by checkpointing included.
    """
    chain = sorted(resolved.memory, key=lambda chosen: SLOTS["memory"].index(chosen.spec.slot))
    for chosen in chain[:-1]:
        facts = _adapted(chosen, facts)
    last = chain[-1]
    adapted = _adapted(last, facts)
    cost = _with_objective(last.spec.cost(last.config, facts), adapted)
    if adapted.run.checkpointing and all(chosen.spec.traits.needs_backward for chosen in chain):
        again = planned_recompute_flops(adapted, cost)
        cost = dataclasses.replace(cost, step_flops=cost.step_flops + again)
    return adapted, cost


def _with_objective(cost: Cost, facts: Facts) -> Cost:
    """The cost where each forward for a loss is a value of an objective, which may hold a copy of what is trained."""
    forwards = facts.run.objective_forwards
    if forwards is None:
        return cost
    part = facts.model.trainable or everything_trains(facts.model)
    held = part.params * facts.model.param_bytes if facts.run.holds_weights else 0.0
    terms = {**cost.bytes, "rest": cost.bytes.get("rest", 0.0) + held}
    return dataclasses.replace(cost, step_flops=cost.step_flops * forwards, bytes=terms)


def _adapted(chosen: Chosen, facts: Facts) -> Facts:
    return chosen.spec.adapt(chosen.config, facts) if chosen.spec.adapt is not None else facts


def planned_ladder(resolved: ResolvedOptions, facts: Facts) -> tuple[Rung, ...]:
    """The rungs that ``out_of_memory`` allows and that this run can take, in order.

    Args:
        resolved: The methods of the run.
        facts: Facts of the run, before any method changed them.

    Returns:
        Exact rungs first. Empty where a failed step cannot be tried again, because the update happens inside the
        backward or another backend holds the gradients. Several processes would have to fail alike, so they only
        split rows ahead of time, where a byte budget says how far. Nor are rows split under an objective, whose value
        on a batch need not follow from its values on parts.
    """
    allowed, backend = resolved.options.out_of_memory or "adapt", facts.hardware.backend
    methods = (chosen.spec.traits for chosen in resolved.memory)
    update_in_backward = updates_in_backward(facts.run.optim) or any(
        traits.owns_backward and traits.needs_backward for traits in methods
    )
    if facts.run.objective_forwards is not None:
        return ()
    if allowed == "raise" or update_in_backward or backend in _UNSPLIT_BACKENDS:
        return ()
    rungs = tuple(rung for rung in _rungs(resolved, facts) if rung.exact or allowed == "adapt")
    if facts.hardware.world_size == 1:
        return rungs
    capped = "bytes" in resolved.budget.limits
    return tuple(rung for rung in rungs if rung.name == "row_chunks" and capped)


def _rungs(resolved: ResolvedOptions, facts: Facts) -> list[Rung]:
    """All rungs, each with its own and the earlier ones' effect on the peak."""
    run, flattened = facts.run, facts.run.packing or facts.run.padding_free
    differentiates = all(chosen.spec.traits.needs_backward for chosen in resolved.memory)
    rungs = []
    if run.batch_size > 1 and not flattened and _is_free(resolved, "activations.rows"):
        resolved = _with(resolved, "row_chunks", {"chunks": run.batch_size})
        rungs.append(Rung("row_chunks", True, _peak(resolved, facts)))
    if differentiates and not run.checkpointing and _is_free(resolved, "activations.layers"):
        resolved = _with(resolved, "checkpointing", {})
        rungs.append(Rung("checkpointing", True, _peak(resolved, facts)))
    if differentiates and _takes_turns(resolved, facts):
        resolved = _with(resolved, "badam", {})
        rungs.append(Rung("badam", False, _peak(resolved, facts)))
    if facts.model.is_causal_lm and not flattened:
        longest = min(SHORTEST_SEGMENT, run.length or facts.pool.max_tokens)
        short = facts.replace(run=dataclasses.replace(run, length=longest))
        rungs.append(Rung("length_split", False, _peak(resolved, short)))
    return rungs


def _is_free(resolved: ResolvedOptions, slot: str) -> bool:
    return all(chosen.spec.slot != slot for chosen in resolved.memory)


def _takes_turns(resolved: ResolvedOptions, facts: Facts) -> bool:
    """Whether blockwise training can take over with the optimizer that is there already."""
    own = facts.run.custom_optimizer or any(chosen.spec.traits.owns_optimizer for chosen in resolved.memory)
    plain = facts.run.optim in _RESTARTABLE and facts.model.param_bytes >= 4 and not facts.run.fp16
    return _is_free(resolved, "update") and not own and plain and len(facts.model.blocks) > 1


def _with(resolved: ResolvedOptions, name: str, options: dict[str, Any]) -> ResolvedOptions:
    """The methods of a run and one more."""
    return dataclasses.replace(resolved, memory=(*resolved.memory, *choose("memory", name, options)))


def _peak(resolved: ResolvedOptions, facts: Facts) -> float:
    return memory_cost(resolved, facts)[1].peak_bytes


def tokens_that_fit(resolved: ResolvedOptions, facts: Facts, limit_bytes: float) -> int | None:
    """Most tokens of one part of a batch whose predicted peak is within a limit; None when even one is too many.

    Args:
        resolved: The methods of the run.
        facts: Facts of the run.
        limit_bytes: What the model, its training state and one part's activations may take together.
    """

    def needed(tokens: int) -> float:
        run = dataclasses.replace(facts.run, batch_size=1, row_chunks=1, length=tokens)
        return _peak(resolved, facts.replace(run=run))

    return largest(needed, limit_bytes) or None
