"""SubZero against SPSA as the paper writes it, along the same directions."""

import math

import pytest
import torch

from hf_eff.memory.subzero import SPEC
from hf_eff.testing.update_scene import UpdateScene, apart, facts_of, is_matrix, toy
from hf_eff.testing.zeroth_order_reference import literal_steps

RANK = 4
LR = 1e-3


def scene(**options):
    return UpdateScene(SPEC, toy(tie_word_embeddings=False), lr=LR, rank=RANK, refresh_every=2, **options)


def direction_of(run):
    def draw(name, like, step):
        return run.optimizer.family.add_(torch.zeros_like(like), name, step, 1.0)

    return draw


def test_equals_the_papers_steps_over_a_refresh():
    run = scene().steps(*range(5))
    expected = literal_steps(toy(tie_word_embeddings=False), range(5), direction_of(run), lambda _: 1.0, lr=LR)
    assert apart(run.weights(), expected) < 2e-5
    assert (
        apart(
            run.weights(),
            UpdateScene(SPEC, toy(tie_word_embeddings=False), lr=LR, rank=RANK).steps(*range(5)).weights(),
        )
        > 1e-4
    )


def test_a_window_moves_a_matrix_inside_its_two_subspaces_only():
    run = scene(weight_decay=0.0)
    before, after = run.weights(), run.steps(0, 1).weights()
    for name in filter(is_matrix, before):
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= RANK, name


def test_directions_are_as_long_as_dense_ones():
    run = scene()
    parameters = [(name, each.detach()) for name, each in run.model.named_parameters() if is_matrix(name)]
    draw = direction_of(run)
    shares = [
        float(draw(name, each, step).square().sum()) / each.numel() for name, each in parameters for step in range(20)
    ]
    # A sum of r^2 squared normal numbers, times 1 / r^2.
    assert sum(shares) / len(shares) == pytest.approx(1.0, abs=5 * math.sqrt(2 / RANK**2 / len(shares)))


def test_the_plan_counts_the_factors_of_a_window():
    small, large = (
        SPEC.cost(SPEC.config(rank=rank), facts_of(toy(tie_word_embeddings=False))).bytes for rank in (2, 4)
    )
    entries = sum(sum(each.shape) for name, each in toy(tie_word_embeddings=False).named_parameters() if each.dim() > 1)
    assert large["rest"] - small["rest"] == pytest.approx(2 * 4 * entries, rel=0.2)
    assert large["optimizer"] == 0
