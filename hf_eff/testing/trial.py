"""A tiny real training with one method, through the public trainers: run it, cut it, resume it, compare."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PrinterCallback, TrainerCallback

from hf_eff import registry
from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import UnknownMethodError
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tiny_tokenizer, tokenised

AMPLE = "2e9flop"
"""About four times what a trial spends: it does not bind, and a governor finds probes affordable."""
_VOLATILE = ("seconds", "usd", "kwh", "bytes", "time", "wall", "timestamp")


@contextlib.contextmanager
def registered(spec: MethodSpec) -> Iterator[None]:
    """Make a SPEC known under its name for a while, whatever has that name."""
    try:
        known = registry.get_method(spec.kind, spec.name) is spec
    except UnknownMethodError:
        known = False
    if known:
        yield
        return
    registry.register_method(spec, replace=True)
    try:
        yield
    finally:
        registry.unregister_method(spec.kind, spec.name)


@dataclass(frozen=True)
class Outcome:
    """What a training left behind, without anything that a clock decides.

    Attributes:
        steps: Optimizer steps done.
        weights: Parameters by name.
        optimizer: Optimizer state as nested lists.
        spent: Deterministic currencies of the ledger.
        selection: Digest of the selection, or None.
        decisions: The governor's log.
        governor: The governor's state at the end.
    """

    steps: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Any
    spent: Mapping[str, float]
    selection: str | None
    decisions: list[Any]
    governor: Any

    def differences(self, other: Outcome) -> list[str]:
        """Names of the parts that are not equal, bit for bit."""
        parts = ("steps", "optimizer", "spent", "selection", "decisions", "governor")
        wrong = [part for part in parts if getattr(self, part) != getattr(other, part)]
        names = sorted({*self.weights, *other.weights})
        moved = [name for name in names if not _equal(self.weights.get(name), other.weights.get(name))]
        return wrong + ([f"weights ({len(moved)} of {len(names)}: {moved[0]})"] if moved else [])


def _equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


class _StopAt(TrainerCallback):
    """Saves and ends the run after some step, as an interrupted job does that still has time to save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the two flags together, which saves first."""
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@dataclass
class Trial:
    """A method on a toy model and pool.

    Attributes:
        spec: The method; the two other kinds stay at their defaults, with a limit that does not bind.
        folder: Where runs of this trial write, each in its own folder.
        trainer: Over ``Trainer`` or ``SFTTrainer``.
        accumulation: Micro-batches a step.
        max_steps: Length of the run; None is one epoch and two steps.
        arguments: Further training arguments.
    """

    spec: MethodSpec
    folder: Path
    trainer: Literal["trainer", "sft"] = "trainer"
    accumulation: int = 1
    max_steps: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Rows of a micro-batch. A governor sees larger ones, beside which a probe costs little."""
        return 8 if self.spec.kind == "governor" else 2

    @property
    def rows(self) -> int:
        """Rows that are trained on: eight batches an epoch under a governor, else three."""
        return 64 if self.spec.kind == "governor" else 6

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(math.ceil(self.rows / self.batch_size) / self.accumulation)

    def build(self, name: str, **changes: Any) -> Any:
        """A fresh trainer that writes into ``folder / name``."""
        arguments = {
            **self._choice(),
            "output_dir": str(self.folder / name),
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.epoch_steps + 2 if self.max_steps is None else self.max_steps,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 3,
            **self.arguments,
            **changes,
        }
        # Dropout draws from the global generator, so that its state must be restored as well.
        model = tiny_model(layers=2, width=32, attention_dropout=0.1)
        trainer = self._sft(model, arguments) if self.trainer == "sft" else self._plain(model, arguments)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _choice(self) -> dict[str, Any]:
        options = dict(self.spec.tiny)
        names = set(self.spec.config.__dataclass_fields__)
        if self.spec.kind == "selection" and "fraction" in names:
            options = {key: value for key, value in options.items() if key not in ("num_examples", "num_tokens")}
            options["fraction"] = 0.5
        return {self.spec.kind: self.spec.name, f"{self.spec.kind}_kwargs": options, "budget": AMPLE}

    def _rows(self) -> Any:
        halved = self.spec.kind == "selection" and "fraction" in self.spec.config.__dataclass_fields__
        return tiny_pool(2 * self.rows if halved else self.rows)

    def _plain(self, model: Any, arguments: dict[str, Any]) -> Any:
        from hf_eff import BudgetedTrainer, BudgetedTrainingArguments

        tokenizer = tiny_tokenizer()
        return BudgetedTrainer(
            model=model,
            args=BudgetedTrainingArguments(**arguments),
            train_dataset=tokenised(self._rows(), tokenizer),
            eval_dataset=tokenised(tiny_target(), tokenizer),
            data_collator=collator(tokenizer),
            processing_class=tokenizer,
        )

    def _sft(self, model: Any, arguments: dict[str, Any]) -> Any:
        from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer

        return BudgetedSFTTrainer(
            model=model,
            args=BudgetedSFTConfig(**{"bf16": False, **arguments}),
            train_dataset=self._rows(),
            eval_dataset=tiny_target(),
            processing_class=tiny_tokenizer(),
        )

    def whole(self) -> Outcome:
        """An uninterrupted run."""
        with registered(self.spec):
            trainer = self.build("whole")
            trainer.train()
            return outcome_of(trainer)

    def interrupted(self, step: int) -> Outcome:
        """A run that saved and stopped after ``step``, and its continuation by a fresh trainer."""
        name = f"stopped-{step}"
        with registered(self.spec):
            first = self.build(name, save_strategy="steps", save_steps=1000)
            first.add_callback(_StopAt(step))
            first.train()
            second = self.build(name, save_strategy="steps", save_steps=1000)
            second.train(resume_from_checkpoint=True)
            return outcome_of(second)


def outcome_of(trainer: Any) -> Outcome:
    """Read a trainer after ``train()``."""
    spent = trainer.ledger.spent() if trainer.ledger is not None else {}
    supervisor = trainer.budgeted_run.supervisor if trainer.budgeted_run is not None else None
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return Outcome(
        steps=trainer.state.global_step,
        weights={name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()},
        optimizer=_plain(optimizer.state_dict()),
        spent={name: amount for name, amount in spent.items() if name in ("flops", "tokens", "steps")},
        selection=trainer.selection.digest if trainer.selection is not None else None,
        decisions=[_settled(json.loads(line)) for line in _log_lines(Path(trainer.args.output_dir))],
        governor=_plain(supervisor.state_dict()) if supervisor is not None else None,
    )


def _log_lines(folder: Path) -> list[str]:
    path = folder / "governor.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _settled(value: Any) -> Any:
    """A log entry without durations, dates and paths."""
    if isinstance(value, dict):
        return {key: _settled(item) for key, item in value.items() if not any(word in key for word in _VOLATILE)}
    return [_settled(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Nested state with tensors as lists, so that it compares by value."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
