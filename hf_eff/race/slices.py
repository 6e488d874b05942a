"""One trainer advances by a slice: training up to a fence, then a reading of the held-out examples.

A slice is a pause, not a smaller budget. The run's own budget, which schedules, plans and governors go by, is the
whole shared one in every slice; only the gate before each optimizer step closes earlier. So the run computes what it
would compute without pauses, bit for bit (but that a governor of its own pays nothing past the fence), and a slice is
a resume like any other. Raising a budget slice by slice would instead change what depends on it: decaying learning
rates, probe sizes, the end that a governor expects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_eff.contracts.budget import Budget
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.checkpoints import is_complete
from hf_eff.engines.facts import model_facts
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.errors import BudgetExceededError, MemoryExhaustedError, PlanError, TrainingDivergedError
from hf_eff.hardware.ledger import Ledger
from hf_eff.numerics.flops import forward_flops
from hf_eff.race.plan import RacePlan
from hf_eff.race.record import Advance, Reading, RunRecord
from hf_eff.run_directory import RunDirectory
from hf_eff.scoring_rows import reference_rows, scoring_collator

_FAILURES = (BudgetExceededError, MemoryExhaustedError, TrainingDivergedError, torch.OutOfMemoryError)
_COUNTED = ("flops", "tokens", "steps")
_DEAREST = 0.2
"""Share of a slice that a reading may cost."""


@dataclass(frozen=True)
class Slice(Budget):
    """A budget whose gate closes earlier.

    Attributes:
        until: Amounts by currency beyond which nothing is admitted now.
        seen: The most that can have been spent, as of the last question; for runs that fail before their first step.
    """

    until: Mapping[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict, compare=False)

    def first_passed(self, spent: Mapping[str, float], need: Mapping[str, float]) -> str | None:
        """The currency that spending ``need`` would pass, of the budget or of the fence."""
        passed = super().first_passed(spent, need)
        after = {name: spent.get(name, 0.0) + need.get(name, 0.0) for name in self.until}
        if passed is None:
            passed = next((name for name, amount in after.items() if amount > self.until[name]), None)
        self.seen.update(after if passed is None else {name: spent.get(name, 0.0) for name in self.until})
        return passed

    def is_fence(self, currency: str) -> bool:
        """Whether the fence closes the gate in this currency before the run's own limit does."""
        return currency in self.until and self.until[currency] < self.limits.get(currency, math.inf)


def fence(
    until: Mapping[str, float], spent: Mapping[str, float], left: Mapping[str, float], reading: Mapping[str, float]
) -> dict[str, float]:
    """Amounts up to which a run may train now, so that it keeps to its turn and its readings are paid.

    Args:
        until: What the round allows the run in all.
        spent: What it has spent.
        left: What nobody has spent of the shared budget.
        reading: What the readings of this slice cost.
    """
    return {name: min(until[name], spent.get(name, 0.0) + left[name] - reading.get(name, 0.0)) for name in until}


def advance(
    trainer: Any, plan: RacePlan, run: RunRecord, until: Mapping[str, float], left: Mapping[str, float]
) -> Advance:
    """Train one slice and read the held-out loss.

    Args:
        trainer: A fresh one, whose budget is the whole shared one or less, with ``save_strategy="steps"``.
        plan: The race.
        run: What is known of this run.
        until: What the round allows it to spend in all, by currency.
        left: What is left of the shared budget.

    Returns:
        What became of it; a run that breaks is an outcome, not an error.

    Raises:
        PlanError: A reading costs more than a fifth of a slice, or the run keeps compute for a cooldown.
        CheckpointError: The held-out examples, or the run's options, are not those of the slice before.
    """
    turn = _Turn(trainer, plan, run)
    gate = Slice(trainer.plan.resolved.budget.limits, fence(until, run.spent, left, turn.cost()))
    if any(limit <= run.spent.get(name, 0.0) for name, limit in gate.until.items()):
        return Advance(run.steps, run.spent)
    if not run.readings:
        turn.read(0, {}, None)
    trainer.plan = replace(trainer.plan, resolved=replace(trainer.plan.resolved, budget=gate))
    checkpoint = str(turn.folder / run.checkpoint) if run.checkpoint else None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except _FAILURES as error:
        spent = gate.seen if trainer.ledger is None else turn.spent()
        reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        return turn.outcome(run.steps, spent, ended=reason, failed=True)
    if trainer.state.global_step > run.steps:
        return turn.arrive(_end(trainer, gate))
    if run.steps == 0 and any(amount > 0.0 for amount in turn.spent().values()):
        reason = "failed: its selection left no compute for a step of its first slice; use fewer rounds"
        return turn.outcome(0, turn.spent(), ended=reason, failed=True)
    return turn.outcome(run.steps, run.spent, ended=_end(trainer, gate))


class _Turn:
    """The held-out examples of one slice, and what reading them costs beside the run's own ledger."""

    def __init__(self, trainer: Any, plan: RacePlan, run: RunRecord) -> None:
        if getattr(trainer.plan.resolved.governor.config, "cooldown", 0.0):
            raise PlanError(
                "a run that keeps compute for a cooldown would take each end of a slice for its own end; race with "
                "cooldown=0, and cool the winner down afterwards."
            )
        self._trainer, self._plan, self._run = trainer, plan, run
        self._names = tuple(dict.fromkeys([*_COUNTED, *plan.shared]))
        self._probe = held_out(trainer, plan)
        if run.probe is not None:
            self._probe.load_state_dict(run.probe)
        self._ledger = Ledger(None, trainer.plan.resolved.options.price_per_hour)
        self._readings: list[Reading] = []
        self.folder = Path(trainer.args.output_dir)

    def cost(self) -> dict[str, float]:
        """What the readings of this slice will take; amounts that depend on time as they were before.

        Raises:
            PlanError: One of them costs more than a fifth of a slice.
        """
        before = max(1, len(self._run.readings))
        once = {name: amount / before for name, amount in self._run.reading_spent.items()}
        once |= {"flops": self._probe.cost_flops, "tokens": self._probe.cost_tokens}
        share = self._plan.budget.share(once) / self._plan.slice_share
        if share > _DEAREST:
            raise PlanError(
                f"a reading of {self._probe.num_examples} held-out examples costs {share:.0%} of a slice; race with "
                "fewer examples, fewer rounds or a larger budget."
            )
        readings = 1 if self._run.readings else 2
        return {name: readings * amount for name, amount in once.items()}

    def read(self, step: int, spent: Mapping[str, float], learning_rate: float | None) -> None:
        """Take a reading of the model as it is."""
        self._ledger.charge("probe", flops=self._probe.cost_flops, tokens=self._probe.cost_tokens)
        with self._ledger.clock("probe"):
            found = self._probe.read(self._trainer.accelerator.unwrap_model(self._trainer.model))
        mean = found.mean if math.isfinite(found.mean) else None
        position = self._plan.budget.share(spent)
        self._readings.append(Reading(step, position, mean, found.paired_delta, found.paired_se, learning_rate))

    def spent(self) -> dict[str, float]:
        """What the run has spent by its own ledger."""
        return self._known(self._trainer.ledger.spent())

    def arrive(self, ended: str) -> Advance:
        """The slice did steps: keep the model, read it and note the checkpoint to go on from."""
        trainer, spent = self._trainer, self.spent()
        step = trainer.state.global_step
        trainer.save_model()
        if not ended:
            _tell(trainer)
        self.read(step, spent, float(trainer.lr_scheduler.get_last_lr()[0]))
        name = f"checkpoint-{step}"
        if not ended and not is_complete(self.folder / name):
            raise PlanError(f"{trainer.args.output_dir!r} kept no checkpoint; race with save_strategy='steps'.")
        return replace(self.outcome(step, spent, ended=ended), checkpoint=name)

    def outcome(self, steps: int, spent: Mapping[str, float], *, ended: str = "", failed: bool = False) -> Advance:
        """The slice, with the readings taken in it."""
        return Advance(
            steps=steps,
            spent=dict(spent),
            reading_spent=self._known(self._ledger.spent()),
            readings=tuple(self._readings),
            probe=self._probe.state_dict(),
            ended=ended,
            failed=failed,
        )

    def _known(self, amounts: Mapping[str, float]) -> dict[str, float]:
        return {name: amounts[name] for name in self._names if name in amounts}


def held_out(trainer: Any, plan: RacePlan) -> GainProbe:
    """The examples that all runs are read on: drawn from the race's seed, whatever the run's own is.

    Raises:
        DataError: There are none.
    """
    facts = model_facts(trainer.accelerator.unwrap_model(trainer.model))
    rows, _ = reference_rows(trainer, trainer.selection_stage.unpacked_reference)
    return GainProbe(
        rows,
        scoring_collator(trainer),
        is_causal_lm=facts.is_causal_lm,
        num_examples=plan.examples,
        seed=plan.seed,
        forward_flops=lambda height, length: forward_flops(facts, BatchShape(height, length)),
    )


def _tell(trainer: Any) -> None:
    """Let the run's report say that the race paused it: no limit of its own was reached."""
    report = trainer.report
    report["binding"] = {**report["binding"], "stopped_by": "race"}
    report["governor"] = {"ended": "the race: its turn was over"}
    RunDirectory(trainer.args.output_dir).write_report(report)


def _end(trainer: Any, gate: Slice) -> str:
    """Why a run cannot go on after this slice; empty where only the slice is over."""
    stop = trainer.budgeted_run.stop
    if stop.action == "continue":
        return "all its steps are done"
    currency = stop.details.get("currency")
    if currency is None:
        return f"its governor: {stop.reason}"
    return "" if gate.is_fence(currency) else f"its own limit of {currency} is reached"
