"""``hf-eff race``: several runs share one budget; losers are stopped early, and the best one is named."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json, stdout_reserved
from hf_eff.errors import OptionError
from hf_eff.files import write_text
from hf_eff.units import format_amount

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_eff.cli.run_flags import RunFlags
    from hf_eff.contracts.budget import Budget
    from hf_eff.race import Advance, RacePlan, RaceRecord, RunRecord

_UNITS = {"flops": "flop", "tokens": "tok", "steps": "steps", "seconds": "s", "bytes": "B", "kwh": "kWh", "usd": "usd"}
_DEFAULTS = {"lr_scheduler_type": "constant", "disable_tqdm": True, "report_to": "none"}
"""Of every run; nobody knows beforehand where a run will end, so that no schedule can lead there."""
_FORCED = {"save_strategy": "steps", "save_steps": 10**9, "save_total_limit": None}
"""Checkpoints are written at the end of a slice and at no other time."""
_SETTINGS, _LOG = "settings.yaml", "_train.log"


def run(argv: Sequence[str]) -> int:
    """Race; print the table and the winner's folder. The same command goes on with a race that was interrupted.

    Raises:
        OptionError: A setting of the race or of a run is wrong.
    """
    options = _parser().parse_args(list(argv))
    from hf_eff.race import Race, read_race

    plan, named = read_race(options.race, options.budget)
    folder = Path(options.output_dir or named or Path(options.race).stem)
    with stdout_reserved(options.json):
        contenders = _Contenders(plan, folder)
        record = Race(plan, folder).run(contenders.advance)
    if options.json:
        print_json(summary(record, plan, folder))
    else:
        print(_table(record, plan, folder))
    return 0


def summary(record: RaceRecord, plan: RacePlan, folder: Path) -> dict[str, Any]:
    """JSON-able outcome: why the race ended, what was spent, each run, and the winner with its folder."""
    winner = record.winner
    return {
        "output_dir": str(folder),
        "ended": record.ended,
        "rounds": record.round,
        "budget": dict(plan.budget.limits),
        "spent": record.total(),
        "runs": [
            {
                "name": each.name,
                "steps": each.steps,
                "spent": {**each.spent},
                "share": record.share(each.spent),
                "readings": {**each.reading_spent},
                "loss": each.readings[-1].mean if each.readings else None,
                "ended": each.ended or record.ended,
                "failed": each.failed,
            }
            for each in record.runs.values()
        ],
        "winner": None if winner is None else winner.name,
        "winner_dir": None if winner is None else str(folder / winner.name),
    }


def _parser() -> SentenceErrors:
    parser = SentenceErrors(prog="hf-eff race", description=COMMANDS["race"], allow_abbrev=False)
    parser.add_argument(
        "race", type=Path, help="YAML file: 'runs' (name: settings of train), 'all' (settings of every run), 'budget'"
    )
    parser.add_argument("--budget", help="what all runs share, such as '2h' or '3e15flop'; overrides the file's")
    parser.add_argument("--output_dir", help="folder of the race; overrides the file's; default: the file's name")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and the rest on stderr")
    return parser


class _Contenders:
    """Builds the trainer of a run from its settings, as ``train`` does, anew for each slice.

    All settings are read once beforehand, so that a mistake in the last run is told before the first one starts.

    Raises:
        OptionError: A setting is wrong, a run has no held-out rows, or several processes take part.
    """

    def __init__(self, plan: RacePlan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        for name, settings in plan.runs.items():
            self._write_settings(name, settings)
            flags, args = self._parsed(name)
            if flags.eval_dataset is None and flags.eval_split is None:
                raise OptionError(f"runs.{name}: a race compares held-out losses; give eval_dataset or eval_split.")
            if args.world_size > 1:
                raise OptionError("a race runs in one process; start it without torchrun or accelerate launch.")

    def advance(self, run: RunRecord, until: Mapping[str, float], left: Mapping[str, float]) -> Advance:
        """One slice of one run; what it prints goes to a file in its folder."""
        from hf_eff.cli.train import build_trainer
        from hf_eff.race import advance

        with _said(self._folder / run.name / _LOG):
            trainer: Any = build_trainer(*self._parsed(run.name))
            try:
                return advance(trainer, self._plan, run, until, left)
            finally:
                trainer.accelerator.free_memory()
                del trainer
                gc.collect()

    def _write_settings(self, name: str, settings: Mapping[str, Any]) -> None:
        """The run's options as one file, which ``train --config`` reads, too."""
        import yaml

        own = {key.replace("-", "_"): value for key, value in settings.items() if key not in ("budget", "recipe")}
        budget = _both(self._plan.budget, settings.get("budget"))
        every = {**_DEFAULTS, **own, **_FORCED, "output_dir": str(self._folder / name), "budget": budget}
        write_text(self._folder / name / _SETTINGS, yaml.safe_dump(every, sort_keys=False, allow_unicode=True))

    def _parsed(self, name: str) -> tuple[RunFlags, TrainingArguments]:
        from hf_eff.cli.run_flags import parse_run

        recipe = self._plan.runs[name].get("recipe")
        words = ["--config", str(self._folder / name / _SETTINGS), *(("--recipe", str(recipe)) if recipe else ())]
        try:
            return parse_run(words, "train")
        except OptionError as error:
            raise OptionError(f"runs.{name}: {error}") from error


def _both(shared: Budget, own: str | None) -> str:
    """The shared limits as the run's own, or lower ones that it sets itself."""
    from hf_eff.contracts.budget import Budget

    limits = dict(shared.limits)
    for name, limit in Budget.parse(own).limits.items():
        limits[name] = min(limit, limits.get(name, limit))
    return ", ".join(f"{limit!r}{_UNITS[name]}" for name, limit in limits.items())


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Send what is printed to a file: the runs' plans and logs would bury the race's own lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def _table(record: RaceRecord, plan: RacePlan, folder: Path) -> str:
    from hf_eff.report.markdown import table

    currency = next(iter(plan.shared))
    rows = [
        (
            each.name,
            each.steps,
            f"{format_amount(currency, each.spent.get(currency, 0.0))} ({record.share(each.spent):.1%})",
            f"{each.readings[-1].mean:.4f}" if each.readings and each.readings[-1].mean is not None else "unknown",
            each.ended or record.ended,
        )
        for each in sorted(record.runs.values(), key=lambda run: (run.failed, run.loss))
    ]
    readings = record.share(
        {name: sum(run.reading_spent.get(name, 0.0) for run in record.runs.values()) for name in record.limits}
    )
    lines = [
        table(["run", "steps", "compute", "held-out loss", "why it ended"], rows),
        f"The race ended after {record.round} rounds: {record.ended}. Of the budget {1.0 - record.left_share():.1%} is "
        f"spent, {readings:.1%} on readings.",
        "No run has a held-out loss."
        if record.winner is None
        else f"Winner: {record.winner.name}, in {folder / record.winner.name}.",
    ]
    return "\n\n".join(lines)
