"""Per-example gradient features: in batches against one by one, and against a plain LoRA step.

    OMP_NUM_THREADS=2 python benchmarks/less_features.py [--random] [--dtype bfloat16] [--dims 1024]

Prints features per second of both ways (same model, rows, projector; gradients compared), what the
batched way costs over a bare forward and backward of the same batch, and where its time goes. The
model is SmolLM2-135M-Instruct if its package is installed, else a random model of that shape.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.engines.example_gradients import adapter_losses, example_gradients
from hf_eff.engines.gradient_features import PROJECTIONS, make_projector
from hf_eff.engines.scoring import scoring_mode
from hf_eff.errors import MissingDependencyError

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def random_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **shape)
    return LlamaForCausalLM(config).eval()


def load(random: bool) -> tuple[Any, str]:
    if not random:
        from hf_eff.testing.real import load_smollm2

        try:
            return load_smollm2()[0], "SmolLM2-135M-Instruct"
        except MissingDependencyError:
            pass
    return random_model(), "random model of SmolLM2-135M's shape"


def make_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Ragged rows, the first half of each a masked prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 49000, (rows, length), generator=generator)
    sizes = torch.randint(length * 3 // 4, length + 1, (rows, 1), generator=generator)
    place = torch.arange(length)
    mask = (place < sizes).long()
    labels = ids.masked_fill((place < sizes // 2) | (place >= sizes), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def best_of(repeats: int, function: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    seconds, result = [], None
    for _ in range(repeats):
        start = clock()
        result = function()
        seconds.append(clock() - start)
    return min(seconds), result


def measure(model: Any, batch: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, float]:
    clock = CLOCKS[options.clock]
    rows, dtype = options.rows, torch.bfloat16 if options.dtype == "bfloat16" else None
    with scoring_mode(model), temporary_adapter(model, LoraShape(rank=options.rank)) as adapter:
        with torch.no_grad():
            for factor in adapter.factors.values():
                factor.weight.add_(0.01 * torch.randn(factor.weight.shape, generator=torch.Generator().manual_seed(1)))
        weights = [factor.weight for factor in adapter.factors.values()]
        projector = make_projector(options.projection, adapter, options.dims, seed=0)

        def step(part: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            losses, _ = adapter_losses(model, part, is_causal_lm=True, compute_dtype=dtype)
            return list(torch.autograd.grad(losses.sum(), weights))

        def batched() -> list[tuple[int, torch.Tensor]]:
            return list(example_gradients(model, adapter.factors, batch, is_causal_lm=True, compute_dtype=dtype))

        def looped() -> list[tuple[int, torch.Tensor]]:
            # Each row without its padding: the loop's own advantage.
            singles = []
            for row in range(rows):
                size = int(batch["attention_mask"][row].sum())
                singles.append(step({key: value[row : row + 1, :size] for key, value in batch.items()}))
            return [(i, torch.stack([single[i].flatten() for single in singles])) for i in range(len(weights))]

        step({key: value[:2] for key, value in batch.items()})
        plain_seconds, _ = best_of(options.repeats, lambda: step(batch), clock)
        batched_seconds, gradients = best_of(options.repeats, batched, clock)
        project_seconds, _ = best_of(options.repeats, lambda: projector.project(iter(gradients), rows), clock)
        loop_seconds, one_by_one = best_of(1, looped, clock)
    difference = math.sqrt(
        sum((a - b).square().sum().item() for (_, a), (_, b) in zip(gradients, one_by_one, strict=True))
    )
    size = math.sqrt(sum(b.square().sum().item() for _, b in one_by_one))
    whole = batched_seconds + project_seconds
    return {
        "adapter_params": adapter.num_params,
        "features_per_second_batched": rows / whole,
        "features_per_second_one_by_one": rows / (loop_seconds + project_seconds),
        "speed_up": (loop_seconds + project_seconds) / whole,
        "speed_up_without_projection": loop_seconds / batched_seconds,
        "cost_over_plain_step": whole / plain_seconds,
        "seconds_plain_step": plain_seconds,
        "seconds_gradients": batched_seconds,
        "seconds_projection": project_seconds,
        "seconds_one_by_one": loop_seconds,
        "relative_difference": difference / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random weights of SmolLM2-135M's shape")
    parser.add_argument("--rows", type=int, default=32, help="examples in the batch")
    parser.add_argument("--length", type=int, default=48, help="tokens of the longest")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--dims", type=int, default=1024, help="width of the projection")
    parser.add_argument("--projection", choices=PROJECTIONS, default="sparse")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu adds up threads: for busy machines")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    options = parser.parse_args()
    model, name = load(options.random)
    figures = measure(model, make_batch(options.rows, options.length), options)
    about = {"model": name, "threads": torch.get_num_threads(), "torch": torch.__version__, **vars(options)}
    print(json.dumps({**about, **{key: round(value, 6) for key, value in figures.items()}}, indent=2))


if __name__ == "__main__":
    main()
