import statistics

import numpy as np
import pytest

from hf_eff.errors import DataError
from hf_eff.numerics.robust_slope import robust_slope


def literal_slope(x, y, window):
    x, y = list(x)[-window:], list(y)[-window:]
    pairs = [(i, j) for j in range(len(x)) for i in range(j) if x[i] != x[j]]
    slopes = [(y[j] - y[i]) / (x[j] - x[i]) for i, j in pairs]
    return statistics.median(slopes)


@pytest.mark.parametrize("count", [2, 3, 7, 8, 40])
@pytest.mark.parametrize("window", [2, 3, 8, 100])
def test_equals_the_loop(count, window):
    generator = np.random.default_rng(count)
    x, y = np.cumsum(generator.uniform(0.1, 2.0, count)), generator.normal(size=count)
    assert robust_slope(x, y, window) == pytest.approx(literal_slope(x, y, window), rel=1e-12)


def test_a_quarter_of_wild_points_moves_it_little():
    x = np.arange(20.0)
    y = -0.5 * x
    y[[3, 8, 11, 15, 19]] = [80.0, -70.0, 90.0, 60.0, 100.0]
    assert robust_slope(x, y, 20) == pytest.approx(-0.5, abs=0.15)
    assert abs(np.polyfit(x, y, 1)[0] + 0.5) > 1.0


def test_points_at_one_position_are_left_out():
    x, y = [0.0, 0.0, 2.0], [1.0, 3.0, 4.0]
    assert robust_slope(x, y, 3) == literal_slope(x, y, 3) == 1.0


@pytest.mark.parametrize(
    ("x", "y", "window"),
    [([1.0], [1.0], 8), ([1.0, 2.0], [1.0], 8), ([1.0, 2.0], [1.0, 2.0], 1), ([1.0, 1.0], [1.0, 2.0], 8)],
)
def test_no_slope_is_an_error(x, y, window):
    with pytest.raises(DataError, match="slope needs two"):
        robust_slope(x, y, window)
