"""A governor for people who only add a callback to a stock trainer."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.forward_counter import ForwardCounter, SeenForward
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.engines.held_out import HeldOut, HeldOutNumber, held_out_of
from hf_eff.engines.ranks import Ranks
from hf_eff.engines.rollout_cost import rollouts_of, unseen_flops
from hf_eff.engines.step_reserve import StepReserve
from hf_eff.errors import CheckpointError, EffWarning, PlanError
from hf_eff.files import write_json
from hf_eff.governor import GovernorLog
from hf_eff.hardware.energy import ESTIMATED, UNAVAILABLE
from hf_eff.hardware.ledger import COUNTED, Ledger
from hf_eff.options import EffOptions, resolve_options
from hf_eff.scoring_rows import reference_rows, scoring_collator
from hf_eff.supervisor import Supervisor

logger = logging.getLogger(__name__)
STATE_FILE = "hf_eff_governor.json"
_PER_STEP = tuple(name for name in COUNTED if name != "steps")
_TIME_LIKE = ("seconds", "kwh", "usd")


@dataclass(eq=False, repr=False)
class GovernorCallback(TrainerCallback):
    """Budget and governor on any ``Trainer``, TRL's included; it can end a run and do nothing else.

    Every forward of the model is counted as it happens: with its backward in a training step, alone where there are no
    gradients, position by position where a text is generated. A callback sees a step only after it was computed. It
    stops before a step that is predicted, from the most expensive one so far, to pass a limit; a larger step than any
    before can still pass it, by that one step, and so can an evaluation between two steps. The trainers of this
    package have no such gap. Where a trainer generates (GRPO, RLOO), the prediction is the bound for completions of
    the greatest length: advice as well, since it takes prompts to be no longer than the longest so far.

    A reference model other than the trained one is counted exactly when ``trainer`` is given, and otherwise taken to
    be as large as the trained one wherever the arguments say that there is one.

    Args:
        governor: Name of a governor; None means ``"budget"``.
        budget: Limits such as ``"2h, 3e15flop"``, ``"0.5kWh"`` or ``"3e6J"``.
        governor_kwargs: Options of the governor.
        mode: ``"act"``, ``"advise"`` or ``"observe"``.
        objective: What a probing governor wants to see fall: None for the loss of ``eval_dataset`` (the trainer's own
            loss, or its reward, where only ``trainer`` understands the rows), a function of (model, batch) that gives
            one value a row, the name of a metric of generated texts, an ``hf_eff.Objective``, or a ``HeldOut``.
        maximise: Whether a larger objective is better; None for what is usual for it.
        trainer: The trainer, if this callback is added to it afterwards (``trainer.add_callback``). Lends its
            ``eval_dataset``, collator, loss, reward functions and reference model.
        eval_dataset: Tokenised held-out rows, for governors that probe.
        data_collator: Collates those rows.
        price_per_hour: USD per hour of this machine.
        power_watts: Power of this machine at full load. Energy is estimated from it where nothing counts it, and the
            log says so; without it, and without a counter, there is no energy and a budget of it is refused.
        log_path: Where to write the audit log; None for none.

    Attributes:
        ledger: What was spent, by purpose and currency.
        stop_reason: Why the run was ended early, or None.

    Raises:
        UnknownMethodError: The governor is not registered.
        OptionError: An option or the budget is malformed.
        PlanError: The governor probes and there are no rows for it, it does more than stopping, or energy is limited
            and nothing tells it.
    """

    governor: str | None = None
    _: KW_ONLY
    budget: str | None = None
    governor_kwargs: Mapping[str, Any] | None = None
    mode: str = "act"
    objective: Any = None
    maximise: bool | None = None
    trainer: Any = None
    eval_dataset: Any = None
    data_collator: Callable[..., Any] | None = None
    price_per_hour: float | None = None
    power_watts: float | None = None
    log_path: str | Path | None = None
    ledger: Ledger = field(init=False)
    stop_reason: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Resolve the options and open the ledger."""
        options = EffOptions(
            governor=self.governor,
            budget=self.budget,
            governor_kwargs=dict(self.governor_kwargs or {}),
            governor_mode=self.mode,
            price_per_hour=self.price_per_hour,
        )
        self._resolved = resolve_options(options)
        self.ledger = Ledger(self._resolved.budget, self.price_per_hour, power_watts=self.power_watts)
        self._refuse_impossible()
        self._reserve = StepReserve()
        self._largest: dict[str, float] = {}
        self._between = 0.0
        self._longest_prompt = 0
        self._seconds_before = 0.0
        self._quantity: HeldOut | None = None
        self._running = False

    @property
    def _probes(self) -> bool:
        return self._resolved.governor.spec.traits.needs_reference_set

    def _refuse_impossible(self) -> None:
        chosen = self._resolved.governor
        rowless = self.trainer is not None or isinstance(self.objective, HeldOutNumber)
        if self._probes and not rowless and (self.eval_dataset is None or self.data_collator is None):
            raise PlanError(
                f"{chosen.spec.address} probes a target; pass eval_dataset=... (tokenised rows) and "
                "data_collator=..., or trainer=..., to GovernorCallback."
            )
        if getattr(chosen.config, "actions", "") or getattr(chosen.config, "cooldown", 0.0):
            raise PlanError(
                f"{chosen.spec.address} has actions or a cooldown, and a callback can only end a run; use one of this "
                "package's trainers, or leave both out."
            )
        if "kwh" in self._resolved.budget.limits and self.ledger.energy_source == UNAVAILABLE:
            raise PlanError(
                "budget limits energy and nothing here counts it; pip install 'hf_eff[energy]' on a machine with "
                "counters, or pass power_watts=... for an estimate."
            )

    # The ends of a run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the model's shapes, watch forwards, resume where a checkpoint left off."""
        self._args, model = args, kwargs["model"]
        self._checkpointing = bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
        self._ranks = Ranks()
        others = _further_models(self.trainer)
        self._sees_reference = any(each is getattr(self.trainer, "ref_model", None) for each in others)
        self._counter = ForwardCounter(model, others, checkpointing=self._checkpointing)
        self._supervisor = Supervisor(
            self._resolved.governor.build(),
            self.ledger,
            self._ranks,
            compute_limit=float("inf"),
            max_steps=state.max_steps,
            probe=self._probe(kwargs.get("processing_class")) if self._probes else None,
            log=GovernorLog(self.log_path) if self.log_path is not None else None,
        )
        if state.global_step > 0:
            self._restore(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        elif self._supervisor.log is not None and self._ranks.is_first:
            self._supervisor.log.start(self._facts())
        self._clock = self.ledger.clock("train")
        self._clock.__enter__()
        self._seconds_before = self.ledger.spent()["seconds"]
        self._running = True

    def _probe(self, tokenizer: Any) -> GainProbe:
        config, limit = self._resolved.governor.config, self._resolved.budget.limits.get("flops")
        allowance, facts = getattr(config, "probe_allowance", None), self._counter.facts
        rows, collate = self._held_out_rows()
        quantity = held_out_of(
            self.objective,
            is_causal_lm=facts.is_causal_lm,
            rows=rows,
            trainer=self.trainer,
            tokenizer=tokenizer,
            maximise=self.maximise,
        )
        self._quantity = quantity
        return GainProbe(
            rows,
            collate,
            is_causal_lm=facts.is_causal_lm,
            quantity=quantity,
            num_examples=getattr(config, "num_examples", 128),
            max_flops=allowance(limit) if allowance is not None and limit is not None else math.inf,
            seed=self._args.seed,
            forward_flops=lambda batch, length: quantity.flops(facts, BatchShape(batch, length)),
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            gather=self._ranks.gather,
        )

    def _held_out_rows(self) -> tuple[Any, Any]:
        """Rows and their collator, the trainer's where none were given."""
        if isinstance(self.objective, HeldOutNumber):
            return [{}], list
        rows, collate = self.eval_dataset, self.data_collator
        if self.trainer is not None:
            rows = reference_rows(self.trainer, {})[0] if rows is None else rows
            collate = scoring_collator(self.trainer) if collate is None else collate
        return rows, collate

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching, and end the log."""
        self._running = False
        self._between += self._counter.take()[0]["flops"]
        self._charge_between()
        self._counter.remove()
        self._clock.__exit__(None, None, None)
        if self._supervisor.log is not None and self._ranks.is_first and self._supervisor.log.path.is_file():
            ended = {"steps": state.global_step, "ended": self.stop_reason or ""}
            self._supervisor.log.finish({**ended, "by_purpose": self.ledger.by_purpose()})

    def _facts(self) -> dict[str, Any]:
        """What the log's header says."""
        governor = self._resolved.governor
        facts: dict[str, Any] = {
            "governor": governor.spec.name,
            "governor_kwargs": governor.config.to_dict(),
            "energy": self.ledger.energy_source,
        }
        return facts if self._quantity is None else {**facts, "objective": self._quantity.facts()}

    # Around steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set apart what ran since the last step."""
        self._between += self._counter.take()[0]["flops"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Charge the step that was computed; stop if another one like it might not fit."""
        amounts, seen = self._counter.take()
        self._note_prompts(seen)
        is_peft = self._counter.facts.is_peft
        amounts["flops"] += unseen_flops(args, seen, sees_reference=self._sees_reference, is_peft=is_peft)
        summed = self._ranks.sum({**amounts, "between": self._between})
        self._between, between = 0.0, summed.pop("between")
        self.ledger.charge("eval", flops=between)
        self.ledger.charge("train", steps=1, **summed)
        now = self.ledger.spent()["seconds"]
        self._reserve.observe(now - self._seconds_before)
        self._seconds_before = now
        self._largest = {name: max(summed[name], self._largest.get(name, 0.0)) for name in ("flops", "tokens")}
        if not math.isfinite(self._supervisor.compute_limit):
            # Without a budget the horizon is the planned run, at the pace of its first step.
            self._supervisor.compute_limit = summed["flops"] * state.max_steps
        if not self._fits_another(control):
            return
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        with self._counter.paused():  # a probe is charged by what it says it costs
            decision = self._supervisor.after_step(state.global_step, kwargs["model"], loss=None, learning_rate=rate)
        if decision.action == "stop":
            self._carry_out(control, decision.reason)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Charge the evaluation; stop if another step might not fit now."""
        if self._running and not control.should_training_stop:
            self._between += self._counter.take()[0]["flops"]
            self._charge_between()
            self._fits_another(control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the spent part of each limit; the largest one binds."""
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs or not self._running:
            return
        entries = {f"eff/share_{currency}": share for currency, share in self.ledger.shares().items()}
        spent = self.ledger.spent()
        entries["eff/flops"] = spent["flops"]
        if "kwh" in spent:
            name = "eff/kwh_estimated" if self.ledger.energy_source == ESTIMATED else "eff/kwh"
            entries[name] = spent["kwh"]
        logs.update(entries)
        if state.log_history:
            state.log_history[-1].update(entries)

    def _note_prompts(self, seen: list[SeenForward]) -> None:
        """Keep the longest prompt: a first forward into an empty cache; without one, no row is longer than it ran."""
        starts = [each.shape.length for each in seen if each.is_policy and each.cached == 0]
        whole = [each.shape.length for each in seen if each.is_policy and each.cached is None]
        self._longest_prompt = max([self._longest_prompt, *(starts or whole)])

    def _charge_between(self) -> None:
        summed = self._ranks.sum({"flops": self._between})
        self._between = 0.0
        self.ledger.charge("eval", **summed)

    def _fits_another(self, control: Any) -> bool:
        passed = self._ranks.broadcast(self.ledger.need_fits(self._need()))
        if passed is not None:
            self._end(control, f"budget: another step would pass the {passed} limit")
        return passed is None

    def _need(self) -> dict[str, float]:
        """What the next step may take: as much as the largest so far, or a generating trainer's bound."""
        need = {**self._largest, "steps": 1.0}
        rollouts = rollouts_of(self._args)
        if rollouts is not None:
            bound = rollouts.bound(self._counter.facts, self._longest_prompt, checkpointing=self._checkpointing)
            need["flops"] = max(need.get("flops", 0.0), bound * self._ranks.size)
        spent = self.ledger.spent()
        for currency in _TIME_LIKE:
            if spent["seconds"] and currency in spent:
                need[currency] = self._reserve.reserve() * spent[currency] / spent["seconds"]
        return need

    def _carry_out(self, control: Any, reason: str) -> None:
        if self.mode == "act":
            self._end(control, reason)
        elif self.mode == "advise":
            warnings.warn(f"the governor advises to stop: {reason}", EffWarning, stacklevel=2)

    def _end(self, control: Any, reason: str) -> None:
        self.stop_reason = reason
        logger.warning("Training ends: %s.", reason)
        control.should_training_stop = True

    # Checkpoints

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put spending and decisions beside the checkpoint."""
        if self._ranks.is_first:
            saved = {
                "ledger": self.ledger.state_dict(),
                "supervisor": self._supervisor.state_dict(),
                "largest": self._largest,
                "longest_prompt": self._longest_prompt,
                "reserve": self._reserve.state_dict(),
                "compute_limit": self._supervisor.compute_limit,
            }
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE, saved)

    def _restore(self, folder: Path, step: int) -> None:
        path = folder / STATE_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{str(folder)!r} holds no {STATE_FILE}, so what was spent before is unknown; resume from a checkpoint "
                "that was written with GovernorCallback."
            )
        saved = json.loads(path.read_text(encoding="utf-8"))
        self.ledger.load_state_dict(saved["ledger"])
        self._supervisor.load_state_dict(saved["supervisor"], step)
        self._largest = saved["largest"]
        self._longest_prompt = int(saved.get("longest_prompt", 0))
        self._reserve.load_state_dict(saved.get("reserve", {"seconds": []}))
        self._supervisor.compute_limit = float(saved["compute_limit"])


def _further_models(trainer: Any) -> list[nn.Module]:
    """Models that a trainer runs beside the one it trains: its reference and its reward models."""
    found = [getattr(trainer, "ref_model", None), *(getattr(trainer, "reward_funcs", None) or ())]
    return [model for model in found if isinstance(model, nn.Module)]
