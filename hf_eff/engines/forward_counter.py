"""What the forwards of a run's models cost, counted as they happen: with a backward, without one, and from a cache.

Preference and reinforcement trainers run more than the loss: a reference model, log-probabilities of older weights, the
generation of whole texts. Each is a forward of some model. With F the closed form of one forward (``numerics.flops``):

    in training mode, with gradients   F, its backward, and what checkpointing runs again
    otherwise                          F
    otherwise, with a key-value cache  F over the new positions, which also attend to the cached ones
    logits of n positions only         the output head over these n
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_eff.contracts.cost import ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import batch_shape, model_facts, token_counts
from hf_eff.errors import DataError, EffWarning
from hf_eff.numerics.flops import forward_flops, recompute_flops, training_flops

COUNTED = ("flops", "tokens", "useful_tokens", "loss_tokens")
Count = Callable[[ModelFacts, BatchShape], float]


@dataclasses.dataclass(frozen=True)
class SeenForward:
    """One forward of one model.

    Attributes:
        flops: Its cost without a backward.
        shape: Rows and new positions.
        trains: Whether a backward follows.
        cached: Positions that were in the key-value cache before; None without a cache.
        is_policy: Whether it was the trained model.
    """

    flops: float
    shape: BatchShape
    trains: bool
    cached: int | None
    is_policy: bool


@dataclasses.dataclass(frozen=True)
class _Watched:
    """A model's shapes, with and without its output head."""

    facts: ModelFacts
    headless: ModelFacts
    is_policy: bool


class ForwardCounter:
    """Watches models and adds up what their forwards cost.

    A model inside another one, as an adapter's base, is counted once, by the outermost call.

    Args:
        model: The trained model, adapters included.
        others: Further models that run during training, such as a reference or a reward model.
        checkpointing: Whether the trained model's blocks run forward again in the backward.
    """

    def __init__(self, model: nn.Module, others: Sequence[nn.Module] = (), *, checkpointing: bool = False) -> None:
        self.facts = model_facts(model)
        self._checkpointing = checkpointing
        self._depth = 0
        self._paused = False
        self._warned = False
        self._amounts = dict.fromkeys(COUNTED, 0.0)
        self._seen: list[SeenForward] = []
        self._handles: list[RemovableHandle] = []
        self._watch(model, _Watched(self.facts, _without_head(self.facts), is_policy=True))
        for other in others:
            facts = model_facts(other)
            self._watch(other, _Watched(facts, _without_head(facts), is_policy=False))

    def _watch(self, model: nn.Module, watched: _Watched) -> None:
        def enter(module: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            self._depth += 1
            if self._depth == 1 and not self._paused:
                self._count(module, _by_name(positional, named), watched)

        def leave(*_: Any) -> None:
            self._depth -= 1

        for module in dict.fromkeys((model, _base(model))):
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def take(self) -> tuple[dict[str, float], list[SeenForward]]:
        """What was counted since the last call, and the forwards that it is made of.

        Tokens are those of forwards that train: a reference reads the same ones once more.
        """
        amounts, seen = self._amounts, self._seen
        self._amounts, self._seen = dict.fromkeys(COUNTED, 0.0), []
        return amounts, seen

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _count(self, module: nn.Module, inputs: dict[str, Any], watched: _Watched) -> None:
        facts = watched.facts
        trains = watched.is_policy and module.training and torch.is_grad_enabled()
        try:
            shape = batch_shape(inputs, facts)
        except DataError as error:
            if trains:
                raise
            self._warn(module, error)
            return
        cached = _cached_positions(inputs)
        forward = _inference(watched, inputs, shape, cached or 0)
        self._amounts["flops"] += self._training(watched, inputs, shape) if trains else forward
        self._seen.append(SeenForward(forward, shape, trains, cached, watched.is_policy))
        if trains:
            counts = token_counts(inputs, facts.is_causal_lm, is_encoder_decoder=facts.is_encoder_decoder)
            for name, key in zip(COUNTED[1:], ("paid", "useful", "loss"), strict=True):
                self._amounts[name] += counts[key]

    def _training(self, watched: _Watched, inputs: Mapping[str, Any], shape: BatchShape) -> float:
        scored = _scored(inputs, shape)
        flops = _with_head_over(training_flops, watched, shape, scored)
        if inputs.get("fused_lm_head"):  # TRL's head keeps no logits: the backward works them out again
            flops += 2.0 * watched.facts.head_matmul_params * (scored or 0)
        return flops + (recompute_flops(watched.facts, shape) if self._checkpointing else 0.0)

    def _warn(self, module: nn.Module, error: DataError) -> None:
        if not self._warned:
            self._warned = True
            text = f"forwards of {type(module).__name__} without gradients are not counted: {error}"
            warnings.warn(text, EffWarning, stacklevel=2)


def cached_forward_flops(facts: ModelFacts, rows: int, new: int, cached: int) -> float:
    """FLOPs of a forward over ``new`` positions a row that also attend to ``cached`` earlier ones.

    Args:
        facts: Shapes of a model of one stack.
        rows: Sequences.
        new: Positions that run.
        cached: Positions whose keys and values are kept.
    """
    one, two = (forward_flops(facts, BatchShape(1, length)) for length in (1, 2))
    attended_pair = (two - 2.0 * one) / 2.0  # linear terms cancel: 4 pairs stand against 2
    return forward_flops(facts, BatchShape(rows, new)) + attended_pair * rows * new * cached


def _inference(watched: _Watched, inputs: Mapping[str, Any], shape: BatchShape, cached: int) -> float:
    if watched.facts.is_encoder_decoder:
        flops = forward_flops(watched.facts, shape)
        if inputs.get("encoder_outputs") is not None and cached:  # the source was read before
            flops -= forward_flops(watched.facts, dataclasses.replace(shape, length=0))
        return flops

    def count(facts: ModelFacts, shape: BatchShape) -> float:
        if shape.packed_lengths:
            return forward_flops(facts, shape)
        return cached_forward_flops(facts, shape.rows, shape.length, cached)

    return _with_head_over(count, watched, shape, _scored(inputs, shape))


def _with_head_over(count: Count, watched: _Watched, shape: BatchShape, scored: int | None) -> float:
    """A count with the output head over ``scored`` positions instead of all; None for all."""
    if scored is None or not watched.facts.head_matmul_params:
        return count(watched.facts, shape)
    alone = BatchShape(scored, 1)  # what else it takes cancels out
    return count(watched.headless, shape) + count(watched.facts, alone) - count(watched.headless, alone)


def _without_head(facts: ModelFacts) -> ModelFacts:
    part = facts.trainable
    if part is not None:
        part = dataclasses.replace(part, head_matmul_params=0)
    return dataclasses.replace(facts, head_matmul_params=0, trainable=part)


def _scored(inputs: Mapping[str, Any], shape: BatchShape) -> int | None:
    """Positions whose logits are worked out; None for all."""
    if inputs.get("fused_lm_head"):
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and labels.is_cuda:  # only there the unlabelled positions are left out
            return int((labels[..., 1:] != -100).sum())
        return shape.rows * max(0, shape.length - 1)
    kept = inputs.get("logits_to_keep")
    if isinstance(kept, int) and not isinstance(kept, bool) and kept > 0:
        return shape.rows * min(kept, shape.length)
    return None


def _cached_positions(inputs: Mapping[str, Any]) -> int | None:
    """Positions in the key-value cache; None without a cache."""
    cache: Any = inputs.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else None


def _by_name(positional: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    inputs = dict(named)
    if positional:
        inputs.setdefault("input_ids", positional[0])
    source = inputs.get("encoder_outputs")
    if source is not None and inputs.get("input_ids") is None:  # its states are as long as what the encoder read
        inputs["inputs_embeds"] = source[0]
    return inputs


def _base(model: nn.Module) -> nn.Module:
    """The model inside an adapter's wrapper, whose ``generate`` runs it directly; the model itself without one."""
    inside: Any = getattr(model, "get_base_model", None)
    return model if inside is None else inside()
