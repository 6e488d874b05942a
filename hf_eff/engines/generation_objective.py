"""An objective on what a model writes: generate after each prompt, compare with the answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_eff.contracts.cost import ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.objectives import Objective
from hf_eff.engines.prompted_rows import left_padded, prompted_rows
from hf_eff.errors import MissingDependencyError, OptionError
from hf_eff.numerics.flops import generation_flops

Metric = Callable[[Sequence[str], Sequence[str]], float]


class GenerationObjective(Objective):
    """One minus a metric of greedily generated texts, so that a better text is a smaller value.

    A row's prompt is what stands before its first label that is not -100, and its answer is what the labels say.
    Both texts are stripped of space at their ends.

    Args:
        tokenizer: Pads prompts and turns tokens into text.
        metric: ``"exact_match"``, ``"f1"`` (of the words of two texts), a function of (predictions, references), an
            object with ``compute`` as the package ``evaluate`` makes them, or the name of a metric for
            ``evaluate.load``, which needs the network.
        max_new_tokens: Length at which a text is cut.
        holds_weights: Whether the moved weights stay for a whole text. Without, they are drawn again for each token:
            slower, but without a second copy of the trained weights.

    Raises:
        OptionError: The metric cannot be loaded, or ``max_new_tokens`` is below 1.
        MissingDependencyError: A metric is named and ``evaluate`` is not installed.
    """

    def __init__(
        self, tokenizer: Any, metric: Any = "exact_match", max_new_tokens: int = 32, *, holds_weights: bool = True
    ) -> None:
        if max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}.")
        self.tokenizer = tokenizer
        self.metric = _metric(metric)
        self.max_new_tokens = max_new_tokens
        self.holds_weights = holds_weights

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> float:
        """One minus the metric on the rows that have an answer.

        Raises:
            DataError: Rows have no prompt, or there is no answer.
            OptionError: The model cannot generate, or the metric gives no number.
        """
        two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        rows = prompted_rows(inputs, is_encoder_decoder=two_stacks)
        predictions = self._texts(self._generated(model, [row.prompt for row in rows], skips_prompt=not two_stacks))
        value = float(self.metric(predictions, self._texts([row.answer for row in rows])))
        if not math.isfinite(value):
            raise OptionError(f"the metric must give a finite number, got {value}.")
        return 1.0 - value

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """Prompts of the rows' whole length, and as many new tokens as are allowed."""
        return generation_flops(facts, shape, self.max_new_tokens)

    def _generated(self, model: Any, prompts: Sequence[Any], *, skips_prompt: bool) -> Any:
        if not callable(getattr(model, "generate", None)):
            raise OptionError(f"{type(model).__name__} cannot generate; use a model with a language modelling head.")
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        ids, mask = left_padded(prompts, end if pad is None else pad)
        device = next(model.parameters()).device
        options = {"pad_token_id": end if pad is None else pad, "eos_token_id": _end(model, end)}
        tokens = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            temperature=None,
            top_p=None,
            top_k=None,
            **{name: value for name, value in options.items() if value is not None},
        )
        return tokens[:, ids.shape[1] :] if skips_prompt else tokens

    def _texts(self, tokens: Any) -> list[str]:
        return [self.tokenizer.decode(each, skip_special_tokens=True).strip() for each in tokens]


def _end(model: Any, end: int | None) -> Any:
    """What ends a text: the model's own settings know more than the tokenizer where a chat has several such tokens."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return end if known is None else known


def _metric(given: Any) -> Metric:
    if given in ("exact_match", "f1"):
        return _exact_match if given == "exact_match" else _word_f1
    if isinstance(given, str):
        given = _loaded(given)
    if callable(getattr(given, "compute", None)):
        return _Computed(given)
    if not callable(given):
        raise OptionError(f"metric must be a name, a function of (predictions, references) or a metric, got {given!r}.")
    made: Metric = given
    return made


def _loaded(name: str) -> Any:
    try:
        import evaluate
    except ImportError as error:
        raise MissingDependencyError(
            f"metric={name!r} needs evaluate; install it with: pip install 'hf_eff[eval]', or pass a function of "
            "(predictions, references)."
        ) from error
    try:
        return evaluate.load(name)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise OptionError(
            f"metric={name!r} cannot be loaded ({reason}); pass a function of (predictions, references), 'exact_match' "
            "or 'f1'."
        ) from error


class _Computed:
    """A metric of ``evaluate``: the entry named after it, or the only one."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        found = self._metric.compute(predictions=predictions, references=references)
        values = dict(found) if isinstance(found, Mapping) else {"": found}
        name = getattr(self._metric, "name", "")
        if name not in values and len(values) != 1:
            raise OptionError(
                f"the metric gives {sorted(values)} and none is named {name!r}; pass a function of (predictions, "
                "references) that takes one of them."
            )
        return float(values[name] if name in values else next(iter(values.values())))


def _exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    equal = [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
    return sum(equal) / len(equal)


def _word_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over rows of the harmonic mean of the words' precision and recall."""
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        found, wanted = prediction.split(), reference.split()
        common = sum((Counter(found) & Counter(wanted)).values())
        scores.append(2 * common / (len(found) + len(wanted)) if found or wanted else 1.0)
    return sum(scores) / len(scores)
