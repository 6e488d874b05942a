"""What hf_eff adds to one training run: ledger, budget gate, governor, method state, report."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.contracts.governor import Decision
from hf_eff.engines.best_weights import BestWeights
from hf_eff.engines.cooldown import Cooldown
from hf_eff.engines.facts import batch_shape, token_counts
from hf_eff.engines.log_checkpoint import REPLAY_LOG, replay_log, write_log
from hf_eff.engines.objectives import objective_flops
from hf_eff.engines.ranks import Ranks
from hf_eff.engines.replay_origin import keep_initial_adapter, origin_of
from hf_eff.engines.sidecar import load_state, save_state
from hf_eff.engines.step_reserve import StepReserve
from hf_eff.errors import CheckpointError, EffWarning, TrainingDivergedError
from hf_eff.hardware.ledger import Ledger
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.hardware.probe import current_bytes, set_memory_cap
from hf_eff.numerics.flops import recompute_flops
from hf_eff.plan_reallocation import cooldown_share, keeps_best
from hf_eff.rescue import Rescue
from hf_eff.supervisor import Supervisor
from hf_eff.units import format_amount

if TYPE_CHECKING:
    import torch

    from hf_eff.contracts.cost import ModelFacts
    from hf_eff.contracts.memory import BatchShape, StepContext
    from hf_eff.engines.objectives import Objective
    from hf_eff.engines.replay_log import ReplayLog
    from hf_eff.memory import MemoryStack
    from hf_eff.plan import Plan
    from hf_eff.reallocation import Reallocation
    from hf_eff.run_directory import RunDirectory

logger = logging.getLogger(__name__)
STATE_VERSION = 1
_DIVERGED_AFTER = 3
_MEASURED_STEPS = 2
"""Optimizer state exists from the end of the first step, so the second one shows the peak."""
_TIME_LIKE = ("seconds", "usd", "kwh")
_CONTINUE = Decision("continue", "no rule applies")
_RISES = 0.95
"""Probability of a risen loss above which the end of a run puts the best weights back."""


class BudgetedRun:
    """State of one ``train()`` call. The trainer mixin only forwards to it.

    Args:
        plan: What was planned.
        memory: The memory methods at work.
        model: Shapes of the model as it trains, adapters included.
        directory: Where plan, log and report go.
        objective: What is made smaller instead of the loss, or None.
        trained_names: Names of the parameters that the run trains.

    Attributes:
        cooldown: The end at a falling learning rate that is kept in reserve, or None.
        best: The weights of the best probe, or None where they are not kept.
        weights_of_step: The step whose weights the model holds, where it is not the last one.
    """

    def __init__(
        self,
        plan: Plan,
        memory: MemoryStack,
        model: ModelFacts,
        directory: RunDirectory,
        objective: Objective | None = None,
        trained_names: Collection[str] = (),
    ) -> None:
        self.plan = plan
        self.objective = objective
        self.model = model
        self.memory = memory
        self.directory = directory
        self.ranks = Ranks()
        options = plan.resolved.options
        self.ledger = Ledger(plan.resolved.budget, options.price_per_hour, power_watts=options.power_watts)
        self.reserve = StepReserve()
        self.rescue = Rescue(plan, memory, model, self._charge_again)
        self.supervisor: Supervisor | None = None
        self.reallocation: Reallocation | None = None
        self.trained_names = frozenset(trained_names)
        share = cooldown_share(plan.resolved)
        self.cooldown = Cooldown(share, plan.steps or 0) if share > 0 else None
        self.best = self._best_weights()
        self.weights_of_step: int | None = None
        self.saved_rows: Mapping[str, Any] | None = None
        self.selection_digest: str | None = None
        self.stop = _CONTINUE
        self.steps_done = 0
        self._spent_before_training: dict[str, float] = {}
        self._methods_state: Mapping[str, Any] = {}
        self._clocks = ExitStack()
        self._bad_losses = 0
        self._advised: set[str] = set()
        self._loss: torch.Tensor | None = None
        self._seconds_before_step = 0.0
        self._meter: MemoryMeter | None = None
        self._steps_measured = 0
        self.memory_measured: dict[str, Any] = {}

    def _best_weights(self) -> BestWeights | None:
        # A log of updates leads to the last weights and to no others.
        keeps = keeps_best(self.plan.resolved, self.plan.facts) and self.replay_log is None
        return BestWeights(self.directory.path, self.trained_names, self.ranks) if keeps else None

    # The budget

    def admit(self, batches: Sequence[Mapping[str, Any]], global_step: int) -> bool:
        """Charge the next optimizer step if every limit allows it; otherwise note why the run ends."""
        shapes = [batch_shape(batch, self.model) for batch in batches]
        need = self.ranks.sum({**self._tokens(batches), "flops": self.step_flops(shapes, global_step)})
        full = self._with_time(need)
        passed = self.ranks.broadcast(self.ledger.need_fits(full))
        if passed is not None:
            limit = format_amount(passed, self.ledger.budget.limits[passed])
            return self._ends(global_step, f"budget: the next step would pass {limit}", {"currency": passed})
        if self.cooldown is not None and not self._admitted(self.cooldown, full, global_step):
            return False
        self._seconds_before_step = self.ledger.spent()["seconds"]
        self.ledger.charge("train", steps=1, **need)
        return True

    def _ends(self, step: int, reason: str, details: Mapping[str, Any]) -> bool:
        """Note why the run ends; always False."""
        self.stop = Decision("stop", reason, details)
        logger.warning("Training ends at step %d: %s.", step, reason)
        return False

    # The cooldown

    @property
    def cooling(self) -> bool:
        """Whether the learning rate is being lowered for the end."""
        return self.cooldown is not None and self.cooldown.active

    def rate_factor(self) -> float:
        """What the schedule's rate is multiplied by, in [0, 1]."""
        return 1.0 if self.cooldown is None else self.cooldown.factor

    def with_reserve(self, need: Mapping[str, float]) -> Mapping[str, float]:
        """What has to be left for ``need`` and for a cooldown after it."""
        return need if self.cooldown is None else self.cooldown.with_reserve(need, self.ledger.spent())

    def _admitted(self, cooldown: Cooldown, full: Mapping[str, float], step: int) -> bool:
        """Begin the cooldown where one more step would eat into it; end it when its compute is spent."""
        assert self.supervisor is not None  # noqa: S101 - a governor asked for the cooldown
        spent = self.ledger.spent()
        after = {name: spent.get(name, 0.0) + full.get(name, 0.0) for name in {*spent, *full}}
        passed = None if cooldown.active else self.ledger.need_fits(self.with_reserve(full))
        by_steps = passed is None and cooldown.is_due(step)
        now, then = self.supervisor.compute(spent), self.supervisor.compute(after)
        passed, by_steps, now, then = self.ranks.broadcast((passed, by_steps, now, then))
        if passed is not None or by_steps:
            cooldown.begin(step, now, binding=passed, by_steps=by_steps)
            why = "the planned steps end" if passed is None else f"no more {passed} to spare"
            logger.warning("From step %d on the learning rate is lowered: %s.", step, why)
        if cooldown.is_over(then):
            details = {"currency": cooldown.binding} if cooldown.binding is not None else {}
            return self._ends(step, "the learning rate has been lowered to its end", details)
        cooldown.advance(step + 1, then)
        return True

    def _charge_again(self, contexts: Sequence[StepContext]) -> None:
        """Charge micro-batches that are done again because memory ran out.

        Raises:
            BudgetExceededError: The budget has no FLOPs or tokens left for another attempt.
        """
        step = contexts[-1].global_step
        flops = self.step_flops([batch_shape(each.inputs, self.model) for each in contexts], step)
        need = {**self._tokens([each.inputs for each in contexts]), "flops": flops}
        what = f"a further attempt at optimizer step {step}, which did not fit in memory,"
        self.ledger.require({"flops": flops, "tokens": need["tokens"]}, what)
        self.ledger.charge("train", **need)

    def _tokens(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        two_stacks = self.model.is_encoder_decoder
        counts = [token_counts(batch, self.model.is_causal_lm, is_encoder_decoder=two_stacks) for batch in batches]
        names = {"paid": "tokens", "useful": "useful_tokens", "loss": "loss_tokens"}
        return {name: float(sum(count[key] for count in counts)) for key, name in names.items()}

    def step_flops(self, shapes: Sequence[BatchShape], global_step: int) -> float:
        """FLOPs of these micro-batches on this rank, recomputation by checkpointing included."""
        if self.objective is not None:
            of_forwards = partial(self.memory.step_flops, self.model, global_step=global_step)
            return objective_flops(self.objective, self.model, shapes, of_forwards)
        flops = self.memory.step_flops(self.model, shapes, global_step)
        differentiates = all(chosen.spec.traits.needs_backward for chosen in self.plan.resolved.memory)
        run = self.plan.training_facts.run
        if self.rescue.recomputes and differentiates:
            flops += sum(recompute_flops(self.model, shape) for shape in shapes) / run.checkpoint_every
        return flops

    def _with_time(self, need: Mapping[str, float]) -> dict[str, float]:
        """What one more step takes in every limited currency. Time-like ones are reserved, not known."""
        spent = self.ledger.spent()
        full = {"flops": need["flops"], "tokens": need["tokens"], "steps": 1.0, "bytes": spent.get("bytes", 0.0)}
        seconds = spent.get("seconds", 0.0)
        for currency in _TIME_LIKE:
            if seconds and currency in spent:
                full[currency] = self.reserve.reserve() * spent[currency] / seconds
        return full

    @property
    def limits_progress(self) -> bool:
        """Whether a limit other than memory decides how far the run gets."""
        return any(currency != "bytes" for currency in self.ledger.budget.limits)

    def progress(self) -> float:
        """Share of the scarcest additive limit that training has spent of what it found, in [0, 1]."""
        spent = self.ledger.spent()
        shares = []
        for currency, limit in self.ledger.budget.limits.items():
            before = self._spent_before_training.get(currency, 0.0)
            if currency != "bytes" and limit > before:
                shares.append((spent.get(currency, 0.0) - before) / (limit - before))
        return min(1.0, max(shares, default=0.0))

    # Around steps

    def open(self) -> None:
        """Selection is over and training is next: what is spent from here on is training."""
        if not self._spent_before_training:
            self._spent_before_training = self.ledger.spent()
        if self.supervisor is not None:
            self.supervisor.spent_before = self._spent_before_training
            self.supervisor.with_reserve = self.with_reserve
        self._clocks.enter_context(self.ledger.clock("train"))
        cap = self.ledger.budget.limits.get("bytes")
        if cap is not None:
            idle = max(0.0, current_bytes() - self.plan.bytes["weights"])
            self.rescue.expect(cap - idle)
            set_memory_cap(cap)
            self._clocks.callback(set_memory_cap, None)

    def training_begins(self, model: Any) -> None:
        """The memory methods have begun: switches of the run before, and how the pool ranks now."""
        self.rescue.train_begin(model)
        if self.supervisor is not None and self.supervisor.drift is not None and self.steps_done == 0:
            self.supervisor.note_drift(model)

    def window_begins(self, step: int, model: Any) -> None:
        """The loop takes the next window of rows, or an epoch."""
        if self.reallocation is not None:
            self.reallocation.at_window(step, model)

    @contextmanager
    def measured(self, model: Any) -> Iterator[None]:
        """Measure the memory terms of the first steps; later ones run unobserved."""
        if self._meter is None and self._steps_measured == 0:
            self._meter = MemoryMeter(model)
        if self._meter is None:
            yield
            return
        with self._meter.forward_backward():
            yield

    def _finish_measuring(self, optimizer: Any) -> None:
        if self._meter is None:
            return
        self._meter.observe(optimizer)
        self._steps_measured += 1
        if self._steps_measured == _MEASURED_STEPS:
            self.memory_measured = {"bytes": self._meter.peak_bytes(), "peak_bytes": self._meter.total_bytes()}
            self._meter = None

    def note_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of one micro-batch to the current step's."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def finish_step(self, step: int, model: Any, optimizer: Any, learning_rate: float) -> Decision:
        """After the optimizer step: watch for divergence, measure it, ask the governor.

        Returns:
            The decision to carry out: ``continue`` unless the governor may act.

        Raises:
            TrainingDivergedError: The loss was NaN or infinite for several steps in a row.
        """
        self.steps_done = step
        loss = None if self._loss is None else float(self._loss)
        self._loss = None
        self._watch(step, loss)
        self._finish_measuring(optimizer)
        self.reserve.observe(self.ledger.spent()["seconds"] - self._seconds_before_step)
        if self.supervisor is None:
            return _CONTINUE
        decision = self.supervisor.after_step(step, model, loss=loss, learning_rate=learning_rate)
        if self.best is not None and self.supervisor.level is not None:
            with self.ledger.clock("save"):
                self.best.offer(self.supervisor.level, step, model)
        return self._effective(decision, step, model)

    def _effective(self, decision: Decision, step: int, model: Any) -> Decision:
        """Carry a decision out, or say it, as the mode has it."""
        if decision.action == "continue":
            return decision
        mode, name = self.plan.resolved.options.governor_mode, f"{decision.action} {decision.target}".strip()
        if mode == "act":
            return self._carry_out(decision, step, model)
        if mode == "advise" and name not in self._advised:
            self._advised.add(name)  # once: a verdict that holds is repeated at every step
            text = f"at step {step} the governor advises to {name}: {decision.reason}"
            warnings.warn(text, EffWarning, stacklevel=2)
        return _CONTINUE

    def settle(self, model: Any) -> None:
        """Training is over: where the held-out loss is surely above its best, put the weights of that probe back."""
        probe = self.supervisor.probe if self.supervisor is not None else None
        if self.best is None or probe is None or self.weights_of_step is not None:
            return
        if max(self.stop.details.get("probability_rising", 0.0), probe.chance_above_best) > _RISES:
            with self.ledger.clock("save"):
                self.weights_of_step = self.best.restore(model)
            if self.weights_of_step is not None:
                logger.warning("The held-out loss has risen: the model has step %d's weights.", self.weights_of_step)

    def _carry_out(self, decision: Decision, step: int, model: Any) -> Decision:
        """Do what the governor decided; what is left for the trainer is to go on or to stop."""
        if decision.action == "cooldown" and self.cooldown is not None:
            self._cool_down(self.cooldown, decision, step)
            return _CONTINUE
        if decision.action in ("stop", "cooldown"):
            self.stop = dataclasses.replace(decision, action="stop")
            logger.warning("Governor ends training at step %d: %s.", step, decision.reason)
            return self.stop
        if self.reallocation is not None:
            self.reallocation.take(decision, step, model)
        return _CONTINUE

    def _cool_down(self, cooldown: Cooldown, decision: Decision, step: int) -> None:
        if self.supervisor is not None and not cooldown.active:
            cooldown.begin(step, self.ranks.broadcast(self.supervisor.compute()))
            logger.warning("From step %d on the learning rate is lowered: %s.", step, decision.reason)

    def _watch(self, step: int, loss: float | None) -> None:
        finite = loss is None or loss - loss == 0.0
        self._bad_losses = 0 if finite else self._bad_losses + 1
        if self._bad_losses >= _DIVERGED_AFTER:
            raise TrainingDivergedError(
                f"the loss is {loss} for {self._bad_losses} steps in a row, the last one step {step}; lower the "
                "learning rate or check the data, and resume from an earlier checkpoint."
            )

    def log_entries(self) -> dict[str, float]:
        """Entries for the training log, all under ``eff/``."""
        spent = self.ledger.spent()
        entries = {f"eff/{name}": spent[name] for name in ("flops", "tokens") if name in spent}
        if self.limits_progress:
            entries["eff/budget_share"] = self.ledger.share()
            entries.update({f"eff/share_{name}": share for name, share in self.ledger.shares().items()})
        return {**entries, **{f"eff/{key}": value for key, value in self.memory.log_entries().items()}}

    # The replay log of a zeroth-order run

    @property
    def replay_log(self) -> ReplayLog | None:
        """What the weights can be rebuilt from, or None where no method keeps a log."""
        return replay_log(self.memory.parts)

    @property
    def saves_log(self) -> bool:
        """Whether checkpoints hold the log instead of weights."""
        return any(getattr(chosen.config, "save", None) == "log" for chosen in self.plan.resolved.memory)

    def note_origin(self, model: Any, step: int) -> None:
        """Say in the log where the weights come from, at the start of training, and keep what no seed makes again."""
        log = self.replay_log
        if log is None or log.header.origin:
            return
        changing = self.memory.model_changes
        log.header = dataclasses.replace(log.header, origin=origin_of(model, log.header, changing))
        if step == 0 and self.ranks.is_first:
            keep_initial_adapter(model, log.header, self.directory.path)

    def write_log(self, folder: Path, model: Any) -> None:
        """Write the log and the digest of the weights that it leads to."""
        if self.replay_log is not None:
            write_log(folder / REPLAY_LOG, self.replay_log, model)

    def end(self) -> None:
        """End of training, normal or not."""
        self.rescue.train_end()
        self.memory.train_end()
        self._clocks.close()

    # State

    def save(self, folder: str | Path, step: int) -> None:
        """Write the side-car of a checkpoint (rank 0)."""
        state = {
            "format": "hf_eff.state",
            "format_version": STATE_VERSION,
            "step": step,
            "methods": self._methods(),
            "pool_rows": self.plan.facts.pool.num_rows,
            "selection_digest": self.selection_digest,
            "ledger": self.ledger.state_dict(),
            "spent_before_training": self._spent_before_training,
            "reserve": self.reserve.state_dict(),
            "supervisor": self.supervisor.state_dict() if self.supervisor is not None else None,
            "rescue": self.rescue.state_dict(),
            "memory": self.memory.state_dict(),
        }
        parts = {"reallocation": self.reallocation, "cooldown": self.cooldown, "best": self.best}
        state |= {name: part.state_dict() for name, part in parts.items() if part is not None}
        save_state(folder, state)

    def restore(self, folder: str | Path) -> None:
        """Read a side-car: the ledger at once, the methods when their owners exist.

        Raises:
            CheckpointError: It belongs to other methods, another pool or another version.
        """
        state = load_state(folder)
        if state is None or state.get("format_version") != STATE_VERSION:
            raise CheckpointError(f"{str(folder)!r} holds no hf_eff state of version {STATE_VERSION}.")
        if state["methods"] != self._methods():
            raise CheckpointError(
                f"the checkpoint was written with {state['methods']} and this run has {self._methods()}; use the same "
                "methods and options, or start anew."
            )
        if state["pool_rows"] != self.plan.facts.pool.num_rows:
            raise CheckpointError(
                f"the checkpoint was trained on a pool of {state['pool_rows']} rows and this one has "
                f"{self.plan.facts.pool.num_rows}; resume with the same dataset."
            )
        self.selection_digest = state["selection_digest"]
        self.steps_done = int(state["step"])
        self._spent_before_training = dict(state["spent_before_training"])
        self._methods_state = state
        self.saved_rows = state.get("reallocation", {}).get("rows")
        self.ledger.load_state_dict(state["ledger"])
        self.reserve.load_state_dict(state["reserve"])

    def load_methods(self) -> None:
        """Hand saved state to the memory methods and the governor, before the optimizer loads its own."""
        state = self._methods_state
        self.rescue.load_state_dict(state["rescue"])
        self.memory.load_state_dict(state["memory"], self.steps_done)
        if self.supervisor is not None and state["supervisor"] is not None:
            self.supervisor.load_state_dict(state["supervisor"], self.steps_done)
        parts = {"reallocation": self.reallocation, "cooldown": self.cooldown, "best": self.best}
        for name, part in parts.items():
            if part is not None and name in state:
                part.load_state_dict(state[name])

    def _methods(self) -> dict[str, Any]:
        return {f"{each.spec.kind}={each.spec.name}": each.config.to_dict() for each in self.plan.resolved.methods}
