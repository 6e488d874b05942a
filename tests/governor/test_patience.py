import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState

from hf_eff.contracts.cost import BlockFacts, Facts, ModelFacts, PoolFacts, RunFacts
from hf_eff.contracts.governor import ProbeReading, Telemetry
from hf_eff.contracts.memory import BatchShape
from hf_eff.governor.patience import Patience, PatienceConfig, cost
from hf_eff.numerics.flops import forward_flops, training_flops
from hf_eff.testing.tapes import Tape, flat, play


def look(step, loss=None, steps=100, probe_spent=0.0):
    probe = None if loss is None else ProbeReading(loss, None, None, 8)
    return Telemetry(step, steps, {}, {}, float(step), 120.0, probe=probe, probe_spent=probe_spent)


def transformers_stops(losses, patience, threshold):
    """What EarlyStoppingCallback does when Trainer shows it these evaluations, best metric kept by Trainer."""
    callback = EarlyStoppingCallback(patience, threshold)
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False, save_strategy="steps")
    trainer = SimpleNamespace(args=args, state=TrainerState())
    stops = []
    for loss in losses:
        control = TrainerControl()
        callback.on_evaluate(args, trainer.state, control, {"eval_loss": loss})
        Trainer._determine_best_metric(trainer, {"eval_loss": loss}, None)
        stops.append(control.should_training_stop)
    return stops


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("threshold", [0.0, 0.03])
def test_decides_as_transformers_does(patience, threshold):
    random, stopped = np.random.default_rng(patience), 0
    for _ in range(60):
        # Few distinct values, so that ties occur; sometimes no number at all.
        losses = np.round(np.cumsum(random.normal(-0.01, 0.05, 30)) + 2.0, 2)
        losses[random.random(30) < 0.05] = math.nan
        policy = Patience(PatienceConfig(patience=patience, threshold=threshold))
        decisions = [policy.observe(look(step, float(loss))) for step, loss in enumerate(losses, start=1)]
        expected = transformers_stops([float(loss) for loss in losses], patience, threshold)
        assert [each.action == "stop" for each in decisions] == expected
        stopped += any(expected)
        policy.state_dict()
    assert stopped > 10


def test_an_improvement_below_the_threshold_still_moves_the_best():
    policy = Patience(PatienceConfig(patience=2, threshold=0.1))
    actions = [policy.observe(look(step, loss)).action for step, loss in enumerate([2.0, 1.95, 1.86, 1.8], start=1)]
    # 1.86 is 0.14 below the first loss and 0.09 below the best one.
    assert actions == ["continue", "continue", "stop", "stop"]


def test_names_the_best_probe():
    policy = Patience(PatienceConfig(patience=9))
    for step, loss in enumerate([2.0, 1.5, 1.7, 1.5], start=1):
        decision = policy.observe(look(step, loss))
    assert (decision.details["best"], decision.details["best_step"]) == (1.5, 2)


@pytest.mark.parametrize("probes", [10, 40])
def test_probes_are_spaced_evenly_in_steps(probes):
    recording = play(Patience(PatienceConfig(patience=10**6, probes=probes)), Tape(flat, steps=400, probe_cost=0.01))
    at = [seen.step for seen in recording.telemetry if seen.probe is not None]
    assert at == [400 // probes * i for i in range(1, probes + 1)]


def test_the_purse_is_never_passed():
    for share in (0.0, 0.03, 0.15):
        policy = Patience(PatienceConfig(patience=10**6, probe_share=share))
        for seen in play(policy, Tape(flat, limit=120.0, probe_cost=2.0)).telemetry:
            assert seen.probe_spent <= share * min(seen.compute + 0.2 * 120.0, 120.0) * (1 + 1e-12)


def test_without_planned_steps_the_budget_spaces_the_probes():
    policy, at = Patience(PatienceConfig(probes=10)), []
    for step in range(1, 121):
        seen = look(step, steps=0)
        if policy.next_probe(seen, 0.01):
            at.append(step)
            policy.observe(dataclasses.replace(seen, probe=ProbeReading(1.0 / step, None, None, 8)))
    assert at == list(range(12, 121, 12))
    assert not policy.next_probe(dataclasses.replace(look(60, steps=0), compute_limit=math.inf), 0.01)


def test_resumes_where_it_was():
    losses = [math.nan, 2.0, 1.9, 1.95, 1.94, 1.93]
    for cut in range(len(losses)):
        policy = Patience(PatienceConfig())
        [policy.observe(look(step, loss)) for step, loss in enumerate(losses[:cut], start=1)]
        saved = json.dumps(policy.state_dict(), allow_nan=False)
        again = Patience(PatienceConfig())
        again.load_state_dict(json.loads(saved))
        for step, loss in enumerate(losses[cut:], start=cut + 1):
            assert again.observe(look(step, loss)) == policy.observe(look(step, loss))
    assert policy.observe(look(9, 1.96)).action == "stop"


def test_the_cost_is_that_of_all_probes():
    block = BlockFacts(params=10_000, matmul_params=9_000, attention_width=64)
    model = ModelFacts(
        architecture="Toy",
        params=60_000,
        blocks=(block,) * 4,
        head_matmul_params=16_000,
        embedding_params=16_000,
        hidden_size=64,
        vocab_size=250,
    )
    pool = PoolFacts(num_rows=4000, mean_tokens=40.0, max_tokens=80, num_reference=16, mean_reference_tokens=40.0)
    facts = Facts(model=model, pool=pool, run=RunFacts(batch_size=16, max_steps=2000, length=40))
    probe = forward_flops(model, BatchShape(rows=16, length=40))
    assert cost(PatienceConfig(), facts).flops == pytest.approx(40 * probe)
    run = 2000 * training_flops(model, BatchShape(rows=16, length=40))
    assert cost(PatienceConfig(probe_share=1e-5), facts).flops == pytest.approx(1e-5 * run)
