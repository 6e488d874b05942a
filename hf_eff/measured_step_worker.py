"""The process behind ``measure_step``: ``python -m hf_eff.measured_step_worker FOLDER`` trains and reports."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PrinterCallback, TrainerCallback, default_data_collator

from hf_eff.arguments import BudgetedTrainingArguments
from hf_eff.contracts.cost import MEMORY_TERMS
from hf_eff.contracts.spec import SLOTS
from hf_eff.engines.facts import trainable_facts
from hf_eff.engines.out_of_memory import is_out_of_memory
from hf_eff.errors import EffError
from hf_eff.files import write_json
from hf_eff.measured_step import MODEL, REQUEST, RESULT
from hf_eff.plan import Plan
from hf_eff.trainer import BudgetedTrainer

STEPS = 2


def main(folder: Path) -> None:
    """Read the request in ``folder`` and write the result beside it."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    try:
        result = run_step(request, folder)
    except (EffError, RuntimeError, MemoryError, ValueError, TypeError, ImportError) as error:
        short = is_out_of_memory(error)
        line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        result = {"failed": f"ran out of memory ({line})" if short else line, "out_of_memory": short}
    write_json(folder / RESULT, result)


def run_step(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train ``STEPS`` optimizer steps through the public trainer.

    Args:
        request: Fields of ``StepRequest`` with ``memory``, ``memory_kwargs``, ``batch_size`` and ``length``.
        folder: Holds the configuration; the run writes here.

    Returns:
        What ``measure_step`` returns.
    """
    model = _model(request, folder / MODEL)
    trainer = BudgetedTrainer(
        model=model,
        args=_arguments(request, folder / "run"),
        train_dataset=random_rows(model, STEPS * request["batch_size"], request["length"]),
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    seen = _Trained()
    trainer.add_callback(seen)
    trainer.train()
    measured = trainer.report["memory"] if trainer.report is not None else {}
    terms = {name: float(measured[name]["measured"]) for name in MEMORY_TERMS}
    plan = trainer.plan
    return {
        "bytes": terms,
        "total": float(measured["peak"]["measured"]),
        "predicted": _predicted(plan, trainer.model, seen.steps) if plan is not None else {},
    }


def _model(request: Mapping[str, Any], folder: Path) -> nn.Module:
    """Random weights; their values do not matter to memory."""
    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, request["architecture"])
    model: nn.Module = kind._from_config(config, dtype=getattr(torch, request["dtype"]))  # noqa: SLF001 - as Auto classes
    frozen = set(request["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model


def _arguments(request: Mapping[str, Any], folder: Path) -> BudgetedTrainingArguments:
    setting = request["setting"]
    names = {each.name for each in dataclasses.fields(BudgetedTrainingArguments)}
    # The older name where transformers does not know the newer one.
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    return BudgetedTrainingArguments(
        output_dir=str(folder),
        memory=request["memory"],
        memory_kwargs=request["memory_kwargs"],
        out_of_memory="raise",
        per_device_train_batch_size=request["batch_size"],
        max_steps=STEPS,
        bf16=setting["bf16"],
        max_grad_norm=setting["max_grad_norm"],
        optim=setting["optim"],
        optim_args=setting["optim_args"],
        optim_target_modules=list(setting["optim_target_modules"]) or None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{checkpointing: setting["activation_checkpointing"]},
    )


def random_rows(model: Any, count: int, length: int) -> list[dict[str, list[int]]]:
    """Rows of ``length`` random tokens that are their own labels; an encoder-decoder gets as long a target."""
    entries = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, entries, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in tokens]


class _Trained(TrainerCallback):
    """Notes which parameters have a gradient when each update begins."""

    def __init__(self) -> None:
        self.steps: list[frozenset[str]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the gradients."""
        self.steps.append(frozenset(name for name, each in model.named_parameters() if each.grad is not None))


def _predicted(plan: Plan, model: Any, steps: Sequence[frozenset[str]]) -> dict[str, float]:
    """Bytes predicted for what trained: of a method that takes turns, for the parts whose turn it was."""
    last = max(plan.resolved.memory, key=lambda chosen: SLOTS["memory"].index(chosen.spec.slot))
    if not last.spec.traits.freezes_parameters or last.spec.adapt is not None or not all(steps):
        return dict(plan.bytes)
    peaks = dict.fromkeys(MEMORY_TERMS, 0.0)
    for names in set(steps):
        part = dataclasses.replace(plan.training_facts.model, trainable=trainable_facts(model, names))
        cost = last.spec.cost(last.config, plan.training_facts.replace(model=part))
        peaks = {term: max(peaks[term], float(cost.bytes.get(term, 0.0))) for term in MEMORY_TERMS}
    return peaks


if __name__ == "__main__":
    main(Path(sys.argv[1]))
