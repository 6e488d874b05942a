"""Several runs that share one budget: each advances by slices of compute, and losers are stopped early.

``plan`` says what competes, ``standings`` compares and judges, ``record`` is what a race knows and writes down,
``slices`` lets one trainer advance to a fence, ``runner`` is the loop.
"""

from __future__ import annotations

from hf_eff.race.plan import RacePlan, read_race
from hf_eff.race.record import RACE, Advance, RaceRecord, Reading, RunRecord
from hf_eff.race.runner import Race
from hf_eff.race.slices import Slice, advance, fence

__all__ = [
    "RACE",
    "Advance",
    "Race",
    "RacePlan",
    "RaceRecord",
    "Reading",
    "RunRecord",
    "Slice",
    "advance",
    "fence",
    "read_race",
]
