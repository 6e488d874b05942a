"""Optimizer steps of galore and apollo beside the packages galore-torch and apollo-torch, on the same gradients.

    python benchmarks/low_rank_step.py --layers 4

A model of SmolLM2-135M's shapes with fewer layers and a small vocabulary; one thread; the optimizers take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.low_rank_optimizer import ProjectedAdamW, ScaledGradient, Subspace
from hf_eff.hardware.memory_meter import optimizer_tensors, storage_bytes

RANK, NEVER = 128, 10**6


def main() -> None:
    """Print a table of seconds and bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    optimizers = {name: make(arguments.layers) for name, make in candidates().items()}
    first = {name: seconds(optimizer.step) for name, optimizer in optimizers.items()}
    later: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(arguments.rounds):
        for name, optimizer in optimizers.items():
            later[name].append(seconds(optimizer.step))
    print("| | first step s | step ms | state MiB |\n|---|---|---|---|")
    for name, optimizer in optimizers.items():
        state = storage_bytes(optimizer_tensors(optimizer)) / 2**20
        print(f"| {name} | {first[name]:.2f} | {1e3 * statistics.median(later[name]):.0f} | {state:.1f} |")


def seconds(step: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def candidates() -> dict[str, Callable[[int], torch.optim.Optimizer]]:
    """Makers of optimizers, each over a model of its own with the same gradients."""
    return {
        "galore": lambda layers: ProjectedAdamW(context(layers), Subspace(RANK, NEVER)),
        "galore, svd exact": lambda layers: ProjectedAdamW(context(layers), Subspace(RANK, NEVER), exact=True),
        "package galore-torch": peer_galore,
        "apollo": lambda layers: ScaledGradient(context(layers), Subspace(RANK, NEVER)),
        "package apollo-torch": lambda layers: peer_apollo(layers, RANK, 1.0, "channel"),
        "apollo, mini": lambda layers: ScaledGradient(
            context(layers), Subspace(1, NEVER), scale=128.0, scaling="tensor"
        ),
        "package apollo-torch, mini": lambda layers: peer_apollo(layers, 1, 128.0, "tensor"),
    }


def model_with_gradients(layers: int) -> LlamaForCausalLM:
    """SmolLM2's layers on random gradients."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return model


def context(layers: int) -> OptimizerContext:
    """What the trainer would hand over with its default optimizer."""
    model = model_with_gradients(layers)
    names = frozenset(name for name, _ in model.named_parameters())
    return OptimizerContext(
        model=model,
        candidates=names,
        decay_names=names,
        optimizer_class=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-3, "fused": True},
        weight_decay=0.01,
        stock=lambda: torch.optim.AdamW(model.parameters()),
        seed=0,
    )


def split(layers: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Matrices of the layers, and the rest."""
    named = list(model_with_gradients(layers).named_parameters())
    return [each for name, each in named if "_proj" in name], [each for name, each in named if "_proj" not in name]


def peer_galore(layers: int) -> torch.optim.Optimizer:
    """The official code, with its defaults in transformers."""
    from galore_torch import GaLoreAdamW

    matrices, others = split(layers)
    low_rank = {"params": matrices, "rank": RANK, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    optimizer: torch.optim.Optimizer = GaLoreAdamW([{"params": others}, low_rank], lr=1e-3, weight_decay=0.01)
    return optimizer


def peer_apollo(layers: int, rank: int, scale: float, scale_type: str) -> torch.optim.Optimizer:
    """The authors' package."""
    from apollo_torch import APOLLOAdamW

    matrices, others = split(layers)
    low_rank = {
        "params": matrices,
        "rank": rank,
        "proj": "random",
        "scale_type": scale_type,
        "update_proj_gap": NEVER,
        "scale": scale,
        "proj_type": "std",
    }
    optimizer: torch.optim.Optimizer = APOLLOAdamW([{"params": others}, low_rank], lr=1e-3, weight_decay=0.01)
    return optimizer


if __name__ == "__main__":
    main()
