"""Subspaces of gradients: nothing is lost at full rank, the leading directions are found, random ones keep lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.numerics.gradient_subspace import add_back_, leading_basis, project
from hf_eff.numerics.subspace_shapes import projected_side, refresh_flops


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    projection=st.sampled_from(["std", "left", "right"]),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
def test_all_dimensions_give_the_gradient_back(rows, columns, projection, exact, seed):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(rows, columns, generator=generator)
    side = projected_side((rows, columns), projection)
    basis = leading_basis(gradient, min(rows, columns), side, None if exact else generator)
    back = add_back_(torch.zeros_like(gradient), project(gradient, basis, side), basis, side, beta=1.0, alpha=1.0)
    assert torch.allclose(back, gradient, atol=1e-5)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)


@pytest.mark.parametrize("shape", [(96, 240), (240, 96)])
def test_the_randomised_search_keeps_what_the_decomposition_keeps(shape):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], 96, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], 96, generator=generator))
    values = 1.0 / torch.arange(1, 97)
    gradient = (left * values) @ right.T
    side = projected_side(shape)
    kept = []
    for source in (None, generator):
        small = project(gradient, leading_basis(gradient, 16, side, source), side)
        kept.append(float(small.square().sum()))
    assert kept[0] == pytest.approx(float(values[:16].square().sum()), rel=1e-4)
    assert kept[0] >= kept[1] * (1 - 1e-5) >= 0.999 * kept[0]


def test_a_zero_gradient_has_a_basis_all_the_same():
    for source in (None, torch.Generator().manual_seed(0)):
        basis = leading_basis(torch.zeros(6, 9), 2, "left", source)
        assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-6)


def test_a_search_costs_less_than_a_decomposition():
    assert refresh_flops((1536, 576), 128, exact=False) < 0.3 * refresh_flops((1536, 576), 128, exact=True)
