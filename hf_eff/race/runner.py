"""The loop of a race: rounds of equal compute, standings, verdicts; it can be killed anywhere and called again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_eff.engines.gain_thresholds import BEGINNING
from hf_eff.errors import CheckpointError, DataError
from hf_eff.files import require_writable
from hf_eff.race.plan import RacePlan
from hf_eff.race.record import RACE, Advance, RaceRecord, RunRecord
from hf_eff.race.standings import Standing, best_rate, judge, threshold

Turn = Callable[[RunRecord, Mapping[str, float], Mapping[str, float]], Advance]
"""Lets one run advance: its record, what it may spend in all this round, what is left of the shared budget. It must
spend no more than that, readings included, and do the same from the same record."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")


class Race:
    """Runs that share one budget.

    In each round every live run advances to the same compute; then all are compared, and those that cannot win or no
    longer pay are stopped. What they leave goes to the others. ``race.json`` is replaced after every turn, and a turn
    that was cut short is done again from the checkpoint before it, so that an interrupted race ends as an uninterrupted
    one does.

    Args:
        plan: What competes for what.
        folder: Where the race's record and a folder for each run are.

    Raises:
        OptionError: The folder cannot be written.
        CheckpointError: It holds a race with other settings.
    """

    def __init__(self, plan: RacePlan, folder: str | Path) -> None:
        self.plan = plan
        self.folder = require_writable(folder)
        found = RaceRecord.read(self.folder)
        if found is not None and (found.digest != plan.digest or set(found.runs) != set(plan.runs)):
            raise CheckpointError(
                f"{str(self.folder / RACE)!r} belongs to a race with other settings; use those, or another output_dir."
            )
        runs = {name: found.runs[name] if found is not None else RunRecord(name) for name in plan.runs}
        self.record = found or RaceRecord(plan.digest, plan.shared, runs)
        self.record.runs = runs
        if found is None:
            self.record.write(self.folder)

    def run(self, turn: Turn, *, show_progress: bool = True) -> RaceRecord:
        """Go on until the budget is spent or no run is left.

        Args:
            turn: Lets one run advance.
            show_progress: Whether to show a bar.

        Raises:
            DataError: The runs do not read the same held-out examples.
        """
        record = self.record
        with tqdm(total=100.0, desc="budget", unit="%", disable=not show_progress, bar_format=_BAR) as bar:
            _show(bar, record)
            while not record.ended:
                if len(record.judged) == record.round:
                    self._begin_round()
                while record.waiting:
                    self._take_turn(record.runs[record.waiting[0]], turn)
                    _show(bar, record)
                self._end_round(bar)
                record.write(self.folder)
        return record

    def _begin_round(self) -> None:
        """Give every live run the same next level; a larger one each time that the last covered nobody's next step."""
        record = self.record
        record.idle = 0 if record.moved or record.round == 0 else record.idle + 1
        record.level += min(self.plan.slice_share, self._most()) * 2.0**record.idle
        record.round += 1
        record.moved = False
        record.waiting = [run.name for run in record.live]
        record.write(self.folder)

    def _most(self) -> float:
        """Share of the budget that each live run could still train for, if all get the same and are read."""
        record = self.record
        readings = [record.share(run.reading_spent) / max(1, len(run.readings)) for run in record.live]
        return record.left_share() / len(record.live) - max(readings)

    def _take_turn(self, run: RunRecord, turn: Turn) -> None:
        record, before = self.record, run.steps
        _prune(self.folder / run.name, run.checkpoint)
        run.take(turn(run, record.until(), record.left()))
        self._require_same_examples()
        record.moved = record.moved or run.steps > before
        record.waiting = record.waiting[1:]
        record.write(self.folder)
        _prune(self.folder / run.name, run.checkpoint)

    def _require_same_examples(self) -> None:
        read = {run.probe["examples"] for run in self.record.runs.values() if run.probe is not None}
        if len(read) > 1:
            raise DataError(
                "the runs of a race must be read on the same held-out rows, tokenised alike; give all of them one "
                "eval_dataset, one tokenizer and one max_length."
            )

    def _end_round(self, bar: Any) -> None:
        """Compare all runs, stop those with a verdict, and see whether the race is over."""
        record, plan = self.record, self.plan
        began = record.judged[-1]["spent_share"] if record.judged else 0.0
        if began <= BEGINNING or record.best_rate == 0.0:
            record.best_rate = max(record.best_rate, best_rate(record.runs.values()))
        standings = judge(plan, record)
        for each in standings:
            if each.verdict:
                record.runs[each.name].ended = each.verdict
            if each.verdict and not bar.disable:
                bar.write(f"round {record.round}: {each.name} is stopped: {each.verdict}")
        record.judged.append(self._entry(standings))
        record.ended = self._over()

    def _entry(self, standings: list[Standing]) -> dict[str, Any]:
        record = self.record
        spent = 1.0 - record.left_share()
        return {
            "round": record.round,
            "spent_share": spent,
            "threshold": threshold(spent, record.best_rate, self.plan.epsilon),
            "standings": [vars(each) for each in standings],
        }

    def _over(self) -> str:
        record = self.record
        if not record.live:
            return "no run is left that may go on"
        # As long as the level still bounds a run, a higher one may admit its next step.
        left = record.left_share()
        bounded = any(record.level < record.share(run.spent) + left for run in record.live)
        if self._most() <= 0.0 or not (record.moved or bounded):
            return "the budget is spent: what is left covers no further step"
        return ""


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


def _show(bar: Any, record: RaceRecord) -> None:
    leader = record.winner
    bar.n = 100.0 * (1.0 - record.left_share())
    bar.set_postfix_str("" if leader is None else f"round {record.round}, {leader.name} leads with {leader.loss:.4g}")


def _prune(folder: Path, kept: str | None) -> None:
    """Delete checkpoints but the one to go on from: a turn that was cut short leaves later ones behind."""
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and path.name != kept and _CHECKPOINT.fullmatch(path.name):
            shutil.rmtree(path)
