"""The simulated problems against closed forms, and the criterion on a small table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_eff.numerics.refresh_law import fresh_gain
from hf_eff.simulation.refreshing import (
    PERIODS,
    UPLIFTS,
    Problem,
    best_in_hindsight,
    know_all,
    make_problems,
    play,
    play_period,
    refresh_table,
)

PROBLEM = Problem(uplift=1.0, lifetime=0.2, cost=0.02, noise=0.01, bend=0.0, seed=0)


def never(run):
    return False


def test_training_gains_the_integral_of_the_rate():
    run = play(PROBLEM, never, probing=False)
    assert run.log_loss == pytest.approx(-fresh_gain(1.0, 1.0, 0.2))
    assert run.spent == pytest.approx(1.0)
    assert run.overhead == 0.0


def test_a_period_is_whole_cycles_and_a_rest():
    # 0.3 + 0.02 thrice is 0.96; the fourth cycle has 0.04 left.
    expected = 3 * fresh_gain(0.3, 1.0, 0.2) + fresh_gain(0.04, 1.0, 0.2)
    assert play_period(PROBLEM, 0.3) == pytest.approx(-expected)
    assert play_period(PROBLEM, math.inf) == pytest.approx(-fresh_gain(1.0, 1.0, 0.2))


def test_bent_returns_are_a_power_law():
    bent = Problem(uplift=0.0, lifetime=1.0, cost=0.1, noise=0.01, bend=3.0, seed=0)
    assert play_period(bent, math.inf) == pytest.approx(-math.log(4.0) / 3.0)


def test_hindsight_is_the_least_of_all_periods():
    best = best_in_hindsight(PROBLEM)
    assert best == min(play_period(PROBLEM, period) for period in PERIODS)
    assert best < play_period(PROBLEM, math.inf)
    assert best_in_hindsight(Problem(0.0, 0.2, 0.02, 0.01, 0.0, 0)) == pytest.approx(-1.0)


def test_who_knows_all_is_as_good_as_hindsight():
    gaps = [play(case, know_all, probing=False).log_loss - best_in_hindsight(case) for case in make_problems(1, 20)]
    assert np.mean(gaps) < 0.005
    assert max(gaps) < 0.05


def test_a_run_spends_its_budget_and_no_more():
    for case in make_problems(2, 4):
        run = play(case, lambda run: run.age > 0.05)
        assert run.spent == pytest.approx(1.0)
        assert run.overhead == pytest.approx(run.refreshes * case.cost + 0.0002 * len(run.levels))


def test_problems_cover_the_uplifts_evenly():
    problems = make_problems(0, 100)
    assert [sum(case.uplift == uplift for case in problems) for uplift in UPLIFTS] == [25] * 4
    assert make_problems(0, 100) == problems
    assert make_problems(1, 100) != problems


@pytest.mark.parametrize("bend", [0.0, 3.0])
def test_the_governor_beats_every_fixed_period_and_the_undamped_rule(bend):
    rows = {row["policy"]: row for row in refresh_table(0, 24, bend)}
    fixed = min(rows[name]["mean"] for name in ("never", "every 0.1", "every 0.25"))
    assert rows["oracle"]["mean"] < 0.01
    assert rows["governor"]["mean"] < fixed
    assert rows["governor"]["mean"] < 0.3 * rows["undamped"]["mean"]
    assert rows["governor"]["overhead"] <= 0.18


def test_the_table_is_the_same_each_time():
    assert refresh_table(3, 4) == refresh_table(3, 4)
