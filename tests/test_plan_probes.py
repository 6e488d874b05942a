import dataclasses

from hf_eff.contracts.cost import BlockFacts, Facts, ModelFacts, PoolFacts, RunFacts
from hf_eff.options import EffOptions, resolve_options
from hf_eff.plan_probes import probe_note

MODEL = ModelFacts(
    architecture="toy",
    params=5 * 10**8,
    blocks=(BlockFacts(params=10**8, matmul_params=10**8),) * 5,
    head_matmul_params=0,
    embedding_params=0,
    hidden_size=8,
    vocab_size=8,
)
POOL = PoolFacts(num_rows=100, mean_tokens=10.0, max_tokens=20, num_reference=32, mean_reference_tokens=10.0)


def note(governor="marginal_gain", pool=POOL, steps=60, reached=1.0, **knobs):
    resolved = resolve_options(EffOptions(governor=governor, governor_kwargs=knobs))
    facts = Facts(model=MODEL, pool=pool, run=RunFacts(batch_size=4, max_steps=steps))
    return probe_note(resolved, facts, resolved.governor.spec.cost(resolved.governor.config, facts).flops, reached)


def test_a_run_that_pays_for_too_few_probes_is_told_of():
    # 60 steps of 4 rows are 720 forwards of a row; 3 % pay for one probe of 16 rows, 30 % for thirteen.
    assert note() == (
        "governor='marginal_gain' can pay for 1 probe in this run and decides nothing before it has 5; "
        "governor_kwargs={'probe_share': 0.4} pays for more."
    )
    assert note(probe_share=0.3) is None
    assert note(steps=6000) is None


def test_where_rows_may_be_chosen_anew_half_is_left_for_readings_of_the_pool():
    # A fifth of 720 forwards pays for nine probes of 16 rows.
    assert note(probe_share=0.2) is None
    assert note(probe_share=0.2, actions="widen") is None
    assert "can pay for 4 probes in" in note(probe_share=0.2, actions="widen+refresh")


def test_a_budget_that_ends_the_run_early_counts():
    assert note(steps=6000, reached=0.5) is None
    assert "pay for 1 probe in" in note(steps=6000, reached=0.01)


def test_patience_needs_one_more_than_its_patience():
    assert "decides nothing before it has 4" in note("patience", probe_share=0.03)
    assert note("patience", probe_share=0.5) is None


def test_a_run_that_is_too_short_for_any_share():
    assert note(steps=5).endswith("; train longer.")


def test_governors_that_do_not_probe_have_none():
    assert note("none") is None


def test_streams_and_unread_targets_have_none():
    assert note(pool=dataclasses.replace(POOL, streaming=True, num_rows=None)) is None
    assert note(pool=dataclasses.replace(POOL, num_reference=0, mean_reference_tokens=0.0)) is None
