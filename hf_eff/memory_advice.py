"""What to change first where memory is short: candidates are predicted, and the cheapest that helps is named. Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_eff import registry
from hf_eff.contracts.cost import Facts
from hf_eff.errors import MissingDependencyError, OptionError, PlanError
from hf_eff.memory_forecast import Forecast, Setup
from hf_eff.options import EffOptions
from hf_eff.units import format_bytes

_SAME_RESULT = ("chunked_loss", "row_chunks", "offload", "checkpointing")
_OTHER_UPDATE = ("fused", "galore", "apollo", "badam", "hift", "lisa", "lora", "mezo")
_WORTH = 0.05  # share of the bytes that a change has to save
_REFUSALS = (PlanError, OptionError, MissingDependencyError)


@dataclass(frozen=True)
class Change:
    """One thing to change, with what is predicted then.

    Attributes:
        what: The change in words.
        size: How many things change.
        memory: The methods after it, as ``memory=`` takes them.
        memory_kwargs: Their options.
        batch_size, max_length: Shape of a micro-batch after it.
        total: Predicted peak bytes after it.
        step_flops: FLOPs of a step after it.
        same_result: Whether training goes on as without it, but for the order of sums.
    """

    what: str
    size: int
    memory: str
    memory_kwargs: Mapping[str, Mapping[str, Any]]
    batch_size: int
    max_length: int
    total: float
    step_flops: float
    same_result: bool

    def text(self, before: Forecast, budget: float | None) -> str:
        """The advice as a phrase."""
        saved, slower = 1 - self.total / before.total, self.step_flops / before.step_flops
        over = "" if budget is None or self.total <= budget else f", still {format_bytes(self.total - budget)} too much"
        return f"{self.what}: {format_bytes(self.total)} (-{saved:.0%}) at {slower:.2f}x its FLOPs{over}"


def first_change(setup: Setup, before: Forecast, budget: float | None) -> Change | None:
    """The cheapest change that helps, found by predicting every candidate.

    Changes that leave the result as it is come first (a chunked loss, parts of a batch, checkpointing, and these
    together), then other methods, then both, then shorter rows. Under a budget that is passed the first kind that holds
    a change that fits decides, and of it the one of fewest FLOPs, or if none fits the one that leaves least; without a
    budget the most bytes saved per FLOP by one change.

    Args:
        setup: The methods as they are.
        before: Their forecast.
        budget: Bytes, or None.

    Returns:
        The change, or None where the setup fits or nothing helps.
    """
    if budget is not None and before.total <= budget:
        return None
    known, helping = set(registry.list_methods("memory")), []
    for candidates in (_with_same_result, _with_other_update, _with_both, _with_shorter_rows):
        changes = list(_predicted(candidates(setup, budget, known), same_result=candidates is _with_same_result))
        worth = [change for change in changes if change.total <= (1 - _WORTH) * before.total]
        small = [change for change in worth if change.size == 1]
        if budget is None and small:
            return max(small, key=lambda change: (before.total - change.total) / change.step_flops)
        fitting = [change for change in changes if budget is not None and change.total <= budget]
        if fitting:
            return min(fitting, key=lambda change: (change.step_flops, change.size, -change.total))
        helping += worth
    return min(helping, key=lambda change: change.total, default=None)


_Candidate = tuple[str, int, Setup]
"""A change in words, how many things it changes, and what is then."""


def _predicted(candidates: Iterator[_Candidate], *, same_result: bool) -> Iterator[Change]:
    # Those candidates that can work.
    for what, size, setup in candidates:
        try:
            after = setup.forecast()
        except _REFUSALS:
            continue
        run = setup.facts.run
        yield Change(
            what=what,
            size=size,
            memory=setup.memory,
            memory_kwargs=setup.kwargs,
            batch_size=run.batch_size,
            max_length=run.length,
            total=after.total,
            step_flops=after.step_flops,
            same_result=same_result,
        )


# Each of these takes the setup, the budget in bytes (or None) and the names of the registered methods.


def _with_same_result(setup: Setup, _budget: float | None, known: set[str]) -> Iterator[_Candidate]:
    # Every way to fill the free slots of activations; beside others, the most of a method that has several sizes.
    taken = {spec.slot for spec in registry.resolve("memory", setup.memory)}
    by_slot: dict[str, list[_Added]] = {}
    for name in _SAME_RESULT:
        if name in known and (slot := registry.get_method("memory", name).slot) not in taken:
            by_slot.setdefault(slot, []).extend((name, options) for options in _sizes(name, setup.facts))
    for chosen in itertools.product(*([None, *variants] for variants in by_slot.values())):
        added = [each for each in chosen if each is not None]
        if added and (len(added) == 1 or all(each == (each[0], _sizes(each[0], setup.facts)[-1]) for each in added)):
            yield "add " + "+".join(_shown(*each) for each in added), len(added), _plus(setup, added)


_Added = tuple[str, dict[str, Any]]
"""A method and its options."""


def _sizes(name: str, facts: Facts) -> list[dict[str, Any]]:
    """Options to try of a method, in ascending effect."""
    if name != "row_chunks":
        return [{}]
    rows = facts.run.batch_size
    return [{"chunks": parts} for parts in (2, 4, 8, 16, 32) if parts < rows] + [{"chunks": rows}] * (rows > 1)


def _shown(name: str, options: Mapping[str, Any]) -> str:
    return name + (f"({', '.join(f'{key}={value}' for key, value in options.items())})" if options else "")


def _plus(setup: Setup, added: Sequence[_Added]) -> Setup:
    """The setup with more methods; the baseline, which changes nothing, is dropped."""
    kept = [spec.name for spec in registry.resolve("memory", setup.memory) if not _is_idle(spec.name)]
    kwargs = {name: dict(options) for name, options in setup.kwargs.items() if name in kept}
    kwargs.update({name: options for name, options in added if options})
    return dataclasses.replace(setup, memory="+".join([*kept, *(name for name, _ in added)]), kwargs=kwargs)


def _is_idle(name: str) -> bool:
    return name == EffOptions().memory


def _with_other_update(setup: Setup, _budget: float | None, known: set[str]) -> Iterator[_Candidate]:
    # Each other method in place of the one of its slot, and in place of everything that trains.
    parts = registry.resolve("memory", setup.memory)
    tried = {setup.memory}
    for name in _OTHER_UPDATE:
        if name not in known or any(spec.name == name for spec in parts):
            continue
        slot = registry.get_method("memory", name).slot
        beside = [spec.name for spec in parts if spec.slot != slot and not _is_idle(spec.name)]
        around = [spec.name for spec in parts if spec.slot.startswith("activations")]
        for kept in (beside, around):
            memory = "+".join([*kept, name])
            if memory not in tried:
                tried.add(memory)
                kwargs = {key: value for key, value in setup.kwargs.items() if key in kept}
                yield f"train with {memory!r}", 1, dataclasses.replace(setup, memory=memory, kwargs=kwargs)


def _with_both(setup: Setup, budget: float | None, known: set[str]) -> Iterator[_Candidate]:
    # Another method and everything that leaves its result as it is.
    for what, size, other in _with_other_update(setup, budget, known):
        added = list(_with_same_result(other, budget, known))
        if added:
            yield f"{what} and {added[-1][0]}", size + added[-1][1], added[-1][2]


def _with_shorter_rows(setup: Setup, budget: float | None, _known: set[str]) -> Iterator[_Candidate]:
    # Rows cut to what fits, or to half where nothing limits them.
    length = setup.facts.run.length
    shorter = length // 2 if budget is None else setup.most("length", budget, length)
    if 0 < shorter < length:
        yield f"cut rows to {shorter} tokens", 1, setup.resized(length=shorter)
