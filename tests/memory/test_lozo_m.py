"""LOZO-M: with no memory of the past it is LOZO, and its state is one thin factor a matrix."""

import pytest

from hf_eff.errors import OptionError
from hf_eff.memory import lozo
from hf_eff.memory.lozo_m import SPEC
from hf_eff.testing.update_scene import UpdateScene, apart, facts_of, toy

RANK = 4


def scene(spec=SPEC, **options):
    return UpdateScene(spec, toy(), lr=1e-3, rank=RANK, refresh_every=2, **options)


def test_without_momentum_it_is_lozo():
    plain = scene(lozo.SPEC).steps(*range(5)).weights()
    assert apart(plain, scene(momentum=0.0).steps(*range(5)).weights()) < 1e-6
    assert apart(plain, scene(momentum=0.9).steps(*range(5)).weights()) > 1e-4


def test_state_is_what_the_plan_says():
    predicted = SPEC.cost(SPEC.config(rank=RANK), facts_of(toy())).bytes["optimizer"]
    rows = sum(each.shape[0] if each.dim() > 1 else 0 for _, each in toy().named_parameters())
    vectors = sum(each.numel() for _, each in toy().named_parameters() if each.dim() == 1)
    assert predicted == 4 * (RANK * rows + vectors)
    assert scene().measured()["optimizer"] == pytest.approx(predicted, rel=0.02)


def test_momentum_is_bounded():
    with pytest.raises(OptionError, match="momentum"):
        scene(momentum=1.0)
