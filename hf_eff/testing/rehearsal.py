"""A training loop in thirty lines that drives a memory method through its contract, without a Trainer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext, StepContext
from hf_eff.contracts.spec import MethodSpec
from hf_eff.engines.facts import model_facts, trainable_facts
from hf_eff.registry import build
from hf_eff.testing.selection_scene import toy_pool
from hf_eff.testing.tiny import collator, tiny_model

Batch = Mapping[str, torch.Tensor]
LEARNING_RATE = 1e-2


def toy_model(seed: int = 0) -> nn.Module:
    """Llama of two layers of 32 units, everything trainable."""
    return tiny_model(layers=2, width=32, seed=seed, attn_implementation="eager")


def toy_batches(count: int, rows: int = 4) -> list[Batch]:
    """Batches of ``rows`` rows over the toy pool, round and round."""
    pool, collate = toy_pool(), collator()
    picks = [[pool.rows[(start * rows + i) % len(pool)] for i in range(rows)] for start in range(count)]
    return [dict(collate([dict(row) for row in chosen])) for chosen in picks]


def split(batch: Batch, parts: int) -> list[Batch]:
    """The rows of a batch as ``parts`` smaller ones."""
    chunks = {name: values.chunk(parts) for name, values in batch.items()}
    return [{name: chunks[name][i] for name in batch} for i in range(parts)]


def loss_tokens(batches: Sequence[Batch]) -> int:
    """Labels that carry loss after the shift."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def token_loss(model: nn.Module, inputs: Batch, num_items: int | None = None) -> torch.Tensor:
    """The model's own loss, summed over tokens and divided by ``num_items`` (the batch's own without one): scalar."""
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    loss: torch.Tensor = model(**inputs, **extra).loss
    return loss


def _stock_step(model: nn.Module, inputs: Batch, num_items: int, **_changes: Any) -> torch.Tensor:
    model.train()
    loss = token_loss(model, inputs, num_items)
    loss.backward()
    return loss.detach()


@dataclass
class Rehearsal:
    """One run of a memory method over given batches.

    Attributes:
        spec: The method.
        seed: Seed of the run.
        lr: Learning rate, constant.
        frozen: Parameters to freeze before the method sees the model.
        options: Changes to ``SPEC.tiny``.
        on_update: Called between backward and the optimizer's step.
    """

    spec: MethodSpec
    seed: int = 0
    lr: float = LEARNING_RATE
    frozen: Collection[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    on_update: Callable[[Rehearsal], None] | None = None
    make_model: Callable[[], nn.Module] = toy_model

    def __post_init__(self) -> None:
        """Prepare the model; the optimizer waits, because a resumed run loads state before it."""
        model = self.make_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        self.method: MemoryMethod = build(self.spec, {**self.spec.tiny, **self.options})
        self.model = self.method.prepare_model(model, self.seed)
        self.candidates = frozenset(name for name, p in self.model.named_parameters() if p.requires_grad)
        self.facts = dataclasses.replace(
            model_facts(self.model), trainable=trainable_facts(self.model, self.candidates)
        )
        self.global_step = 0
        self.optimizer: torch.optim.Optimizer | None = None

    def begin(self) -> Rehearsal:
        """Make the optimizer and open the run."""
        self._make_optimizer()
        self.method.train_begin(self.model, self.global_step)
        return self

    def _make_optimizer(self) -> None:
        context = OptimizerContext(
            model=self.model,
            candidates=self.candidates,
            decay_names=frozenset(),
            optimizer_class=torch.optim.AdamW,
            optimizer_kwargs={"lr": self.lr},
            weight_decay=0.0,
            stock=self._stock_optimizer,
            seed=self.seed,
        )
        self.optimizer = self.method.create_optimizer(context) or self._stock_optimizer()

    def _stock_optimizer(self) -> torch.optim.Optimizer:
        parameters = [parameter for name, parameter in self.model.named_parameters() if name in self.candidates]
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)

    def step(self, window: Sequence[Batch]) -> float:
        """One optimizer step over the micro-batches of ``window``; its loss."""
        if self.optimizer is None:
            self.begin()
        self.method.step_begin(self.global_step)
        num_items = loss_tokens(window)
        total = sum(float(self.method.training_step(self._context(i, window, num_items))) for i in range(len(window)))
        if self.on_update is not None:
            self.on_update(self)
        self.optimizer.step()  # type: ignore[union-attr]
        self.model.zero_grad(set_to_none=True)
        self.global_step += 1
        return total

    def _context(self, micro: int, window: Sequence[Batch], num_items: int) -> StepContext:
        return StepContext(
            model=self.model,
            unwrapped=self.model,
            inputs=window[micro],
            num_items=num_items,
            micro_step=micro,
            micro_steps=len(window),
            global_step=self.global_step,
            stock=_stock_step,
            loss=token_loss,
            mean_over_ranks=lambda value: value,
        )

    def run(self, batches: Sequence[Batch], accumulation: int = 1) -> Rehearsal:
        """Steps over all batches, ``accumulation`` of them a step."""
        for start in range(0, len(batches), accumulation):
            self.step(batches[start : start + accumulation])
        return self

    def end(self) -> Rehearsal:
        """Close the run."""
        self.method.train_end()
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint would hold."""
        if self.optimizer is None:
            self.begin()
        return copy.deepcopy(
            {
                "weights": self.model.state_dict(),
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),  # type: ignore[union-attr]
                "step": self.global_step,
            }
        )

    def restore(self, snapshot: Mapping[str, Any]) -> Rehearsal:
        """Continue a snapshot in this fresh object, in the order the Trainer loads."""
        self.model.load_state_dict(snapshot["weights"])
        self.global_step = snapshot["step"]
        self._make_optimizer()
        self.method.load_state_dict(snapshot["method"], self.global_step)
        self.optimizer.load_state_dict(snapshot["optimizer"])  # type: ignore[union-attr]
        self.method.train_begin(self.model, self.global_step)
        return self

    def shapes(self, window: Sequence[Batch]) -> list[BatchShape]:
        """Shapes of micro-batches."""
        return [BatchShape(*batch["input_ids"].shape) for batch in window]


def differing(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not bit-identical, or that only one side has."""
    names = sorted({*first, *second})
    return [name for name in names if name not in first or name not in second or not _equal(first[name], second[name])]


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second))
