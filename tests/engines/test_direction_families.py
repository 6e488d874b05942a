import json

import pytest
import torch

from hf_eff.engines.direction_families import BoxMuller, rebuilt
from hf_eff.engines.directions import Gaussian, Rademacher, _quantiles
from hf_eff.engines.low_rank_directions import LowRank
from hf_eff.engines.sparse_directions import SparseGaussian
from hf_eff.engines.subspace_directions import Subspace
from hf_eff.errors import CheckpointError

CPU = torch.device("cpu")
FAMILIES = {
    "gaussian": Gaussian(3, 128),
    "rademacher": Rademacher(3, 128),
    "sparse": SparseGaussian(3, {"w": 0.1, "v": 2.0}, 128),
    "low rank": LowRank(3, 2, 7),
    "subspace": Subspace(3, 4, 7),
    "earlier gaussian": BoxMuller(3, 128),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_rebuilt_from_its_description(family):
    described = json.loads(json.dumps(family.describe(CPU)))
    again = rebuilt(3, described)
    assert type(again) is type(family)
    assert again.describe(CPU) == family.describe(CPU)
    weights = torch.linspace(-1, 1, 600).view(20, 30)
    for step in (0, 6, 7):
        first, second = (each.add_(weights.clone(), "w", step, 0.5, draw=1) for each in (family, again))
        assert torch.equal(first, second)


def test_descriptions_pin_what_the_numbers_depend_on():
    def pins(first, second):
        return first.describe(CPU) != second.describe(CPU)

    assert pins(LowRank(0, 2, 7), LowRank(0, 3, 7))
    assert pins(LowRank(0, 2, 7), LowRank(0, 2, 8))
    assert pins(Subspace(0, 2, 7), Subspace(0, 3, 7))
    assert pins(Subspace(0, 2, 7), Subspace(0, 2, 8))
    assert pins(Subspace(0, 2, 7), LowRank(0, 2, 7))
    assert pins(SparseGaussian(0, {"w": 0.1}), SparseGaussian(0, {"w": 0.1000001}))
    assert pins(Gaussian(0), BoxMuller(0))


def test_an_unknown_family_is_refused():
    with pytest.raises(CheckpointError, match="directions 'levy' are none of"):
        rebuilt(0, {"name": "levy"})


def test_directions_of_earlier_logs_are_drawn_as_then():
    """Values that the first version of the gaussian family gave."""
    z = BoxMuller(3).add_(torch.zeros(5), "w", 2, 1.0, draw=1)
    expected = [-0.2147841007, -0.3131512403, 1.1151144505, -0.1232562885, 0.8368054628]
    torch.testing.assert_close(z, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert BoxMuller(3).describe(CPU) == {"name": "gaussian", "chunk": 2**20, "rng": "sfc64 + box-muller"}


def test_the_quantiles_are_those_of_a_normal_distribution():
    table = _quantiles().double()
    assert len(table) == 2**16
    assert torch.equal(table, -table.flip(0))
    assert table.square().mean().item() == pytest.approx(1.0, abs=1e-7)
    assert table.pow(4).mean().item() == pytest.approx(3.0, abs=2e-3)
    assert (table.diff() > 0).all()
    assert table.max() < 4.4
    reached = 0.5 * (1 + torch.erf(table / 2**0.5))
    assert (reached - (torch.arange(2**16) + 0.5) / 2**16).abs().max() < 2e-5
