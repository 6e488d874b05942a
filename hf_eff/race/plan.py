"""What competes for what: the settings file of a race, checked before anything is spent."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hf_eff.contracts.budget import Budget
from hf_eff.errors import OptionError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OWN = (
    *("output_dir", "resume_from_checkpoint", "push_to_hub", "load_best_model_at_end", "json", "config"),
    *("save_strategy", "save_steps", "save_total_limit"),
)
"""Options of ``train`` that the race decides."""


@dataclass(frozen=True, kw_only=True)
class RacePlan:
    """Runs and the budget that they share.

    Attributes:
        budget: Limits that all runs together keep; at least one of them adds up (not bytes alone).
        runs: Name to the settings of that run, as ``train`` takes them.
        rounds: Slices that each run would get if none were stopped.
        examples: Held-out examples that every run is read on, the same for all.
        seed: Decides which ones.
        epsilon: Lowest gain rate worth its compute, relative to the best early one; 0 stops no run for its rate.
        delta: A rate counts as too low when the chance that it is high enough is smaller.
        margin: Standard deviations by which a run must be beaten to be stopped.

    Raises:
        OptionError: A value is out of its bounds, or fewer than two runs are named.
    """

    budget: Budget
    runs: Mapping[str, Mapping[str, Any]]
    rounds: int = 20
    examples: int = 128
    seed: int = 0
    epsilon: float = 0.02
    delta: float = 0.3
    margin: float = 2.0

    def __post_init__(self) -> None:
        """Check everything."""
        if not self.shared:
            raise OptionError("a race needs a budget that adds up, such as --budget '2h' or '3e15flop'.")
        if len(self.runs) < 2:
            raise OptionError("a race needs two runs or more under 'runs', each 'name: settings'.")
        for name, settings in self.runs.items():
            _check_run(name, settings)
        lowest = {"rounds": 1, "examples": 2, "seed": 0, "epsilon": 0.0, "delta": 0.0, "margin": 0.0}
        for name, low in lowest.items():
            value = getattr(self, name)
            kinds = (int,) if name in ("rounds", "examples", "seed") else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= low:
                raise OptionError(f"{name} must be a number of at least {low}, got {value!r}.")
        if self.epsilon > 1.0 or self.delta > 1.0:
            raise OptionError(f"epsilon and delta are at most 1, got {self.epsilon!r} and {self.delta!r}.")

    @property
    def shared(self) -> dict[str, float]:
        """The limits that add up; peak bytes are a limit of each run."""
        return {name: limit for name, limit in self.budget.limits.items() if name != "bytes"}

    @property
    def slice_share(self) -> float:
        """Share of the budget by which a run advances in a round."""
        return 1.0 / (self.rounds * len(self.runs))

    @property
    def digest(self) -> str:
        """Changes with every setting: a race is resumed only with its own."""
        facts = {**asdict(self), "budget": dict(self.budget.limits)}
        return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def read_race(path: str | Path, budget: str | None = None) -> tuple[RacePlan, str | None]:
    """Read a settings file.

    Its keys are those of ``RacePlan``, ``all`` (settings of every run, which a run's own override) and ``output_dir``.

    Args:
        path: A YAML file.
        budget: Replaces the file's.

    Returns:
        The plan, and the file's output folder or None.

    Raises:
        OptionError: The file cannot be read or asks for what does not exist.
    """
    values = _read(Path(path))
    known = [field.name for field in fields(RacePlan)]
    for key in values:
        if key not in (*known, "all", "output_dir"):
            near = difflib.get_close_matches(str(key), [*known, "all", "output_dir"], n=1)
            raise OptionError(f"the race has no option {key!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
    every, folder = _settings("all", values.pop("all", None)), values.pop("output_dir", None)
    runs = _settings("runs", values.pop("runs", None))
    named = {str(name): {**every, **_settings(f"runs.{name}", settings)} for name, settings in runs.items()}
    limits = Budget.parse(budget if budget is not None else values.pop("budget", None))
    values.pop("budget", None)
    return RacePlan(budget=limits, runs=named, **values), folder


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"race {str(path)!r} cannot be read ({getattr(error, 'strerror', error)}).") from None
    except yaml.YAMLError as error:
        raise OptionError(f"race {str(path)!r} is not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(values, dict):
        raise OptionError(f"race {str(path)!r} must hold 'option: value' lines, got {type(values).__name__}.")
    return values


def _settings(where: str, values: Any) -> dict[str, Any]:
    if values is not None and not isinstance(values, Mapping):
        raise OptionError(f"{where} must hold 'option: value' lines, got {type(values).__name__}.")
    return {str(key): value for key, value in (values or {}).items()}


def _check_run(name: Any, settings: Any) -> None:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or ".." in name:
        raise OptionError(f"a run's name is a folder's name of letters, digits, '.', '_' and '-', got {name!r}.")
    if not isinstance(settings, Mapping):
        raise OptionError(f"runs.{name} must hold 'option: value' lines, got {type(settings).__name__}.")
    for key in settings:
        if str(key).replace("-", "_") in _OWN:
            raise OptionError(f"runs.{name}: {key!r} is decided by the race; leave it out.")
