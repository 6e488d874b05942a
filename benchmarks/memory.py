"""Step time and peak memory of memory methods beside the packages that do the same work, and beside full AdamW.

    python benchmarks/memory.py [--random] [--only badam ...] [--steps 4] [--threads 2] [--dtype float32]

Every contestant trains SmolLM2-135M (or, with --random, random weights of that shape) on the same batches. What is
compared, ours beside the package:

    badam    memory="badam"                     badam           top, middle and bottom layer, --steps steps each
    fused    memory="fused", SGD                lomo-optim      the update inside the backward
    galore   memory="galore", exact SVD         galore-torch    rank 128, all matrices of the layers
    apollo   memory="apollo"                    apollo-torch    rank 128, channel-wise
    mini     memory="apollo", rank 1            apollo-torch    tensor-wise, scale 128

and, without a package of their own: full AdamW, activation checkpointing, LoRA (r 16), LISA, HiFT and GaLore with the
randomised SVD that is the default here.

Memory: every contestant in a process of its own; peak is the highest resident memory, rise the part above what was
resident before the optimizer was made. Time: ours, the package and full AdamW in one process, step by step on the same
batch, another one first each time, so that other work on the machine slows them alike. A ratio is taken of each step
and stands with its quartiles; the first is left out (the first step of GaLore holds its decompositions and is shown
apart). Losses are those of the timed steps. Needs the packages, installed with ``--no-deps``, and 8 GiB. A package
that is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

LAYERS = (29, 15, 0)
MEBIBYTE = 2**20
LR = 1e-5


@dataclass
class Contestant:
    """A method at work: ``step(index, batch)`` does one optimizer step and returns the loss."""

    step: Callable[[int, dict], float]
    model: Any


def main() -> None:
    """Run what is asked for and print the tables."""
    arguments = _parse()
    if arguments.job:
        kind, name = arguments.job.split(":")
        print(json.dumps(_times(name, arguments) if kind == "times" else _memory(name, arguments)))
        return
    wanted = arguments.only or [*PAIRS, *ALONE]
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.random:
            _convert(folder)
        peaks = {name: _spawn(f"memory:{name}", folder, arguments) for name in _contestants(wanted)}
        times = {name: _spawn(f"times:{name}", folder, arguments) for name in wanted}
    _print_pairs(wanted, peaks, times)
    _print_all(wanted, peaks, times)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random weights of the same shape")
    parser.add_argument("--only", nargs="+", choices=[*PAIRS, *ALONE], help="these alone")
    parser.add_argument(
        "--steps", type=int, default=10, help="timed optimizer steps, at least 3 (badam: of all blocks)"
    )
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _contestants(wanted: list[str]) -> list[str]:
    """Names of all makers that some table needs and whose package is here."""
    names = ["full"]
    for name in wanted:
        names += [name] if name in ALONE else [name, f"{name}-package"]
    return [name for name in dict.fromkeys(names) if _is_here(name)]


def _is_here(name: str) -> bool:
    package = PACKAGES.get(name.removesuffix("-package")) if name.endswith("-package") else None
    return package is None or importlib.util.find_spec(package) is not None


def _convert(folder: str) -> None:
    from hf_eff.testing.real import load_smollm2

    model, _ = load_smollm2()
    model.save_pretrained(folder)


def _spawn(job: str, folder: str, arguments: argparse.Namespace) -> dict:
    options = ["--job", job, "--model", "" if arguments.random else folder]
    for option in ("steps", "rows", "length", "threads", "dtype"):
        options += [f"--{option}", str(getattr(arguments, option))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, *options]
    answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


# -- in a process of its own -------------------------------------------------------------------------------------------


def _memory(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    from hf_eff.hardware.probe import PeakMemory, release_unused

    torch.set_num_threads(arguments.threads)
    model = _load(arguments)
    batches = _batches(arguments, model.config.vocab_size)
    release_unused()
    window = PeakMemory().start()
    before = window.peak()
    steps = 2 * len(LAYERS) if name.startswith("badam") else 3
    contestant = MAKERS[name](model, 2)
    for index in range(steps):
        contestant.step(index, next(batches))
    window.stop()
    return {"peak": window.peak(), "rise": window.peak() - before}


def _times(name: str, arguments: argparse.Namespace) -> dict[str, dict]:
    """Seconds, CPU seconds and losses of ours, the package and full AdamW, in turns."""
    import torch

    torch.set_num_threads(arguments.threads)
    names = [each for each in dict.fromkeys([name, f"{name}-package", "full"]) if each in MAKERS and _is_here(each)]
    per_block = -(-arguments.steps // len(LAYERS))
    steps = per_block * len(LAYERS) if name == "badam" else arguments.steps
    contestants = {each: MAKERS[each](_load(arguments), per_block) for each in names}
    batches = _batches(arguments, contestants["full"].model.config.vocab_size)
    taken: dict[str, dict[str, list[float]]] = {each: {"seconds": [], "cpu": [], "losses": []} for each in names}
    for index in range(steps):
        batch = next(batches)
        for turn in range(len(names)):
            each = names[(index + turn) % len(names)]
            wall, processor = time.perf_counter(), time.process_time()
            loss = contestants[each].step(index, batch)
            taken[each]["seconds"].append(time.perf_counter() - wall)
            taken[each]["cpu"].append(time.process_time() - processor)
            taken[each]["losses"].append(loss)
    return taken


def _ratio(ours: dict, theirs: dict, figure: str) -> list[float]:
    """Quartiles of the ratios of the same steps, the first left out."""
    pairs = list(zip(ours[figure], theirs[figure], strict=True))[1:]
    return statistics.quantiles([one / other for one, other in pairs], n=4, method="inclusive")


def _load(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # files are mapped: make the weights resident before the steps
        return model.train()
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return LlamaForCausalLM(shape).to(dtype).train()


def _batches(arguments: argparse.Namespace, vocabulary: int) -> Iterator[dict]:
    """The same two random batches in turn, so that a loss can fall.

    Yields:
        Mappings of ``input_ids`` and ``labels`` [rows, length].
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (2, arguments.rows, arguments.length)
    two = torch.randint(vocabulary, shape, generator=generator)
    while True:
        for ids in two:
            yield {"input_ids": ids, "labels": ids}


# -- ours, through the contract of memory methods ----------------------------------------------------------------------


def _ours(names: str, model: Any, steps: int, **options: Any) -> Contestant:
    import torch

    from hf_eff.contracts.memory import OptimizerContext, StepContext
    from hf_eff.memory import MemoryStack
    from hf_eff.options import choose

    if names == "badam":
        options = {"switch_every": steps, "mode": "descending"}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(f".layers.{layer}." in name for layer in LAYERS))
    stack = MemoryStack(choose("memory", names, options))
    model = stack.prepare_model(model, 0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    context = OptimizerContext(
        model=model,
        candidates=frozenset(trained),
        decay_names=frozenset(name for name in trained if "norm" not in name),
        optimizer_class=torch.optim.AdamW,
        optimizer_kwargs={"lr": LR, "fused": True},
        weight_decay=0.01,
        stock=lambda: torch.optim.AdamW(_groups(trained), lr=LR, fused=True),
        seed=0,
    )
    optimizer = stack.create_optimizer(context) or context.stock()
    stack.train_begin(model, 0)

    def stock(model: Any, inputs: dict, _num_items: Any, **_changes: Any) -> Any:
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    def step(index: int, batch: dict) -> float:
        stack.step_begin(index)
        loss = stack.training_step(
            StepContext(
                model=model,
                unwrapped=model,
                inputs=batch,
                num_items=None,
                micro_step=0,
                micro_steps=1,
                global_step=index,
                stock=stock,
                loss=lambda model, inputs, _num_items: model(**inputs).loss,
                mean_over_ranks=lambda value: value,
            )
        )
        optimizer.step()
        model.zero_grad()
        return float(loss)

    return Contestant(step, model)


def _groups(trained: dict[str, Any]) -> list[dict]:
    return [
        {"params": [each for name, each in trained.items() if "norm" not in name], "weight_decay": 0.01},
        {"params": [each for name, each in trained.items() if "norm" in name], "weight_decay": 0.0},
    ]


# -- the packages ------------------------------------------------------------------------------------------------------


def _plain(model: Any, optimizer: Any) -> Contestant:
    def step(_index: int, batch: dict) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        return float(loss.detach())

    return Contestant(step, model)


def _badam_package(model: Any, steps: int) -> Contestant:
    import torch
    from badam import BlockOptimizer

    warnings.filterwarnings("ignore", message="BAdam expect model")
    named = list(model.named_parameters())
    optimizer = BlockOptimizer(
        base_optimizer=torch.optim.AdamW(_groups(dict(named)), lr=LR),
        named_parameters_list=named,
        block_prefix_list=[[f"model.layers.{layer}."] for layer in sorted(LAYERS)],
        switch_block_every=steps,
        switch_mode="descending",
        verbose=0,
    )
    return _plain(model, optimizer)


def _lomo_package(model: Any, _steps: int) -> Contestant:
    from lomo_optim import Lomo

    optimizer = Lomo(model, lr=LR)

    def step(_index: int, batch: dict) -> float:
        loss = model(**batch).loss
        optimizer.fused_backward(loss, LR)
        return float(loss.detach())

    return Contestant(step, model)


def _low_rank_package(model: Any, _steps: int, *, package: str, optimizer: str, options: dict) -> Contestant:
    made = getattr(importlib.import_module(package), optimizer)
    matrices = [each for name, each in model.named_parameters() if ".layers." in name and each.dim() == 2]
    chosen = {id(each) for each in matrices}
    rest = [each for each in model.parameters() if id(each) not in chosen]
    groups = [
        {"params": rest},
        {"params": matrices, "rank": 128, "update_proj_gap": 200, "proj_type": "std", **options},
    ]
    warnings.filterwarnings("ignore", category=FutureWarning)
    return _plain(model, made(groups, lr=LR, weight_decay=0.01))


PACKAGES = {
    "badam": "badam",
    "fused": "lomo_optim",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "mini": "apollo_torch",
}
MINI = {"rank": 1, "scale": 128.0}
MAKERS: dict[str, Callable[[Any, int], Contestant]] = {
    "full": partial(_ours, "full"),
    "badam": partial(_ours, "badam"),
    "badam-package": _badam_package,
    "fused": partial(_ours, "fused"),
    "fused-package": _lomo_package,
    "galore": partial(_ours, "galore", svd="exact"),
    "galore-package": partial(
        _low_rank_package, package="galore_torch", optimizer="GaLoreAdamW", options={"scale": 0.25}
    ),
    "apollo": partial(_ours, "apollo"),
    "apollo-package": partial(
        _low_rank_package,
        package="apollo_torch",
        optimizer="APOLLOAdamW",
        options={"proj": "random", "scale_type": "channel", "scale": 1.0},
    ),
    "mini": partial(_ours, "apollo", scaling="tensor", **MINI),
    "mini-package": partial(
        _low_rank_package,
        package="apollo_torch",
        optimizer="APOLLOAdamW",
        options={"proj": "random", "scale_type": "tensor", **MINI},
    ),
    "checkpointing": partial(_ours, "checkpointing"),
    "lora": partial(_ours, "lora", r=16, alpha=32),
    "lisa": partial(_ours, "lisa", switch_every=2),
    "hift": partial(_ours, "hift"),
    "randomised": partial(_ours, "galore"),
}
PAIRS = tuple(PACKAGES)
ALONE = ("checkpointing", "lora", "lisa", "hift", "randomised")


# -- tables ------------------------------------------------------------------------------------------------------------


def _print_pairs(wanted: list[str], peaks: dict, times: dict) -> None:
    print("| Ours / package | Time (quartiles) | CPU | First step | Peak | Rise | Losses, ours | Losses, package |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (each for each in wanted if each in PAIRS and f"{each}-package" in times[each]):
        ours, theirs = times[name][name], times[name][f"{name}-package"]
        low, time_ratio, high = _ratio(ours, theirs, "seconds")
        ratios = [_ratio(ours, theirs, "cpu")[1], ours["seconds"][0] / theirs["seconds"][0]]
        ratios += [peaks[name][figure] / peaks[f"{name}-package"][figure] for figure in ("peak", "rise")]
        curves = [" ".join(f"{loss:.3f}" for loss in each["losses"]) for each in (ours, theirs)]
        figures = [f"{time_ratio:.2f} ({low:.2f} to {high:.2f})", *(f"{ratio:.2f}" for ratio in ratios)]
        print(f"| {name} | {' | '.join(figures)} | {curves[0]} | {curves[1]} |")
    print()


def _print_all(wanted: list[str], peaks: dict, times: dict) -> None:
    print("| Method | Time / full AdamW | CPU time / full AdamW | Peak MiB | Rise MiB |")
    print("|---|---|---|---|---|")
    for name in peaks:
        group = times.get(name.removesuffix("-package")) or times[wanted[0]]
        figures = [_ratio(group[name], group["full"], figure)[1] for figure in ("seconds", "cpu")]
        peak, rise = peaks[name]["peak"] / MEBIBYTE, peaks[name]["rise"] / MEBIBYTE
        print(f"| {name} | {' | '.join(f'{each:.2f}' for each in figures)} | {peak:.0f} | {rise:.0f} |")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
