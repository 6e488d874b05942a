"""What a governor may change in a run besides ending it: which rows are trained on, and how the update fits."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.contracts.governor import Decision, Offer
from hf_eff.engines.row_phases import RowPhases
from hf_eff.errors import CheckpointError
from hf_eff.manifest import Selection
from hf_eff.plan_reallocation import DATA_ACTIONS

if TYPE_CHECKING:
    from torch import nn

    from hf_eff.rescue import Rescue

logger = logging.getLogger(__name__)
PHASES = "data_phases.json"
"""File of the run's folder that says which rows were trained on when."""
HEADROOM = 0.92
"""Share of the memory cap that a prediction may fill."""


class Reallocation:
    """Makes the offers of a run at each probe, and carries out the one that its governor takes.

    Rows change at the next window, one change at a time, so that each can be told by its effect. Memory changes at
    once; it leaves the result as it is.

    Args:
        actions: Words of the governor's knob ``actions``.
        trainer: The trainer; its selection stage keeps the rows.
        run: The run, its supervisor in place.

    Attributes:
        events: What was decided and what became of it, JSON-able.
    """

    def __init__(self, actions: Sequence[str], trainer: Any, run: Any) -> None:
        self._actions, self._trainer, self._run = tuple(actions), trainer, run
        self._pending: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []

    @property
    def _stage(self) -> Any:
        return self._trainer.selection_stage

    # Offers

    def offers(self, model: nn.Module) -> tuple[Offer, ...]:
        """What could be done now, feasible or not.

        Args:
            model: The unwrapped model.
        """
        rows = [self._row_offer(action) for action in DATA_ACTIONS if action in self._actions]
        return (*rows, *(memory_offers(model, self._run) if "memory" in self._actions else ()))

    def _row_offer(self, action: Any) -> Offer:
        cost = self._stage.refresh_cost if action == "refresh" else {"flops": 0.0, "tokens": 0.0}
        why_not = self._why_no_change() or self._stage.why_not(action) or self._unpayable(cost)
        price = self._run.supervisor.price(cost) if any(cost.values()) else 0.0
        return Offer(action, fixed_cost=price, fades=action == "refresh", feasible=not why_not, why_not=why_not)

    def _why_no_change(self) -> str:
        """Why rows cannot change at all now, else empty."""
        run = self._run
        if self._pending is not None:
            return f"{self._pending['action']} is decided and waits for its window"
        if run.cooling:
            return "the run is in its cooldown"
        if self._stage.phases.next_boundary(run.steps_done) >= (run.plan.stop_step or 0):
            return "no window begins before the run ends"
        return ""

    def _unpayable(self, cost: Mapping[str, float]) -> str:
        passed = self._run.ledger.need_fits(self._run.with_reserve(cost)) if any(cost.values()) else None
        return "" if passed is None else f"it would pass the {passed} limit"

    # Decisions

    def take(self, decision: Decision, step: int, model: nn.Module) -> None:
        """Carry out a decision, or note why not.

        Args:
            decision: The governor's.
            step: Optimizer steps done.
            model: The unwrapped model.
        """
        same = [
            offer for offer in self.offers(model) if (offer.action, offer.target) == (decision.action, decision.target)
        ]
        why_not = self._run.ranks.broadcast(same[0].why_not if same else "the run offers no such thing")
        event = {"step": step, "action": decision.action, "target": decision.target, "reason": decision.reason}
        self.events.append(event)
        if why_not:
            event["not_done"] = why_not
            logger.warning("Step %d: %s is not carried out: %s.", step, decision.action, why_not)
        elif decision.action == "switch_memory":
            switch_memory(decision.target, model, step, self._run.rescue)
            event["from_step"] = step
            logger.warning("From step %d on, %s: %s.", step, decision.target, decision.reason)
        else:
            self._pending = event

    def at_window(self, step: int, model: nn.Module) -> None:
        """A window begins: change the rows if that was decided.

        Args:
            step: Optimizer steps done.
            model: The unwrapped model.
        """
        event, phases = self._pending, self._stage.phases
        if event is None or step % phases.window_steps:
            return
        self._pending = None
        problem = self._stage.change(self._trainer, self._run, event["action"], step)
        if problem is not None:
            event["not_done"] = str(problem)
            logger.warning("Step %d: %s is not carried out: %s", step, event["action"], problem)
            return
        event["from_step"] = step
        logger.warning("From step %d on, other rows (%s): %s.", step, event["action"], event["reason"])
        if event["action"] == "refresh":
            self._run.supervisor.note_drift(model)

    # State

    def state_dict(self) -> dict[str, Any]:
        """State for the side-car: JSON-able values and the order of the rows as tensors."""
        waits = None if self._pending is None else self.events.index(self._pending)
        return {"pending": waits, "events": [dict(event) for event in self.events], "rows": self._stage.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``; the rows were put back when the pool was narrowed."""
        self.events = [dict(event) for event in state["events"]]
        self._pending = None if state["pending"] is None else self.events[state["pending"]]


def memory_offers(model: nn.Module, run: Any) -> tuple[Offer, ...]:
    """Other ways to fit the update that leave the result as it is.

    Args:
        model: The unwrapped model.
        run: The run.
    """
    rescue, cap = run.rescue, run.ledger.budget.limits.get("bytes")
    found = []
    whole, again = rescue.forecast(checkpointing=False), rescue.forecast(checkpointing=True)
    ratio = again.step_flops / whole.step_flops if whole.step_flops and _counts_flops(run) else 1.0
    if rescue.recomputes and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        why_not = _why_not_whole(rescue, whole.peak_bytes, cap, run.plan.facts.hardware.total_bytes)
        found.append(
            Offer(
                "switch_memory",
                "checkpointing off",
                cost_factor=1.0 / ratio,
                feasible=not why_not,
                why_not=why_not,
            )
        )
    elif rescue.can_recompute and rescue.splits and cap is not None:
        found.append(Offer("switch_memory", "checkpointing on", cost_factor=ratio))
    wider = rescue.expected_limit()
    if rescue.token_limit is not None and (wider is None or wider > rescue.token_limit):
        found.append(Offer("switch_memory", "row_chunks off" if wider is None else f"row_chunks {wider}"))
    return tuple(found)


def switch_memory(target: str, model: nn.Module, step: int, rescue: Rescue) -> None:
    """Carry out one of ``memory_offers``.

    Args:
        target: Of the offer.
        model: The unwrapped model.
        step: Optimizer steps done.
        rescue: Holds the methods in use.
    """
    if target.startswith("checkpointing"):
        rescue.switch_checkpointing(model, step, on=target == "checkpointing on")
    else:
        rescue.relax_rows()


def _counts_flops(run: Any) -> bool:
    """Whether recomputation takes of what binds; steps and tokens do not see it."""
    if run.supervisor.currency != "share":
        return bool(run.supervisor.currency != "tokens")
    spent, limits = run.ledger.spent(), run.ledger.budget.limits
    binding = max((name for name in limits if name != "bytes"), key=lambda name: spent.get(name, 0.0) / limits[name])
    return binding not in ("tokens", "steps")


def _why_not_whole(rescue: Rescue, peak: float, cap: float | None, total: float) -> str:
    """Why layers cannot keep their activations, else empty."""
    if cap is None and rescue.checkpoints:
        cap = total or None  # memory ran out once, so that the device itself is the cap
    if cap is None or peak <= HEADROOM * cap:
        return ""
    return f"the predicted peak is {peak / cap:.0%} of the memory cap"


def read_phases(folder: str | Path) -> RowPhases:
    """The data phases of a run, read from its folder: with ``rows_of_steps`` they give its rows in order.

    Args:
        folder: ``output_dir`` of a run whose rows could change.

    Raises:
        CheckpointError: The folder has no such record, or a manifest in it is another one.
        ManifestError: A manifest is damaged.
    """
    path = Path(folder) / PHASES
    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} does not exist; only a run whose rows may change writes it.")
    record = json.loads(path.read_text(encoding="utf-8"))
    chosen = [Selection.load(path.parent / entry["manifest"]) for entry in record["phases"]]
    check_digests(record, chosen)
    return RowPhases.from_record(record, [each.indices for each in chosen])


def check_digests(record: Mapping[str, Any], chosen: Sequence[Selection]) -> None:
    """Check that manifests are those of the recorded phases.

    Raises:
        CheckpointError: One is not.
    """
    for entry, each in zip(record["phases"], chosen, strict=True):
        if each.digest != entry["digest"]:
            raise CheckpointError(
                f"the selection in {entry['manifest']!r} is not the one of data phase {entry['phase']}; put the "
                "original manifest back."
            )
