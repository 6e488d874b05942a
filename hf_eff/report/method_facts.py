"""What a SPEC says, in the words people search by: what a method needs, what it works with, what memory it saves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from hf_eff.contracts.cost import MEMORY_TERMS, Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import EffError
from hf_eff.options import EffOptions, resolve_options
from hf_eff.plan_memory import memory_cost

BACKENDS = {"ddp": "ddp", "fsdp2": "fsdp2", "fp16": "fp16", "peft": "peft", "quantized": "quantized"}
"""Way of running to the trait that allows it."""
NEEDS = {
    "model": "needs_model",
    "target": "needs_reference_set",
    "backward": "needs_backward",
    "causal_lm": "needs_causal_lm",
    "accelerator": "needs_accelerator",
    "blocks": "needs_blocks",
}
"""What a run must bring to the trait that asks for it; packages come besides."""
_SAVED = 0.98
"""A term counts as saved below this share of full fine-tuning's."""


def needs(spec: MethodSpec) -> list[str]:
    """What a run must bring, with the optional packages."""
    kinds = {"needs_backward": ("memory",), "needs_blocks": ("memory",), "needs_model": ("selection",)}
    found = [
        name
        for name, trait in NEEDS.items()
        if getattr(spec.traits, trait) and spec.kind in kinds.get(trait, (spec.kind,))
    ]
    return [*found, *(f"package {name}" for name in spec.requires)]


def backends(spec: MethodSpec) -> list[str]:
    """Ways of running it works with."""
    return [name for name, trait in BACKENDS.items() if getattr(spec.traits, trait)]


def saves(spec: MethodSpec) -> list[str]:
    """Memory terms that are smaller than with full fine-tuning, by the method's own prediction.

    Predicted with default options on 24 layers of width 1024, 8 rows of 1024 tokens, AdamW, fp32, an accelerator. A
    method that cannot run there saves nothing that could be said in general.
    """
    if spec.kind != "memory":
        return []
    try:
        full, own = _terms("full"), _terms(spec.name)
    except EffError:
        return []
    return [term for term in MEMORY_TERMS if own.get(term, 0.0) < _SAVED * full.get(term, 0.0)]


def _terms(memory: str) -> dict[str, float]:
    return dict(memory_cost(resolve_options(EffOptions(memory=memory)), _reference())[1].bytes)


@functools.cache
def _reference() -> Facts:
    """A decoder of 24 layers, trained on an accelerator without gradient clipping, which some methods refuse."""
    from transformers import LlamaConfig

    from hf_eff.engines.facts import model_facts_from_config

    shape: Any = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816}
    model = model_facts_from_config(LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, **shape))
    return Facts(
        model=model,
        pool=PoolFacts(num_rows=10_000, mean_tokens=1024.0, max_tokens=1024),
        hardware=HardwareFacts(device="cuda"),
        run=RunFacts(length=1024, max_steps=1000, max_grad_norm=0.0),
    )


def described(spec: MethodSpec) -> dict[str, Any]:
    """Everything that a listing can be narrowed by, JSON-able."""
    return {
        "kind": spec.kind,
        "name": spec.name,
        "summary": spec.summary,
        "slot": spec.slot,
        "status": spec.status,
        "saves": saves(spec),
        "backends": backends(spec),
        "needs": needs(spec),
        "traits": dataclasses.asdict(spec.traits),
        "paper": None if spec.paper is None else {"title": spec.paper.title, "link": spec.paper.link},
    }
