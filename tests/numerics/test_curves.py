import math
import timeit

import numpy as np
import pytest

from hf_eff.errors import DataError
from hf_eff.numerics.curves import FAMILIES, curve_values, fit_curves

# What each test compares with is written out curve by curve and probe by probe, in plain floats.


def literal_grid():
    curves = {}
    for alpha in (0.15, 0.3, 0.5, 0.8, 1.2, 2.0):
        for c0 in (0.003, 0.01, 0.03, 0.1, 0.3):
            curves[f"pow(alpha={alpha:g},c0={c0:g})"] = lambda c, alpha=alpha, c0=c0: (1 + c / c0) ** -alpha
    for t in (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6):
        curves[f"exp(t={t:g})"] = lambda c, t=t: math.exp(-c / t)
    curves["lin"] = lambda c: -c
    return curves


def cdf(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def literal_forecast(clock, levels, weights, se, horizon, threshold, scale, clip=True):
    rows, points = [], list(zip(weights, clock, levels, strict=True))
    for name, phi in literal_grid().items():
        w_sum = sum(weights)
        x_mean = sum(w * phi(c) for w, c, _ in points) / w_sum
        y_mean = sum(w * y for w, _, y in points) / w_sum
        sxx = sum(w * (phi(c) - x_mean) ** 2 for w, c, _ in points)
        sxy = sum(w * (phi(c) - x_mean) * (y - y_mean) for w, c, y in points)
        a = sxy / (sxx + se**2 / scale**2)
        a = max(0.0, a) if clip else a
        rss = sum(w * (y - y_mean - a * (phi(c) - x_mean)) ** 2 for w, c, y in points)
        s2 = (rss + 2 * se**2) / (w_sum + 2)
        evidence = -0.5 * w_sum * math.log(s2) - 0.5 * math.log(sxx / s2 + 1 / scale**2) - math.log(scale)
        drop = phi(clock[-1]) - phi(clock[-1] + horizon)
        sd = math.sqrt(s2 / (sxx + s2 / scale**2)) * abs(drop)
        rows.append((name, evidence, a * drop, cdf((a * drop - threshold) / sd)))
    top = max(evidence for _, evidence, _, _ in rows)
    total = sum(math.exp(evidence - top) for _, evidence, _, _ in rows)
    pi = [math.exp(evidence - top) / total for _, evidence, _, _ in rows]
    return {
        "gain": sum(p * gain for p, (_, _, gain, _) in zip(pi, rows, strict=True)),
        "probability": sum(p * above for p, (_, _, _, above) in zip(pi, rows, strict=True)),
        "family": rows[max(range(len(pi)), key=pi.__getitem__)][0],
        "entropy": -sum(p * math.log(p) for p in pi if p > 0),
    }


def observed(shape, count=40, noise=0.01, seed=0, end=0.6):
    generator = np.random.default_rng(seed)
    clock = np.geomspace(0.004, end, count)
    levels = shape(clock) + generator.normal(0.0, noise, count)
    return clock, levels, 0.95 ** np.arange(count)[::-1]


SHAPES = {
    "power": lambda c: 1.0 + 1.3 * (1 + c / 0.02) ** -0.6,
    "exponential": lambda c: 0.4 + 2.0 * np.exp(-c / 0.07),
    "line": lambda c: 3.0 - 0.8 * c,
    "rising": lambda c: 1.0 + 0.5 * c,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [3.0, 0.1])
def test_equals_the_loop(shape, scale):
    clock, levels, weights = observed(SHAPES[shape])
    posterior = fit_curves(clock, levels, weights, noise_sd=0.01, prior_scale=scale)
    forecast = posterior.forecast(clock[-1], 0.05, 0.004)
    plain = [each.tolist() for each in (clock, levels, weights)]
    expected = literal_forecast(*plain, 0.01, 0.05, 0.004, scale)
    assert forecast.gain == pytest.approx(expected["gain"], rel=1e-9, abs=1e-15)
    assert forecast.probability == pytest.approx(expected["probability"], rel=1e-9)
    assert forecast.entropy == pytest.approx(expected["entropy"], rel=1e-8)
    assert forecast.family == expected["family"]
    free = literal_forecast(*plain, 0.01, 0.05, 0.0, scale, clip=False)
    assert forecast.negative == pytest.approx(1.0 - free["probability"], rel=1e-8, abs=1e-14)


def test_the_grid_is_the_documented_one():
    grid = literal_grid()
    assert list(grid) == list(FAMILIES)
    clock = [0.0, 0.013, 0.4, 1.0]
    expected = [[phi(c) for c in clock] for phi in grid.values()]
    np.testing.assert_allclose(curve_values(clock), expected, rtol=1e-13)


ON_THE_GRID = {
    "pow(alpha=0.5,c0=0.03)": lambda c: 1.0 + 1.3 * (1 + c / 0.03) ** -0.5,
    "pow(alpha=1.2,c0=0.1)": lambda c: 1.0 + 1.3 * (1 + c / 0.1) ** -1.2,
    "exp(t=0.15)": lambda c: 0.4 + 2.0 * np.exp(-c / 0.15),
    "lin": lambda c: 3.0 - 0.8 * c,
}


@pytest.mark.parametrize("name", ON_THE_GRID)
def test_recovers_the_family_and_what_it_still_offers(name):
    truth = ON_THE_GRID[name]
    clock, levels, weights = observed(truth, count=80, noise=0.001, end=0.3)
    forecast = fit_curves(clock, levels, weights, noise_sd=0.001).forecast(0.3, 0.3, 0.0)
    assert forecast.family[:3] == name[:3]
    assert forecast.gain == pytest.approx(float(truth(0.3) - truth(0.6)), rel=0.1)
    assert forecast.negative < 1e-6


def test_a_rising_loss_is_recognised():
    clock, levels, weights = observed(SHAPES["rising"], noise=0.005)
    forecast = fit_curves(clock, levels, weights, noise_sd=0.005).forecast(0.6, 0.1, 0.001)
    assert forecast.negative > 0.999
    assert forecast.gain == pytest.approx(0.0, abs=1e-9)


def drawn_from_the_prior(generator):
    """A curve of the grid with a falling amplitude, watched up to a random moment."""
    grid = list(literal_grid().values())
    phi, height = grid[generator.integers(len(grid))], abs(generator.normal(0.0, 1.0))
    noise, end = 10 ** generator.uniform(-2.5, -1.5), generator.uniform(0.1, 0.6)
    clock = np.geomspace(0.003, end, generator.integers(12, 60))
    levels = np.array([height * phi(c) for c in clock]) + generator.normal(0.0, noise, len(clock))
    return clock, levels, noise, height * (phi(end) - phi(end + 0.1))


def test_probabilities_mean_what_they_say():
    generator = np.random.default_rng(5)
    said, came = [], []
    for _ in range(600):
        clock, levels, noise, gain = drawn_from_the_prior(generator)
        posterior = fit_curves(clock, levels, np.ones(len(clock)), noise_sd=noise)
        threshold = posterior.forecast(clock[-1], 0.1).gain * generator.choice([0.5, 0.8, 1.25, 2.0])
        said.append(posterior.forecast(clock[-1], 0.1, threshold).probability)
        came.append(gain > threshold)
    said, came = np.array(said), np.array(came)
    brier = np.mean((said - came) ** 2)
    assert brier < 0.12
    for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.001)):
        inside = (said >= low) & (said < high)
        assert inside.sum() > 50
        assert came[inside].mean() == pytest.approx(said[inside].mean(), abs=0.12), (low, high)


def test_one_step_predictions_cover_new_observations():
    generator = np.random.default_rng(6)
    scores = []
    for _ in range(300):
        clock, levels, noise, _ = drawn_from_the_prior(generator)
        mean, sd = fit_curves(clock[:-1], levels[:-1], np.ones(len(clock) - 1), noise_sd=noise).predict(clock[-1])
        scores.append((levels[-1] - mean) / sd)
    assert 0.7 < np.std(scores) < 1.4
    assert np.mean(np.abs(scores) > 4.0) < 0.01


@pytest.mark.parametrize("factor", [1e-3, 40.0])
def test_the_unit_of_the_loss_does_not_matter(factor):
    clock, levels, weights = observed(SHAPES["power"])
    plain = fit_curves(clock, levels, weights, noise_sd=0.01).forecast(0.6, 0.05, 0.004)
    scaled = fit_curves(clock, 7.0 + factor * levels, weights, noise_sd=factor * 0.01, prior_scale=factor * 3.0)
    forecast = scaled.forecast(0.6, 0.05, factor * 0.004)
    assert forecast.gain == pytest.approx(factor * plain.gain, rel=1e-6)
    assert forecast.probability == pytest.approx(plain.probability, rel=1e-6)
    assert forecast.negative == pytest.approx(plain.negative, rel=1e-6, abs=1e-12)
    assert forecast.family == plain.family


def test_probes_without_weight_count_for_nothing():
    clock, levels, weights = observed(SHAPES["exponential"])
    weights[:20] = 0.0
    whole = fit_curves(clock, levels, weights, noise_sd=0.01).forecast(0.6, 0.05, 0.001)
    part = fit_curves(clock[20:], levels[20:], weights[20:], noise_sd=0.01).forecast(0.6, 0.05, 0.001)
    assert whole.gain == pytest.approx(part.gain, rel=1e-9)
    assert whole.probability == pytest.approx(part.probability, rel=1e-9)


@pytest.mark.parametrize("levels", [np.ones(6), np.linspace(1.0, 0.5, 6)], ids=["constant", "exact line"])
def test_observations_without_noise_stay_finite(levels):
    forecast = fit_curves(np.linspace(0.0, 0.5, 6), levels, np.ones(6), noise_sd=0.0).forecast(0.5, 0.05, 1e-6)
    values = (forecast.gain, forecast.probability, forecast.negative, forecast.entropy)
    assert all(math.isfinite(value) for value in values)
    assert forecast.gain == pytest.approx(levels[0] - levels[1] if levels[1] < 1 else 0.0, rel=0.5, abs=1e-9)


def test_takes_less_than_a_millisecond():
    clock, levels, weights = observed(SHAPES["power"], count=120)

    def call():
        fit_curves(clock, levels, weights, noise_sd=0.01).forecast(0.6, 0.05, 0.001)

    assert min(timeit.repeat(call, number=5, repeat=40)) / 5 < 1e-3


@pytest.mark.parametrize(
    ("clock", "levels", "weights"),
    [([0.1], [1.0], [1.0]), ([0.1, 0.2], [1.0], [1.0, 1.0]), ([0.1, 0.2], [1.0, math.nan], [1.0, 1.0])],
)
def test_what_cannot_be_fitted_is_an_error(clock, levels, weights):
    with pytest.raises(DataError, match="a curve fit needs"):
        fit_curves(clock, levels, weights, noise_sd=0.01)
