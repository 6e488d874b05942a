from __future__ import annotations

import math

import numpy as np
import pytest

from hf_eff.contracts.governor import ProbeReading, Telemetry
from hf_eff.simulation.calibration import (
    BINS,
    calibration_on_curves,
    next_probe_ranks,
    render_calibration,
    summarise,
)
from hf_eff.simulation.curves import STEPS, make_curve, make_curves
from hf_eff.simulation.stopping import aims_of, registered, watch


def line(count, noise, claimed, seed=0, slope=1.0):
    """Looks at a loss that falls along a line, read with one noise while another is claimed."""
    generator, looks, previous = np.random.default_rng(seed), [], None
    for index in range(count):
        share = (index + 1) / count
        mean = 3.0 - slope * share + float(generator.normal(0.0, noise))
        delta, error = (None, None) if previous is None else (previous - mean, math.sqrt(2.0) * claimed)
        looks.append(
            Telemetry(
                step=index + 1,
                max_steps=count,
                spent={"flops": share},
                limits={"flops": 1.0},
                compute=share,
                compute_limit=1.0,
                probe=ProbeReading(mean, delta, error, 64),
                learning_rate=1.0,
                peak_learning_rate=1.0,
            )
        )
        previous = mean
    return looks


def test_scores_are_those_of_ten_lines():
    checks = [(0.05, False), (0.05, True), (0.55, True), (0.95, True), (1.0, True), (0.0, False)]
    ranks = [0.05, 0.15, 0.15, 0.95]
    found = summarise(checks, ranks)
    assert found.brier == pytest.approx(np.mean([(p - came) ** 2 for p, came in checks]))
    assert found.brier_of_rate == pytest.approx((4 / 6) * (2 / 6))
    assert found.counts == [3, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert found.stated[0] == pytest.approx(0.1 / 3)
    assert found.came[0] == pytest.approx(1 / 3)
    assert found.stated[1] is None
    assert found.stated[9] == pytest.approx(0.975)
    assert found.ranks == [0.25, 0.5, 0, 0, 0, 0, 0, 0, 0, 0.25]
    assert found.distance == pytest.approx(0.6)


def test_chances_that_come_true_have_a_small_brier_score():
    generator = np.random.default_rng(0)
    chances = generator.uniform(size=4000)
    came = generator.uniform(size=4000) < chances
    fair = summarise(list(zip(chances, came, strict=True)), generator.uniform(size=4000))
    assert all(abs(a - b) < 0.08 for a, b in zip(fair.stated, fair.came, strict=True))
    assert fair.distance < 0.03
    lying = summarise(list(zip(1.0 - chances, came, strict=True)), np.sqrt(generator.uniform(size=4000)))
    assert lying.brier > 2.0 * fair.brier
    assert lying.distance > 0.2


def test_ranks_of_a_line_are_even_where_the_noise_is_as_claimed():
    ranks = [rank for seed in range(6) for rank in next_probe_ranks(line(60, 0.01, 0.01, seed))]
    assert len(ranks) == 6 * 55
    assert np.mean(ranks) == pytest.approx(0.5, abs=0.06)
    assert np.std(ranks) == pytest.approx(math.sqrt(1 / 12), abs=0.06)


def test_a_probe_that_is_lower_than_predicted_has_a_low_rank():
    looks = line(30, 0.001, 0.001)
    drop = looks[-1].probe.mean - 0.05
    reading = ProbeReading(drop, looks[-2].probe.mean - drop, looks[-1].probe.paired_se, 64)
    lower = [*looks[:-1], Telemetry.from_dict({**looks[-1].to_dict(), "probe": vars(reading)})]
    assert next_probe_ranks(lower)[:-1] == next_probe_ranks(looks)[:-1]
    assert next_probe_ranks(lower)[-1] < 1e-6


def test_looks_without_a_probe_are_passed_over():
    looks = line(30, 0.01, 0.01)
    between = [Telemetry.from_dict({**look.to_dict(), "probe": None}) for look in looks]
    mixed = [each for pair in zip(looks, between, strict=True) for each in pair]
    assert next_probe_ranks(mixed) == next_probe_ranks(looks)


def test_checks_on_curves_are_those_of_a_run_that_nobody_stops():
    curves = make_curves(("power",), range(2))
    found = calibration_on_curves(curves, 0.0003)
    checks = []
    for curve in curves:
        for look, decision in watch(registered("marginal_gain", {}, aims_of(curve)), curve, 0.0003):
            if "probability" in decision.details:
                step, said = look.step, decision.details
                end = step / STEPS + said["stretch"]
                came = curve.loss[step] - np.interp(end, np.arange(STEPS + 1) / STEPS, curve.loss) > said["needed"]
                checks.append((said["probability"], came))
    assert found.checks == len(checks) > 100
    assert found.brier == pytest.approx(np.mean([(p - came) ** 2 for p, came in checks]))
    assert found.brier < found.brier_of_rate
    assert sum(found.ranks) == pytest.approx(1.0)


def test_the_table_has_a_line_a_tenth():
    found = summarise([(0.05, True), (0.95, True)], [0.5])
    lines = render_calibration(found).splitlines()
    assert len([each for each in lines if each.startswith("| 0.")]) == BINS
    assert "2 checks" in lines[-1]
    assert make_curve("power", 0).family == "power"
