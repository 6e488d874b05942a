"""How hard every row pulls at the last layer: the gradient's length for a LoRA factor that is not even attached.

A fresh LoRA on the value projection of the last layer adds (alpha / r) B A x to its output, with B = 0. The gradient
of a row's loss with respect to B is (alpha / r) * sum over tokens t of g_t (A x_t)^T, where x is the projection's input
and g the slope of the loss with respect to its output. Both come from one forward whose graph begins at that output:
the backward runs through the last layer and the head only, and several draws of A share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_eff.contracts.cost import ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.datastore import FeatureStore, model_fingerprint, pool_fingerprint
from hf_eff.engines.facts import model_facts
from hf_eff.engines.module_tree import find_blocks
from hf_eff.engines.packed_weights import refuse_packed
from hf_eff.engines.pool_pass import scored_batches, unfinished
from hf_eff.engines.scoring import model_example_losses, scoring_mode
from hf_eff.errors import DataError, PlanError
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.keyed_random import make_key

# N pool rows, B rows of a batch, T tokens, i inputs and o outputs of the projection, r rank

_VALUES = (
    *("v_proj", "value", "v", "v_lin"),
    *("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"),  # fused: queries and keys count too
)


@dataclass(frozen=True)
class ValueFactor:
    """The LoRA whose second factor is looked at.

    Attributes:
        rank: Inner width r.
        alpha: Scale; alpha / r multiplies the gradient.
        draws: First factors A to average the length over.
        seed: Names them.
    """

    rank: int = 8
    alpha: int = 16
    draws: int = 3
    seed: int = 0

    def flops(self, facts: ModelFacts, shape: BatchShape) -> float:
        """FLOPs of a forward, a backward down to the value projection of the last block, and the products with A."""
        block, tokens = facts.blocks[-1], shape.rows * shape.length
        projections = min(3 * facts.hidden_size * block.attention_width, block.matmul_params)
        backward = 2.0 * (block.matmul_params - projections + facts.head_matmul_params) * tokens
        backward += 2.0 * block.attention_width * tokens * shape.length
        products = 2.0 * self.draws * self.rank * (facts.hidden_size + block.attention_width) * tokens
        return forward_flops(facts, shape) + backward + products

    def firsts(self, inputs: int, device: torch.device) -> list[Tensor]:
        """The draws of A [r, i], each from LoRA's own initialisation, the same on every device."""
        bound = inputs**-0.5
        generators = [torch.Generator().manual_seed(make_key(self.seed, draw)) for draw in range(self.draws)]
        return [
            torch.empty(self.rank, inputs).uniform_(-bound, bound, generator=generator).to(device)
            for generator in generators
        ]


def value_gradient_norms(
    context: SelectionContext,
    pool: Pool,
    factor: ValueFactor,
    *,
    name: str = "value-gradients",
    description: str = "Gradient lengths",
) -> np.ndarray:
    """Length of every row's gradient, averaged over the draws of A.

    With ``context.store_dir`` finished batches are kept there: interrupted and called again with the same rows, model
    and ``batch_tokens``, only unfinished batches are computed.

    Args:
        context: Model, collator and limits. The model is left as found.
        pool: Rows to score; rows without loss tokens are skipped.
        factor: Whose gradient.
        name: Folder in the store.
        description: Text of the progress bar.

    Returns:
        [N] float64, NaN for invalid rows and lengths that are not finite.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        DataError: The projection sees other rows than the batch has.
        ManifestError: The folder holds lengths of other rows or of another model.
        PlanError: The last layer has no value projection of a known name, or gradients do not pass through the model.
        ScoringStoppedError: A stop was requested.
    """
    refuse_packed(context.model)
    module, facts = value_projection(context.model), model_facts(context.model)
    about = {"factor": vars(factor), "rows": pool_fingerprint(pool), "batch_tokens": context.batch_tokens}
    folder = _folder(context, name)
    about |= {"model": model_fingerprint(context.model)} if folder else {}
    store = FeatureStore.open(folder, rows=len(pool), width=1, dtype="float32", header=about)
    paid = replace(context, forward_flops=lambda rows, length: factor.flops(facts, BatchShape(rows, length)))

    def score(_positions: np.ndarray, batch: Mapping[str, Any]) -> Tensor:
        return _lengths(context, module, batch, factor)[:, None].cpu()

    with scoring_mode(context.model):
        context.model.requires_grad_(False)
        for positions, lengths in scored_batches(paid, unfinished(context, pool, store.done), description, score):
            store.write(positions, lengths)
    return np.where(store.done, store.norms, np.nan).astype(np.float64)


def value_projection(model: nn.Module) -> nn.Module:
    """The value projection of a model's last layer, or the fused projection that holds it.

    Raises:
        PlanError: There is none of a known name.
    """
    blocks = find_blocks(model)
    parts = dict(blocks[-1][1].named_modules()) if blocks else {}
    for leaf in _VALUES:
        for name, module in parts.items():
            if name.rpartition(".")[2] == leaf:
                return module
    raise PlanError(
        f"the last layer of {type(model).__name__} has no value projection named one of {list(_VALUES)}, "
        "whose gradient is the score; choose another selection method."
    )


def _folder(context: SelectionContext, name: str) -> Path | None:
    return context.store_dir / name if context.store_dir else None


def _lengths(context: SelectionContext, module: nn.Module, batch: Mapping[str, Any], factor: ValueFactor) -> Tensor:
    """[B] mean length over the draws, NaN for rows without loss."""
    calls: list[tuple[Tensor, Tensor]] = []

    def begin_graph(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        calls.append((inputs[0].detach(), leaf))
        return leaf

    handle = module.register_forward_hook(begin_graph)
    try:
        with torch.enable_grad():
            losses, counts = model_example_losses(context.model, batch, is_causal_lm=context.is_causal_lm)
            slopes = torch.autograd.grad(losses[counts > 0].sum(), [leaf for _, leaf in calls])
    finally:
        handle.remove()
    found = torch.cat([_products(slope, inputs, factor) for slope, (inputs, _) in zip(slopes, calls, strict=True)])
    if len(found) != len(losses):
        raise DataError(
            f"the value projection sees {len(found)} rows for a batch of {len(losses)}; turn padding-free batches off."
        )
    return torch.where(counts > 0, found, torch.nan)


def _products(slope: Tensor, inputs: Tensor, factor: ValueFactor) -> Tensor:
    """[B] mean over the draws of (alpha / r) ||sum_t g_t (A x_t)^T||."""
    exact = torch.promote_types(slope.dtype, torch.float32)
    slope, inputs = slope.to(exact), inputs.to(exact)
    lengths: Sequence[Tensor] = [
        torch.linalg.matrix_norm(slope.transpose(1, 2) @ (inputs @ first.to(exact).T))
        for first in factor.firsts(inputs.shape[-1], inputs.device)
    ]
    return torch.stack(list(lengths)).mean(dim=0) * (factor.alpha / factor.rank)
