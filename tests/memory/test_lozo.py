"""LOZO against SPSA as the paper writes it, along the same directions."""

import torch

from hf_eff.memory.lozo import SPEC
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
    expected = literal_steps(
        toy(tie_word_embeddings=False), range(5), direction_of(run), lambda p: 1 / RANK if p.dim() > 1 else 1.0, lr=LR
    )
    assert apart(run.weights(), expected) < 2e-5
    unscaled = literal_steps(toy(tie_word_embeddings=False), range(5), direction_of(run), lambda _: 1.0, lr=LR)
    assert apart(run.weights(), unscaled) > 1e-3  # the official code leaves 1 / r out


def test_directions_of_matrices_have_rank_r_and_share_their_right_factor_in_a_window():
    run = scene()
    draw = direction_of(run)
    for name, parameter in run.model.named_parameters():
        if is_matrix(name):
            first, second, third = (draw(name, parameter.detach(), step) for step in (0, 1, 2))
            assert torch.linalg.matrix_rank(first) == RANK
            assert torch.linalg.matrix_rank(torch.cat([first, second])) == RANK
            assert torch.linalg.matrix_rank(torch.cat([first, third])) == 2 * RANK


def test_it_keeps_nothing_and_the_plan_says_so():
    run = scene()
    held, predicted = run.measured(), SPEC.cost(SPEC.config(rank=RANK), facts_of(toy(tie_word_embeddings=False))).bytes
    for term in ("gradients", "optimizer", "activations"):
        assert held[term] == predicted[term] == 0, term
    assert held["weights"] == predicted["weights"]
