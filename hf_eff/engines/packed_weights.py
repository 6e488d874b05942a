"""4-bit weights that bitsandbytes repacks for inference, after which gradients no longer pass through them.

On CPUs with AVX-512 bf16 a ``Linear4bit`` in evaluation mode rewrites its weight at its first forward without
gradients. From then on its output has no gradient function, in training mode too: a backward that runs through the
layer loses that path without a word (bitsandbytes 0.50).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_eff.errors import PlanError

_FLAG = "support_avx512bf16_for_cpu"


@contextmanager
def never_packed(model: nn.Module) -> Iterator[None]:
    """Inside, no layer of the model repacks its weight."""
    layers = [module for module in model.modules() if getattr(module, _FLAG, False)]
    for layer in layers:
        setattr(layer, _FLAG, False)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, _FLAG, True)


def refuse_packed(model: nn.Module) -> None:
    """Refuse a model through which gradients do not pass.

    Raises:
        PlanError: A layer's weight was repacked for inference.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise PlanError(
                f"bitsandbytes repacked the 4-bit weight of {name!r} for inference when the model ran without "
                "gradients, and gradients no longer pass through it; load the model again."
            )
