"""Objectives: what a zeroth-order run makes smaller where that has no gradient, such as a share of wrong answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_eff.contracts.cost import Facts, ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import is_causal_lm
from hf_eff.engines.prompted_rows import PromptedRow, prompted_rows
from hf_eff.engines.row_split import IGNORED
from hf_eff.errors import DataError, OptionError
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.planned_step import planned_shape


class Objective:
    """A number to make smaller. A subclass gives ``__call__``, and says what it costs if that is not one forward.

    It is asked twice a direction: at the weights moved one way and the other. Both times it must answer the same to
    the same weights, so nothing in it may be drawn at random.

    Attributes:
        holds_weights: Whether moved weights stay in memory for a whole call. Where the model runs many times a call,
            that costs a copy of the trained weights and saves drawing the direction for each run.
    """

    holds_weights: bool = False

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | float:
        """The value on one micro-batch, a mean over its rows.

        Args:
            model: In evaluation mode, without gradients.
            inputs: The batch as the collator made it, on the model's device.
        """
        raise NotImplementedError

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """FLOPs of one value, or a bound from above.

        Args:
            facts: Shapes of the model.
            shape: Shape of the micro-batch.
        """
        return forward_flops(facts, shape)


class _Given(Objective):
    """A user's own function, taken to cost one forward."""

    def __init__(self, function: Callable[..., Tensor | float]) -> None:
        self._function = function

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | float:
        """What the function says."""
        return self._function(model, inputs)


def as_objective(given: Any) -> Objective | None:
    """The argument ``objective`` of a trainer as an ``Objective``; None for None.

    Raises:
        OptionError: It cannot be called.
    """
    if given is None or isinstance(given, Objective):
        return given
    if not callable(given) or isinstance(given, type):
        raise OptionError(f"objective must be a function of (model, inputs) or an Objective, got {given!r}.")
    return _Given(given)


def objective_value(objective: Objective, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """One value as a scalar tensor on the model's device, in float64 where the device has it.

    Raises:
        OptionError: It is not one number.
    """
    value = objective(model, inputs)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"objective must return a number, got {type(value).__name__}.") from error
    if tensor.numel() != 1:
        raise OptionError(f"objective must return one number, got a tensor of shape {list(tensor.shape)}; take a mean.")
    return tensor.detach().reshape(())


def with_objective(facts: Facts, objective: Objective | None) -> Facts:
    """Facts of a run that makes an objective smaller; unchanged for None."""
    if objective is None:
        return facts
    shape = planned_shape(facts)
    forward = forward_flops(facts.model, shape)
    forwards = objective.flops(facts.model, shape) / forward if forward else 1.0
    run = dataclasses.replace(facts.run, objective_forwards=forwards, holds_weights=objective.holds_weights)
    return facts.replace(run=run)


def objective_flops(
    objective: Objective,
    facts: ModelFacts,
    shapes: Sequence[BatchShape],
    of_forwards: Callable[[Sequence[BatchShape]], float],
) -> float:
    """FLOPs of an optimizer step that asks for values of an objective wherever it would run forward.

    Args:
        objective: The objective.
        facts: Shapes of the model.
        shapes: Micro-batches of the step.
        of_forwards: FLOPs of the step on the first micro-batches if each value took one forward.
    """
    total = before = 0.0
    for end, shape in enumerate(shapes, start=1):
        so_far = of_forwards(shapes[:end])
        values = (so_far - before) / forward_flops(facts, shape)
        total, before = total + values * objective.flops(facts, shape), so_far
    return total


class ClassificationError(Objective):
    """Share of wrong choices, in [0, 1].

    Without ``options`` a choice is the largest logit: of each labelled token in a language or token model, of each
    row in a classifier or a multiple-choice model. With ``options`` it is the text with the highest mean
    log-likelihood after a row's prompt; the row's own answer has to be one of them.

    Args:
        options: Texts to choose from, spelled as they follow the prompt (``" yes"``, ``" no"``). Decoder-only models.
        tokenizer: Cuts the options into tokens.

    Raises:
        OptionError: There are fewer than two different options, or no tokenizer for them.
    """

    def __init__(self, options: Sequence[str] | None = None, tokenizer: Any = None) -> None:
        self._texts = None if options is None else [text.strip() for text in options]
        self._tokenizer = tokenizer
        self._options: list[Tensor] = []
        if self._texts is None:
            return
        if tokenizer is None or isinstance(options, str) or len(set(self._texts)) != len(self._texts) or not options:
            raise OptionError(f"options must be different texts, with a tokenizer to cut them; got {options!r}.")
        for text in options or ():
            self._options.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
        if len(self._options) < 2 or not all(len(option) for option in self._options):
            raise OptionError(f"options must be at least two texts that are not empty, got {options!r}.")

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | float:
        """Wrong choices over choices.

        Raises:
            DataError: The batch has no labels, or an answer that is no option.
        """
        return _argmax_error(model, inputs) if self._texts is None else self._ranking_error(model, inputs)

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """One forward over the rows, once for each option."""
        if not self._options:
            return forward_flops(facts, shape)
        longest = max(map(len, self._options))
        return forward_flops(facts, BatchShape(shape.rows * len(self._options), shape.length + longest))

    def _ranking_error(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        rows = prompted_rows(inputs)
        gold = torch.tensor([self._option_of(row) for row in rows])
        chosen = _likelihoods(model, rows, self._options).argmax(dim=1)
        return (chosen.cpu() != gold).double().mean()

    def _option_of(self, row: PromptedRow) -> int:
        text = self._tokenizer.decode(row.answer, skip_special_tokens=True).strip()
        if self._texts is None or text not in self._texts:
            raise DataError(f"the answer {text!r} is none of the options {self._texts}.")
        return self._texts.index(text)


def _argmax_error(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise DataError(f"the share of wrong choices needs whole-number labels; the batch has {sorted(inputs)}.")
    # An encoder-decoder model makes its decoder's input of the labels; others would only work out a loss.
    makes_inputs = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    logits = model(**{name: value for name, value in inputs.items() if makes_inputs or name != "labels"}).logits
    if is_causal_lm(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    if not bool(counted.any()):
        raise DataError("no label of the batch counts: all are -100.")
    return (logits.argmax(dim=-1) != labels)[counted].double().mean()


def _likelihoods(model: nn.Module, rows: Sequence[PromptedRow], options: Sequence[Tensor]) -> Tensor:
    """[rows, options] mean log-likelihood of each option's tokens after each prompt."""
    device = next(model.parameters()).device
    texts = [torch.cat([row.prompt, option]) for row in rows for option in options]
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # on the right: causal attention never looks there
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    means = []
    for place, text in enumerate(texts):
        count = len(options[place % len(options)])
        scores = logits[place, len(text) - count - 1 : len(text) - 1].float().log_softmax(dim=-1)
        means.append(scores.gather(1, text[-count:, None].to(device)).mean())
    return torch.stack(means).view(len(rows), len(options))
