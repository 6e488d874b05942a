"""What a memory method implements. The whole contract fits on a screen; every hook may be left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.contracts.cost import Facts, ModelFacts


@dataclass(frozen=True)
class BatchShape:
    """Shape of one micro-batch.

    Attributes:
        rows: Sequences.
        length: Padded tokens per sequence seen by the decoder (or the only stack).
        encoder_length: Padded source tokens, for encoder-decoder models.
        packed_lengths: Lengths of the documents inside a padding-free row, when attention is
            confined to them.
    """

    rows: int
    length: int
    encoder_length: int = 0
    packed_lengths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens paid for, padding included."""
        return self.rows * (self.length + self.encoder_length)


@dataclass
class OptimizerContext:
    """What a method may use to make its optimizer.

    Attributes:
        model: The unwrapped model.
        candidates: Names of the parameters that were trainable when the trainer was built. A
            method trains these and no others.
        decay_names: Names that get weight decay by transformers' rule.
        optimizer_class, optimizer_kwargs: What ``args.optim`` resolves to (``lr`` included).
        weight_decay: ``args.weight_decay``.
        stock: Builds the optimizer exactly as the parent trainer would.
        seed: Seed of the run; the only source of randomness allowed, combined with the step.
        total_steps: Planned optimizer steps, or 0 when unknown.
        max_grad_norm: ``args.max_grad_norm``; 0 for no clipping.
    """

    model: nn.Module
    candidates: frozenset[str]
    decay_names: frozenset[str]
    optimizer_class: type[torch.optim.Optimizer]
    optimizer_kwargs: Mapping[str, Any]
    weight_decay: float
    stock: Callable[[], torch.optim.Optimizer]
    seed: int
    total_steps: int = 0
    max_grad_norm: float = 0.0


@dataclass
class StepContext:
    """One micro-batch, as ``training_step`` sees it.

    Attributes:
        model: The wrapped model, as the trainer passes it.
        unwrapped: The same without a DDP wrapper.
        inputs: The batch, still to be passed through ``prepare_inputs``.
        num_items: Loss tokens in the whole accumulation window, or None.
        micro_step: Index of this micro-batch inside the accumulation window.
        micro_steps: Micro-batches in this window.
        global_step: Optimizer steps done before this one.
        stock: ``stock(model, inputs, num_items, **changes)``: the next method's ``training_step``, and the
            parent's at last. ``changes`` are other fields of this context for the methods below, such as
            ``micro_step`` where one micro-batch becomes several.
        loss: ``loss(model, inputs, num_items) -> scalar tensor``: the parent's ``compute_loss``
            with inputs prepared and the trainer's autocast, no backward, scaled for accumulation
            as the parent scales it, and free of side effects on the trainer's metrics.
        mean_over_ranks: Averages a tensor over processes (identity on one process).
        holds_weights: Whether weights that a method changes for one ``loss`` had better stay in memory until it ends,
            because the model runs many times in it.
    """

    model: nn.Module
    unwrapped: nn.Module
    inputs: Any
    num_items: Any
    micro_step: int
    micro_steps: int
    global_step: int
    stock: Callable[..., torch.Tensor]
    loss: Callable[..., torch.Tensor]
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    holds_weights: bool = False


@dataclass(frozen=True)
class SamplerContext:
    """What a method may use to say in which order rows are trained on.

    Attributes:
        dataset: The rows, map-style.
        batch_size: Rows of a micro-batch in one process; the order is cut into such batches.
        processes: Processes that the batches are dealt out to in turn.
        drop_last: Whether a last batch with fewer rows is left out.
        seed: Seed of the data's order.
        facts: What the plan rests on, as the methods change it.
    """

    dataset: Any
    batch_size: int
    processes: int
    drop_last: bool
    seed: int
    facts: Facts


class MemoryMethod:
    """Base with the neutral answer to every hook: a subclass that overrides nothing is plain training.

    Lifecycle: ``prepare_model`` (before the trainer is built) - ``create_optimizer`` -
    ``train_begin`` - for each optimizer step: ``step_begin``, ``training_step`` per micro-batch,
    then the optimizer's own ``step`` - ``train_end``. State goes through ``state_dict`` and is put
    back by ``load_state_dict`` *before* the optimizer's state is loaded.
    """

    def prepare_model(self, model: nn.Module, seed: int) -> nn.Module:
        """Change the model before the trainer is built (adapters); return the one to train."""
        return model

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer | None:
        """Make the optimizer, or return None for the one ``optim`` names."""
        return None

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Start of training; the model is wrapped or sharded by now."""

    def sampler(self, context: SamplerContext) -> torch.utils.data.Sampler[int] | None:
        """Order of the rows, or None for the trainer's own; ``set_epoch`` is called on it before each epoch."""
        return None

    def step_begin(self, global_step: int) -> None:
        """Before the first micro-batch of optimizer step ``global_step`` (0-based)."""

    def training_step(self, context: StepContext) -> torch.Tensor:
        """Compute one micro-batch; return the detached loss on the trainer's device."""
        return context.stock(context.model, context.inputs, context.num_items)

    def schedule_every(self) -> int:
        """Optimizer steps between two steps of the learning-rate schedule; asked after ``create_optimizer``."""
        return 1

    def grad_norm(self) -> float | None:
        """What to log as ``grad_norm``; None for the gradient's own norm."""
        return None

    def train_end(self) -> None:
        """End of training, normal or not: undo temporary changes such as frozen flags and hooks."""

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """FLOPs of optimizer step ``global_step`` over these micro-batches, checkpointing excluded.

        ``facts.trainable`` describes the candidates.
        """
        from hf_eff.numerics.flops import training_flops

        return sum(training_flops(facts, shape) for shape in shapes)

    def state_dict(self) -> dict[str, Any]:
        """State beyond the optimizer's: JSON-able values, and tensors under string keys."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Restore; called before the optimizer loads, so that its tensors find their owners."""

    def log_entries(self) -> Mapping[str, float]:
        """Numbers to add to the training log under ``eff/``."""
        return {}
