"""A governor for people who only add a callback to a stock trainer."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import batch_shape, model_facts, token_counts
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.engines.ranks import Ranks
from hf_eff.errors import CheckpointError, EffWarning, PlanError
from hf_eff.files import write_json
from hf_eff.governor import GovernorLog
from hf_eff.hardware.ledger import Ledger
from hf_eff.numerics.flops import forward_flops, recompute_flops, training_flops
from hf_eff.options import EffOptions, resolve_options
from hf_eff.supervisor import Supervisor

logger = logging.getLogger(__name__)
STATE_FILE = "hf_eff_governor.json"


class GovernorCallback(TrainerCallback):
    """Budget and governor on any ``Trainer``, TRL's included.

    A callback sees a step only after it was computed. It stops before a step that is predicted, from
    the most expensive one so far, to pass a limit; a larger batch than any before can still pass it,
    by that one step. The trainers of this package have no such gap.

    Args:
        governor: Name of a governor; None means ``"budget"``.
        budget: Limits such as ``"2h, 3e15flop"``.
        governor_kwargs: Options of the governor.
        mode: ``"act"``, ``"advise"`` or ``"observe"``.
        eval_dataset: Tokenised held-out rows, for governors that probe.
        data_collator: Collates those rows.
        price_per_hour: USD per hour of this machine.
        log_path: Where to write the audit log; None for none.

    Raises:
        UnknownMethodError: The governor is not registered.
        OptionError: An option or the budget is malformed.
        PlanError: The governor probes and no ``eval_dataset`` or ``data_collator`` was given.
    """

    def __init__(
        self,
        governor: str | None = None,
        *,
        budget: str | None = None,
        governor_kwargs: Mapping[str, Any] | None = None,
        mode: str = "act",
        eval_dataset: Any = None,
        data_collator: Callable[..., Any] | None = None,
        price_per_hour: float | None = None,
        log_path: str | Path | None = None,
    ) -> None:
        options = EffOptions(
            governor=governor,
            budget=budget,
            governor_kwargs=dict(governor_kwargs or {}),
            governor_mode=mode,
            price_per_hour=price_per_hour,
        )
        self._resolved = resolve_options(options)
        self._rows: Any = eval_dataset
        self._collate: Any = data_collator
        self._log_path = log_path
        if self._probes and (eval_dataset is None or data_collator is None):
            raise PlanError(
                f"{self._resolved.governor.spec.address} probes a target; pass eval_dataset=... (tokenised rows) and "
                "data_collator=... to GovernorCallback."
            )
        self.ledger = Ledger(self._resolved.budget, price_per_hour)
        self.stop_reason: str | None = None
        self._largest: dict[str, float] = {}
        self._pending: list[Mapping[str, Any]] = []

    @property
    def _probes(self) -> bool:
        return self._resolved.governor.spec.traits.needs_reference_set

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the model's shapes, watch its forwards, resume where a checkpoint left off."""
        model: nn.Module = kwargs["model"]
        self._facts = model_facts(model)
        self._checkpointing = bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
        self._ranks = Ranks()
        self._hook = model.register_forward_pre_hook(self._watch, with_kwargs=True)
        self._supervisor = Supervisor(
            self._resolved.governor.build(),
            self.ledger,
            self._ranks,
            compute_limit=float("inf"),
            max_steps=state.max_steps,
            probe=self._probe(args) if self._probes else None,
            log=GovernorLog(self._log_path) if self._log_path is not None else None,
        )
        if state.global_step > 0:
            self._restore(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        elif self._supervisor.log is not None and self._ranks.is_first:
            self._supervisor.log.start({"governor": self._resolved.governor.spec.name})
        self._clock = self.ledger.clock("train")
        self._clock.__enter__()

    def _probe(self, args: Any) -> GainProbe:
        config, limit = self._resolved.governor.config, self._resolved.budget.limits.get("flops")
        allowance = getattr(config, "probe_allowance", None)
        return GainProbe(
            self._rows,
            self._collate,
            is_causal_lm=self._facts.is_causal_lm,
            num_examples=getattr(config, "num_examples", 128),
            max_flops=allowance(limit) if allowance is not None and limit is not None else math.inf,
            seed=args.seed,
            forward_flops=lambda batch, length: forward_flops(self._facts, BatchShape(batch, length)),
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            gather=self._ranks.gather,
        )

    def _watch(self, module: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if module.training:
            inputs = dict(named)
            if positional:
                inputs.setdefault("input_ids", positional[0])
            shape = batch_shape(inputs, self._facts)
            flops = training_flops(self._facts, shape)
            flops += recompute_flops(self._facts, shape) if self._checkpointing else 0.0
            two_stacks = self._facts.is_encoder_decoder
            counts = token_counts(inputs, self._facts.is_causal_lm, is_encoder_decoder=two_stacks)
            self._pending.append(
                {
                    "flops": flops,
                    "tokens": counts["paid"],
                    "useful_tokens": counts["useful"],
                    "loss_tokens": counts["loss"],
                }
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Charge the step that was computed; stop if another one as large would not fit."""
        names = ("flops", "tokens", "useful_tokens", "loss_tokens")
        spent = self._ranks.sum({name: float(sum(each[name] for each in self._pending)) for name in names})
        self._pending.clear()
        self.ledger.charge("train", steps=1, **spent)
        self._largest = {name: max(spent[name], self._largest.get(name, 0.0)) for name in ("flops", "tokens")}
        if not math.isfinite(self._supervisor.compute_limit):
            # Without a budget the horizon is the planned run, at the pace of its first step.
            self._supervisor.compute_limit = spent["flops"] * state.max_steps
        passed = self._ranks.broadcast(self.ledger.need_fits({**self._largest, "steps": 1.0}))
        if passed is not None:
            self._end(control, f"budget: another step would pass the {passed} limit")
            return
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        decision = self._supervisor.after_step(state.global_step, kwargs["model"], loss=None, learning_rate=rate)
        if decision.action == "stop":
            self._carry_out(control, decision.reason)

    def _carry_out(self, control: Any, reason: str) -> None:
        mode = self._resolved.options.governor_mode
        if mode == "act":
            self._end(control, reason)
        elif mode == "advise":
            warnings.warn(f"the governor advises to stop: {reason}", EffWarning, stacklevel=2)

    def _end(self, control: Any, reason: str) -> None:
        self.stop_reason = reason
        logger.warning("Training ends: %s.", reason)
        control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put spending and decisions beside the checkpoint."""
        if self._ranks.is_first:
            saved = {
                "ledger": self.ledger.state_dict(),
                "supervisor": self._supervisor.state_dict(),
                "largest": self._largest,
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
        self._supervisor.compute_limit = float(saved["compute_limit"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._hook.remove()
        self._clock.__exit__(None, None, None)
