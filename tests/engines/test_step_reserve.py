import json
import random

import pytest

from hf_eff.engines.step_reserve import StepReserve
from hf_eff.errors import OptionError


def test_is_the_quantile_by_counting():
    generator = random.Random(0)
    reserve, seen = StepReserve(quantile=0.9, window=50), []
    for _ in range(200):
        seen.append(generator.lognormvariate(0.0, 1.0))
        reserve.observe(seen[-1])
        latest = seen[-50:]
        enough = [value for value in latest if sum(other <= value for other in latest) >= 0.9 * len(latest)]
        assert reserve.reserve() == min(enough)


def test_few_steps_reserve_the_longest_and_none_nothing():
    reserve = StepReserve()
    assert reserve.reserve() == 0.0
    for seconds in (2.0, 9.0, 3.0):
        reserve.observe(seconds)
    assert reserve.reserve() == 9.0


def test_one_step_in_a_hundred_takes_longer():
    generator = random.Random(1)
    reserve, longer = StepReserve(), 0
    for step in range(6000):
        seconds = generator.lognormvariate(0.0, 0.5)
        longer += step >= 1000 and seconds > reserve.reserve()
        reserve.observe(seconds)
    assert 0.004 < longer / 5000 < 0.02


def test_resumes_exactly():
    whole, resumed = StepReserve(window=4), StepReserve(window=4)
    for seconds in (5.0, 1.0, 2.0, 3.0, 4.0):
        whole.observe(seconds)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for each in (whole, resumed):
        each.observe(1.5)
    assert whole.reserve() == resumed.reserve() == 4.0
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("options", [{"quantile": 0.0}, {"quantile": 1.1}, {"window": 0}])
def test_options_out_of_range(options):
    with pytest.raises(OptionError, match="quantile must be in"):
        StepReserve(**options)
