import dataclasses
import statistics

import numpy as np
import pytest

from hf_eff.contracts.cost import BlockFacts, Facts, ModelFacts, PoolFacts, RunFacts
from hf_eff.numerics.planned_step import planned_length, planned_shape

MODEL = ModelFacts(
    architecture="toy",
    params=10,
    blocks=(BlockFacts(params=10, matmul_params=10),),
    head_matmul_params=0,
    embedding_params=0,
    hidden_size=8,
    vocab_size=8,
)
LENGTHS = tuple(sorted(np.random.default_rng(0).geometric(0.02, size=100).astype(float)))
POOL = PoolFacts(num_rows=1000, mean_tokens=50.0, max_tokens=300, length_quantiles=LENGTHS)


def facts(pool=POOL, **run):
    return Facts(model=MODEL, pool=pool, run=RunFacts(**run))


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_rows_are_as_long_as_the_longest_of_their_micro_batch(rows):
    draws = np.random.default_rng(1).choice(LENGTHS, (20_000, rows)).max(axis=1)
    error = draws.std() / len(draws) ** 0.5
    assert abs(planned_length(facts(batch_size=rows)) - draws.mean()) < 5 * error


def test_one_row_is_never_padded():
    assert planned_length(facts(batch_size=1)) == pytest.approx(statistics.mean(LENGTHS))


@pytest.mark.parametrize("run", [{"packing": True}, {"padding_free": True}, {"by_length": True}])
def test_batches_without_padding_have_mean_length(run):
    assert planned_length(facts(batch_size=8, **run)) == 50.0


def test_a_known_length_and_unknown_quantiles():
    assert planned_shape(facts(batch_size=8, length=64)).length == 64
    bare = dataclasses.replace(POOL, length_quantiles=())
    assert planned_length(facts(bare, batch_size=8)) == 50.0
