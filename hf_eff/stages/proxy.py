"""The smaller model that scores in place of the one that is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Scorer
from hf_eff.engines.facts import model_facts
from hf_eff.errors import DataError, PlanError
from hf_eff.numerics.flops import forward_flops


def scorer_of(model: Any) -> Scorer:
    """A model as a scorer, where it is."""
    facts = model_facts(model)
    device = next(model.parameters()).device
    return Scorer(model, lambda rows, length: forward_flops(facts, BatchShape(rows, length)), device)


def load_proxy(proxy: str | nn.Module | None, tokenizer: Any = None, device: Any = "cpu") -> Scorer | None:
    """The proxy as a scorer.

    Args:
        proxy: A model, or the folder or Hub id of a causal language model.
        tokenizer: Tokenizer of the rows; every one of its tokens must be in the proxy's vocabulary.
        device: Where a proxy that is read from a folder goes.

    Raises:
        DataError: The proxy cannot be read.
        PlanError: It has fewer embeddings than the tokenizer has tokens.
    """
    if proxy is None:
        return None
    model: Any = _read(proxy, device) if isinstance(proxy, str) else proxy
    rows, tokens = model.get_input_embeddings().weight.shape[0], 0 if tokenizer is None else len(tokenizer)
    if rows < tokens:
        raise PlanError(
            f"the proxy has {rows} embeddings and the tokenizer {tokens} tokens; a proxy must share the model's "
            "tokenizer: take one of the same family."
        )
    return scorer_of(model)


def _read(name: str, device: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(f"proxy_model={name!r} cannot be read ({reason}).") from error
