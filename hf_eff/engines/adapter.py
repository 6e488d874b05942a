"""A LoRA adapter for the length of a ``with`` block; afterwards the model is as it was found."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_eff.engines.module_tree import output_head
from hf_eff.engines.packed_weights import refuse_packed
from hf_eff.errors import OptionError, PlanError
from hf_eff.numerics.keyed_random import make_key

_NAME = "hf_eff"
_ATTENTION_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),  # Llama, Qwen, Mistral, OPT, Phi
    *("query", "key", "value", "query_key_value"),  # BERT, ViT, GPT-NeoX
    *("q", "k", "v", "o", "q_lin", "k_lin", "v_lin", "out_lin"),  # T5, DistilBERT
    *("c_attn", "Wqkv", "qkv"),  # GPT-2, ModernBERT
)


@dataclass(frozen=True)
class LoraShape:
    """Size and place of a fresh adapter.

    Attributes:
        rank: Inner width r.
        alpha: Scale; the adapter's output is multiplied by alpha / r.
        target_modules: Last parts of the names of the modules to adapt. None takes the query,
            key, value and output projections of attention, or every linear layer of a model
            without modules of such names.
    """

    rank: int = 8
    alpha: int = 32
    target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Adapter:
    """LoRA factors inside a model.

    Attributes:
        factors: The ``lora_A`` and ``lora_B`` modules by name, sorted by name.
        is_new: False when they are the model's own adapter.
    """

    factors: Mapping[str, nn.Linear]
    is_new: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each factor's weight, in the order of ``factors``."""
        return {name: tuple(factor.weight.shape) for name, factor in self.factors.items()}

    @property
    def num_params(self) -> int:
        """Entries of all factors."""
        return sum(factor.weight.numel() for factor in self.factors.values())

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights."""
        return {name: factor.weight.detach().clone() for name, factor in self.factors.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set the weights."""
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.weight.copy_(weights[name])


@contextmanager
def temporary_adapter(model: nn.Module, shape: LoraShape, seed: int = 0) -> Iterator[Adapter]:
    """Attach a LoRA to ``model`` in place, or borrow the trainable LoRA it already has.

    Inside, only the factors require gradients, and they are float32 (float64 in a float64 model). On
    exit, also after an error, modules, parameters, their values and their flags are as found. A model
    with an adapter keeps its rank and target modules; ``shape`` is for fresh adapters.

    Args:
        model: Unwrapped model; PEFT or not.
        shape: The fresh adapter.
        seed: Names the random first factor of a fresh adapter; the second factor is zero.

    Yields:
        The adapter.

    Raises:
        OptionError: No module has one of the names in ``shape.target_modules``.
        PlanError: The model carries adapters without a trainable LoRA factor, or gradients do not pass through it.
    """
    refuse_packed(model)
    from peft.tuners.tuners_utils import BaseTunerLayer

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tree = _remember(model)
    borrowed: list[tuple[Tensor, Tensor]] = []
    try:
        if hasattr(model, "peft_config") or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            adapter = Adapter(_trainable_factors(model), is_new=False)
            borrowed = [(factor.weight, factor.weight.data) for factor in adapter.factors.values()]
        else:
            adapter = Adapter(_inject(model, shape, seed), is_new=True)
        model.requires_grad_(False)
        for factor in adapter.factors.values():
            # A working copy: the tensor that was found is not written to.
            exact = torch.promote_types(factor.weight.dtype, torch.float32)
            factor.weight.data = factor.weight.data.to(exact, copy=True)
            factor.weight.requires_grad_(True)
        yield adapter
    finally:
        for parameter, data in borrowed:
            parameter.data = data
        _restore(tree)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _trainable_factors(model: nn.Module) -> dict[str, nn.Linear]:
    """Factors of the active LoRA adapters whose weights train."""
    linear: dict[str, nn.Linear] = {}
    for name, module in sorted(model.named_modules()):
        part, _, adapter = name.rpartition(".")
        layer = model.get_submodule(part.rpartition(".")[0]) if part.endswith((".lora_A", ".lora_B")) else None
        active = adapter in getattr(layer, "active_adapters", ())
        if active and isinstance(module, nn.Linear) and module.weight.requires_grad:
            linear[name] = module
    if not linear:
        raise PlanError(
            "the model carries a PEFT adapter without trainable LoRA factors on linear layers; make a LoRA adapter "
            "active and trainable, or pass the model without an adapter."
        )
    return linear


def _inject(model: nn.Module, shape: LoraShape, seed: int) -> dict[str, nn.Linear]:
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(model, shape.target_modules)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(targets),
        fan_in_fan_out=any(_is_conv1d(module) for module in targets.values()),
    )
    # PEFT initialises from the global generator; the values are replaced below.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    factors = _trainable_factors(model)
    for index, (name, factor) in enumerate(factors.items()):
        if name.endswith(f".lora_A.{_NAME}"):
            _kaiming_uniform(factor.weight, make_key(seed, index))
    return factors


def _kaiming_uniform(weight: Tensor, key: int) -> None:
    """LoRA's own initialisation of A, from a generator on the CPU: the same on every device."""
    values = torch.empty(weight.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=torch.Generator().manual_seed(key))
    with torch.no_grad():
        weight.copy_(values)


def _targets(model: nn.Module, wanted: tuple[str, ...] | None) -> dict[str, nn.Module]:
    """Modules to adapt by full name."""
    head = output_head(model)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    if wanted is None:
        attention = {name: m for name, m in linear.items() if name.rpartition(".")[2] in _ATTENTION_PROJECTIONS}
        found = attention or {name: m for name, m in linear.items() if m is not head}
    else:
        found = {name: m for name, m in linear.items() if f".{name}".endswith(tuple(f".{part}" for part in wanted))}
    if not found:
        leaves = sorted({name.rpartition(".")[2] for name in linear})
        raise OptionError(
            f"target_modules={list(wanted or ())} matches no linear layer of {type(model).__name__}; it has {leaves}."
        )
    return found


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the transposed linear layer of GPT-2."""
    return type(module).__name__ == "Conv1D"


def _remember(model: nn.Module) -> list[tuple[nn.Module, dict[str, tuple[Any, Any]]]]:
    """Attributes of every module, with copies of those that are tables: children, parameters, hooks."""
    return [
        (
            module,
            {
                name: (value, copy.copy(value) if isinstance(value, dict) else None)
                for name, value in vars(module).items()
            },
        )
        for module in model.modules()
    ]


def _restore(tree: list[tuple[nn.Module, dict[str, tuple[Any, Any]]]]) -> None:
    for module, before in tree:
        now = vars(module)
        for name in set(now) - set(before):
            del now[name]
        for name, (value, entries) in before.items():
            now[name] = value
            if entries is not None:
                # In place: others may hold the table itself, such as the handle of a hook.
                value.clear()
                value.update(entries)
