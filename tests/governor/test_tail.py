import pytest

from hf_eff.errors import OptionError
from hf_eff.governor.tail import Tail, TailConfig
from hf_eff.testing.tapes import Tape, falling, flat, play, rising

LONG = {"steps": 1000, "limit": 144.0}  # the limit ends it


@pytest.mark.parametrize("curve", [falling, flat, rising])
@pytest.mark.parametrize("epsilon", [0.02, 0.2])
def test_stops_where_the_rest_adds_less_than_epsilon_of_the_gain(literal, watched, curve, epsilon):
    looks, decisions = watched(Tail(TailConfig(epsilon=epsilon)), Tape(curve, noise=0.01, **LONG))

    def law(spent, limit, gain, level):
        return limit - spent, epsilon * max(0.0, -level)

    at_probes = [each for look, each in zip(looks, decisions, strict=True) if look.probe is not None]
    expected = literal(looks, law)
    assert [each.action == "stop" for each in at_probes] == expected
    assert any(expected) or (curve is falling and epsilon == 0.02)
    assert not all(expected)


def test_a_larger_share_stops_earlier():
    ends = [play(Tail(TailConfig(epsilon=share)), Tape(falling, **LONG)).last_step for share in (0.01, 0.1, 0.3)]
    assert ends[0] > ends[1] > ends[2]


def test_the_unit_of_the_loss_does_not_matter():
    small = Tape(falling, limit=40.0, steps=1000, noise=0.0)
    ends = {play(Tail(TailConfig(epsilon=0.1, prior_scale=scale)), tape).last_step for scale, tape in _scaled(small)}
    assert len(ends) == 1


def _scaled(tape):
    yield 3.0, tape
    yield 300.0, Tape(lambda c: 100.0 * tape.curve(c), limit=tape.limit, steps=tape.steps, noise=0.0)


@pytest.mark.parametrize("options", [{"epsilon": -0.1}, {"epsilon": 1.1}, {"delta": 2.0}])
def test_options_outside_their_bounds_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        TailConfig(**options)
