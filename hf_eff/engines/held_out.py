"""What a governor wants to see fall on held-out rows: a loss, a function, a metric of generated texts, a reward.

Every quantity becomes numbers of which a smaller one is better, as many at each reading and of the same examples, so
that two readings are compared pair by pair. Where the noise of their difference comes from:

- ``"examples"``   one value an example; the standard error is that of the paired differences
- ``"jackknife"``  one number for all examples, such as an F1 or a BLEU score: pseudo-values of a delete-a-group
  jackknife stand in for the examples, G m(all) - (G - 1) m(all but group g), shifted so that their mean is m(all)
- ``"fit"``        one number and no way to split it: the governor takes the noise from the residuals of its curve
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from hf_eff.contracts.cost import ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.generation_objective import GenerationObjective
from hf_eff.engines.logged_metrics import metrics_kept
from hf_eff.engines.objectives import Objective, objective_value
from hf_eff.engines.prompted_rows import left_padded, prompted_rows
from hf_eff.engines.scoring import model_example_losses
from hf_eff.errors import OptionError
from hf_eff.numerics.flops import forward_flops, generation_flops

Noise = Literal["examples", "jackknife", "fit"]
Batch = Mapping[str, Any]
LOWER_IS_BETTER = frozenset({"brier_score", "cer", "mae", "mape", "mse", "perplexity", "smape", "ter", "wer"})
"""Metrics of the package ``evaluate`` that fall as a model gets better."""
MOST_GROUPS = 32
"""Groups of the jackknife; one an example where there are fewer."""


class HeldOut:
    """A quantity read off held-out rows. A subclass gives ``outputs``.

    Attributes:
        name: What logs call it.
        noise: Where the standard error of a difference comes from.
        maximise: Whether a larger value is better; ``values`` then changes the sign.
        one_by_one: Whether it can only be asked about one row at a time.
    """

    name: str = "held-out quantity"
    noise: ClassVar[Noise] = "examples"
    maximise: bool = False
    one_by_one: ClassVar[bool] = False

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """What ``values`` needs to know of each row of a batch: JSON-able, in the order of the rows.

        Args:
            model: In evaluation mode, without gradients.
            batch: What ``collate`` made, on the model's device.
        """
        raise NotImplementedError

    def values(self, outputs: Sequence[Any]) -> np.ndarray:
        """[n] float64, smaller is better, NaN for what cannot be read; n is the same at each reading.

        Args:
            outputs: One entry an example, in the order of the subset.
        """
        sign = -1.0 if self.maximise else 1.0
        return np.array([math.nan if output is None else sign * float(output) for output in outputs])

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of a row, for batches of bounded size."""
        return len(row["input_ids"])

    def collated(self, collate: Callable[[list[Any]], Batch], rows: list[Any]) -> Batch:
        """Rows as one batch.

        Args:
            collate: The trainer's collator.
            rows: Mappings.
        """
        return collate(rows)

    def shape(self, batch: Batch) -> tuple[int, int]:
        """Rows and padded length of what the model sees."""
        rows, length = batch["input_ids"].shape
        return int(rows), int(length)

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """FLOPs of reading one batch, or a bound from above."""
        return forward_flops(facts, shape)

    def facts(self) -> dict[str, Any]:
        """What an audit log says about it."""
        return {"name": self.name, "better": "larger" if self.maximise else "smaller", "noise": self.noise}


class HeldOutLoss(HeldOut):
    """Mean loss of the labelled tokens of each row, nats.

    Args:
        is_causal_lm: Whether labels are shifted by one.
    """

    name = "loss"

    def __init__(self, *, is_causal_lm: bool) -> None:
        self._is_causal_lm = is_causal_lm

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Losses of the rows."""
        losses, _ = model_example_losses(model, batch, is_causal_lm=self._is_causal_lm)
        values: list[Any] = losses.double().tolist()
        return values


class HeldOutFunction(HeldOut):
    """A user's function of (model, batch): one value a row, or one number that is the mean over the rows.

    One number is asked for row by row. What is no mean of rows, as a corpus score is, belongs in a metric.

    Args:
        function: The function.
        maximise: Whether a larger value is better.

    Raises:
        OptionError: It cannot be called.
    """

    def __init__(self, function: Any, *, maximise: bool = False) -> None:
        if not callable(function) or isinstance(function, type):
            raise OptionError(f"a held-out quantity must be a function of (model, batch), got {function!r}.")
        self.name = getattr(function, "__name__", type(function).__name__)
        self.maximise = maximise
        self._function = function

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """What the function says of each row.

        Raises:
            OptionError: It gives neither one number nor one a row.
        """
        rows = _rows(batch)
        found = _numbers(self._function(model, batch))
        if len(found) == 1 and rows > 1:
            found = [_numbers(self._function(model, _one_row(batch, row, rows)))[0] for row in range(rows)]
        if len(found) != rows:
            raise OptionError(f"{self.name} gave {len(found)} values for {rows} rows; give one a row or one number.")
        return found


class HeldOutObjective(HeldOut):
    """An ``Objective`` of a zeroth-order run: a mean over rows, smaller is better.

    Args:
        objective: The objective.
    """

    one_by_one = True

    def __init__(self, objective: Objective) -> None:
        self.name = type(objective).__name__
        self._objective = objective

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Its value on the row."""
        return [float(objective_value(self._objective, model, batch))]

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """What the objective says."""
        return self._objective.flops(facts, shape)


class HeldOutMetric(HeldOut):
    """A metric of greedily generated texts against the rows' answers.

    Args:
        metric: ``"exact_match"``, ``"f1"``, a function of (predictions, references), an object with ``compute``, or
            the name of a metric of the package ``evaluate``, whose first loading needs the network.
        tokenizer: Pads prompts and turns tokens into text.
        max_new_tokens: Length at which a text is cut.
        maximise: Whether a larger value is better; None for yes, but for the names in ``LOWER_IS_BETTER``.

    Raises:
        OptionError: The metric cannot be loaded.
        MissingDependencyError: A metric is named and ``evaluate`` is not installed.
    """

    noise = "jackknife"

    def __init__(self, metric: Any, tokenizer: Any, *, max_new_tokens: int = 32, maximise: bool | None = None) -> None:
        name = metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", "metric"))
        self.name = str(name)
        self.maximise = self.name not in LOWER_IS_BETTER if maximise is None else maximise
        self._texts = _Texts(tokenizer, metric, max_new_tokens)

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Prediction and reference of each row."""
        return self._texts.pairs(model, batch)

    def values(self, outputs: Sequence[Any]) -> np.ndarray:
        """[groups] pseudo-values of the metric."""
        sign = -1.0 if self.maximise else 1.0
        return sign * jackknife_values(outputs, self._metric)

    def _metric(self, pairs: Sequence[Any]) -> float:
        return float(self._texts.metric([pair[0] for pair in pairs], [pair[1] for pair in pairs]))

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """Prompts of the rows' whole length, and as many new tokens as are allowed."""
        return self._texts.flops(facts, shape)


class HeldOutReward(HeldOut):
    """Reward of greedily generated completions of held-out prompts; a larger one is better.

    Args:
        functions: Reward functions as TRL calls them: ``prompts``, ``completions``, ``completion_ids`` and the rows'
            other columns by name, one reward a completion or None.
        tokenizer: Cuts prompts into tokens.
        max_new_tokens: Length at which a completion is cut.
        weights: One factor a function; None for 1.

    Raises:
        OptionError: A function is a model or runs asynchronously, or the weights are not as many.
    """

    name = "reward"
    maximise = True

    def __init__(
        self, functions: Any, tokenizer: Any, *, max_new_tokens: int = 256, weights: Sequence[float] | None = None
    ) -> None:
        self._functions = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        for function in self._functions:
            if isinstance(function, nn.Module) or not callable(function) or inspect.iscoroutinefunction(function):
                raise OptionError(f"a held-out reward needs plain functions, got {function!r}; wrap it in one.")
        self._weights = [1.0] * len(self._functions) if weights is None else [float(each) for each in weights]
        if len(self._weights) != len(self._functions):
            raise OptionError(f"{len(self._functions)} reward functions need as many weights, got {weights!r}.")
        self._texts = _Texts(tokenizer, "exact_match", max_new_tokens)

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Weighted sum of the rewards of each row, None where no function gives one."""
        rows: list[Mapping[str, Any]] = batch["rows"]
        tokens = self._texts.completions(model, [ids[mask.bool()] for ids, mask in zip(*_prompts(batch), strict=True)])
        texts = [self._texts.tokenizer.decode(each, skip_special_tokens=True) for each in tokens]
        chats = [not isinstance(row["prompt"], str) for row in rows]
        named = {
            "prompts": [row["prompt"] for row in rows],
            "completions": [
                [{"role": "assistant", "content": text}] if chat else text
                for text, chat in zip(texts, chats, strict=True)
            ],
            "completion_ids": [each.tolist() for each in tokens],
            **{key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")},
        }
        found = [function(**named) for function in self._functions]
        return [self._sum(rewards) for rewards in zip(*found, strict=True)]

    def _sum(self, rewards: Sequence[float | None]) -> float | None:
        given = [
            weight * float(reward)
            for weight, reward in zip(self._weights, rewards, strict=True)
            if reward is not None and not math.isnan(reward)
        ]
        return math.fsum(given) if given else None

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of the prompt."""
        return len(self._ids(row))

    def collated(self, collate: Callable[[list[Any]], Batch], rows: list[Any]) -> Batch:
        """Prompts as ``input_ids`` and ``attention_mask``, padded on the left; the rows themselves as ``rows``."""
        pad = self._texts.tokenizer.pad_token_id or 0
        ids, mask = left_padded([self._ids(row) for row in rows], pad)
        return {"input_ids": ids, "attention_mask": mask, "rows": rows}

    def _ids(self, row: Mapping[str, Any]) -> Tensor:
        prompt, tokenizer = row["prompt"], self._texts.tokenizer
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=isinstance(row["prompt"], str))[
            "input_ids"
        ][0]
        return ids

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """Prompts, and as many new tokens as are allowed."""
        return generation_flops(facts, shape, self._texts.max_new_tokens)


class TrainerLoss(HeldOut):
    """A trainer's own loss, row by row: preference losses, reward models, anything that ``compute_loss`` works out.

    Nothing that the trainer counts or collects changes.

    Args:
        trainer: Any ``Trainer``, TRL's included.
    """

    one_by_one = True

    def __init__(self, trainer: Any) -> None:
        self.name = f"loss of {type(trainer).__name__}"
        self._trainer = trainer

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """The loss on the row."""
        trainer = self._trainer
        with metrics_kept(trainer), trainer.compute_loss_context_manager():
            return [float(trainer.compute_loss(model, dict(batch)))]

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of all sequences of a row, the prompt once for each of them."""
        parts = {key: len(value) for key, value in row.items() if key.endswith("ids") and hasattr(value, "__len__")}
        prompt = parts.pop("prompt_ids", 0)
        return sum(parts.values()) + prompt * max(1, len(parts))

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """One forward, and one of the reference where the trainer runs one."""
        return forward_flops(facts, shape) * (1.0 + runs_reference(self._trainer))


class HeldOutNumber(HeldOut):
    """One number of the whole model, which no example can be taken out of.

    Args:
        function: Function of the model.
        name: What logs call it.
        maximise: Whether a larger value is better.
        reading_flops: What one call costs.
    """

    noise = "fit"
    one_by_one = True

    def __init__(
        self,
        function: Callable[[nn.Module], Any],
        *,
        name: str = "number",
        maximise: bool = False,
        reading_flops: float = 0.0,
    ) -> None:
        self.name, self.maximise = name, maximise
        self._function, self._reading_flops = function, reading_flops

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """The number."""
        return _numbers(self._function(model))

    def length(self, row: Mapping[str, Any]) -> int:
        """Rows play no part."""
        return 1

    def collated(self, collate: Callable[[list[Any]], Batch], rows: list[Any]) -> Batch:
        """Rows play no part."""
        return {}

    def shape(self, batch: Batch) -> tuple[int, int]:
        """Rows play no part."""
        return 0, 0

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """What the caller said."""
        return self._reading_flops


def held_out_of(
    given: Any,
    *,
    is_causal_lm: bool,
    rows: Any = None,
    trainer: Any = None,
    tokenizer: Any = None,
    maximise: bool | None = None,
) -> HeldOut:
    """The quantity that a governor is to watch.

    Args:
        given: None or ``"loss"`` for the loss, a ``HeldOut``, an ``Objective``, a function of (model, batch), or what
            ``HeldOutMetric`` takes as a metric's name.
        is_causal_lm: Whether labels are shifted by one.
        rows: The held-out rows. Where they have no ``input_ids``, the loss is the trainer's own, and for a trainer
            with reward functions it is their reward.
        trainer: The trainer, where rows are only understood by it.
        tokenizer: For metrics of texts.
        maximise: Whether a larger value is better; None for what is usual for the quantity.

    Raises:
        OptionError: It is none of these, or ``maximise`` contradicts the quantity.
    """
    if isinstance(given, HeldOut):
        if maximise not in (None, given.maximise):
            raise OptionError(f"maximise={maximise!r} contradicts the objective, which knows its own direction.")
        return given
    if isinstance(given, str) and given != "loss":
        if tokenizer is None:
            raise OptionError(f"objective={given!r} is a metric of texts and needs a tokenizer (processing_class).")
        return HeldOutMetric(given, tokenizer, maximise=maximise)
    if isinstance(given, Objective) or given in (None, "loss"):
        if maximise:
            raise OptionError("a loss is made smaller; leave maximise at None.")
        return _of_objective(given) if isinstance(given, Objective) else _own_loss(is_causal_lm, rows, trainer)
    return HeldOutFunction(given, maximise=bool(maximise))


def _of_objective(objective: Objective) -> HeldOut:
    if isinstance(objective, GenerationObjective):
        # The objective is one minus its metric, so a larger metric is the better one.
        return HeldOutMetric(
            objective.metric, objective.tokenizer, max_new_tokens=objective.max_new_tokens, maximise=True
        )
    return HeldOutObjective(objective)


def _own_loss(is_causal_lm: bool, rows: Any, trainer: Any) -> HeldOut:
    if trainer is not None and getattr(trainer, "reward_funcs", None):
        return reward_of(trainer)
    is_plain = rows is None or not len(rows) or "input_ids" in rows[0]
    return HeldOutLoss(is_causal_lm=is_causal_lm) if trainer is None or is_plain else TrainerLoss(trainer)


def reward_of(trainer: Any) -> HeldOutReward:
    """The reward that a trainer of TRL raises, on greedy completions."""
    weights = getattr(trainer, "reward_weights", None)
    return HeldOutReward(
        list(trainer.reward_funcs),
        trainer.processing_class,
        max_new_tokens=trainer.args.max_completion_length,
        weights=None if weights is None else [float(each) for each in weights],
    )


def runs_reference(trainer: Any) -> bool:
    """Whether a trainer's loss runs a reference model: another one, or its own without the adapter."""
    if getattr(trainer, "precompute_ref_logps", False) or not hasattr(trainer, "ref_model"):
        return False
    return trainer.ref_model is not None or bool(getattr(trainer.model, "peft_config", None))


def jackknife_values(outputs: Sequence[Any], metric: Callable[[Sequence[Any]], float]) -> np.ndarray:
    """[groups] pseudo-values of a metric whose mean is the metric of all outputs.

    For a mean over examples, and as many groups as examples, they are the examples' own values.

    Args:
        outputs: One entry an example.
        metric: Number of any part of them.

    >>> jackknife_values([1.0, 2.0, 6.0], lambda part: sum(part) / len(part)).round(9).tolist()
    [1.0, 2.0, 6.0]
    """
    whole, groups = metric(outputs), min(len(outputs), MOST_GROUPS)
    if groups < 2:
        return np.array([whole])
    without = [
        metric([output for place, output in enumerate(outputs) if place % groups != group]) for group in range(groups)
    ]
    deviations = np.array(without) - np.mean(without)
    values: np.ndarray = whole - (groups - 1) * deviations
    return values


class _Texts(GenerationObjective):
    """Texts that a model writes after the prompts of a batch."""

    def pairs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """[prediction, reference] of each row."""
        two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        rows = prompted_rows(batch, is_encoder_decoder=two_stacks)
        written = self._texts(self._generated(model, [row.prompt for row in rows], skips_prompt=not two_stacks))
        return [list(pair) for pair in zip(written, self._texts([row.answer for row in rows]), strict=True)]

    def completions(self, model: nn.Module, prompts: Sequence[Tensor]) -> list[Tensor]:
        """New tokens of each prompt, up to where its text ends."""
        end = self.tokenizer.eos_token_id
        found = []
        for tokens in self._generated(model, [prompt.cpu() for prompt in prompts], skips_prompt=True):
            stops = (tokens == end).nonzero() if end is not None else tokens[:0]
            found.append(tokens[: int(stops[0]) + 1] if len(stops) else tokens)
        return found


def _prompts(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"]


def _rows(batch: Batch) -> int:
    ids = batch.get("input_ids")
    tensors = [ids] if isinstance(ids, Tensor) else [value for value in batch.values() if isinstance(value, Tensor)]
    return len(next((value for value in tensors if value.dim()), ()))


def _one_row(batch: Batch, row: int, rows: int) -> dict[str, Any]:
    return {
        key: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for key, value in batch.items()
    }


def _numbers(found: Any) -> list[Any]:
    """Numbers as a list; one alone as a list of one."""
    if found is None:
        raise OptionError("a held-out quantity must give numbers, got None.")
    try:
        numbers = found.detach().double().cpu().numpy() if isinstance(found, Tensor) else found
        values: list[Any] = np.asarray(numbers, dtype=np.float64).reshape(-1).tolist()
    except (TypeError, ValueError) as error:
        raise OptionError(f"a held-out quantity must give numbers, got {type(found).__name__}.") from error
    return values
