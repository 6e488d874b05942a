"""The weights of the best probe: kept while a run goes on, put back when its loss rises, gone afterwards."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_eff.engines.best_weights import FOLDER, BestWeights
from hf_eff.engines.ranks import Ranks
from hf_eff.errors import EffWarning
from hf_eff.testing.tiny import tiny_model
from hf_eff.testing.toys import scripted
from hf_eff.testing.trial import Trial, registered

pytestmark = pytest.mark.filterwarnings("ignore::hf_eff.errors.OutsideIntendedUseWarning")


@pytest.fixture(autouse=True)
def scripted_governor():
    with registered(scripted.SPEC):
        yield


def trial(folder, script, *, restore_best=True, **arguments):
    # A rate at which the loss falls and then rises.
    arguments = {"learning_rate": 3e-2, "lr_scheduler_type": "constant", **arguments}
    knobs = {"script": script, "restore_best": restore_best, "num_examples": 8}
    return Trial(scripted.SPEC, folder, max_steps=8, arguments={"governor_kwargs": knobs, **arguments})


class Weights(TrainerCallback):
    """Weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        self.weights[state.global_step] = {name: each.detach().clone() for name, each in model.named_parameters()}


def watched(folder, script, name="run", **options):
    trainer = trial(folder, script, **options).build(name)
    seen = Weights()
    trainer.callback_handler.callbacks.insert(0, seen)  # before the run's own, which puts weights back
    trainer.train()
    return trainer, seen


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def weights_of(trainer):
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


@pytest.mark.parametrize(("memory", "rate"), [("full", 3e-2), ("badam", 0.5)])
def test_a_stop_for_a_rising_loss_leaves_the_best_weights(tmp_path, memory, rate):
    trainer, seen = watched(tmp_path, "7 rises", memory=memory, learning_rate=rate)
    best = trainer.budgeted_run.best
    looks = [json.loads(line) for line in (tmp_path / "run" / "governor.jsonl").read_text().splitlines()]
    means = {look["step"]: look["telemetry"]["probe"]["mean"] for look in looks if look["kind"] == "decision"}
    assert best.step == min(means, key=means.get) < 7
    assert equal(weights_of(trainer), seen.weights[best.step])
    assert not equal(weights_of(trainer), seen.weights[7])
    assert trainer.report["governor"]["weights of step"] == best.step
    assert not (tmp_path / "run" / FOLDER).exists()
    assert trainer.ledger.by_purpose()["save"]["seconds"] > 0


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("7 stop", {"learning_rate": 1e-3}),
        ("", {"learning_rate": 1e-3}),
        ("7 rises", {"restore_best": False}),
        ("", {"restore_best": False}),
        ("7 rises", {"governor_mode": "observe"}),
        ("", {"governor_mode": "advise"}),
    ],
)
def test_otherwise_the_last_weights_stay(tmp_path, script, options):
    trainer, seen = watched(tmp_path, script, **options)
    assert equal(weights_of(trainer), seen.weights[max(seen.weights)])
    assert "weights of step" not in (trainer.report["governor"] or {})
    assert not (tmp_path / "run" / FOLDER).exists()


ENDS = {"steps": ("", {}), "governor": ("7 stop", {}), "budget": ("", {"budget": "7 steps"})}


@pytest.mark.parametrize("end", ENDS)
def test_any_end_after_a_rise_leaves_the_best_weights(tmp_path, end):
    script, options = ENDS[end]
    options = {"learning_rate": 6e-2, "save_strategy": "steps", "save_steps": 100, **options}
    trainer, seen = watched(tmp_path, script, **options)
    last, best = max(seen.weights), trainer.budgeted_run.best.step
    assert trainer.state.global_step == last > best
    assert equal(weights_of(trainer), seen.weights[best])
    assert not equal(weights_of(trainer), seen.weights[last])
    assert trainer.report["governor"]["weights of step"] == best
    saved = load_file(tmp_path / "run" / f"checkpoint-{last}" / "model.safetensors")
    assert all(torch.equal(saved[name], each) for name, each in weights_of(trainer).items() if name in saved)


def test_a_rise_within_the_noise_leaves_the_last_weights(tmp_path):
    trainer, seen = watched(tmp_path, "7 stop")
    run = trainer.budgeted_run
    assert run.best.step == 6
    assert 0.5 < run.supervisor.probe.chance_above_best < 0.95
    assert run.weights_of_step is None
    assert equal(weights_of(trainer), seen.weights[7])


def test_resumed_after_the_best_probe_to_the_planned_end(tmp_path):
    scene = trial(tmp_path, "")
    whole = scene.whole()
    assert whole.steps == 8
    assert scene.interrupted(6).differences(whole) == []


def test_resumed_after_the_best_probe(tmp_path):
    scene = trial(tmp_path, "7 rises")
    whole = scene.whole()
    assert whole.steps == 7
    assert scene.interrupted(6).differences(whole) == []


# Alone


def test_only_a_lower_finite_level_is_kept(tmp_path):
    model = tiny_model(1, 16)
    best = BestWeights(tmp_path, [name for name, _ in model.named_parameters()], Ranks())
    kept = [best.offer(level, step, model) for step, level in enumerate([None, 0.0, np.nan, 0.5, -0.1, -0.1])]
    assert kept == [False, True, False, False, True, False]
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-4.safetensors"]
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    assert best.restore(model) == 4
    assert equal(before, {name: each.detach() for name, each in model.named_parameters()})


def test_only_trained_weights_are_kept_and_put_back(tmp_path):
    model = tiny_model(1, 16)
    best = BestWeights(tmp_path, ["model.norm.weight"], Ranks())
    best.offer(0.0, 1, model)
    with torch.no_grad():
        for each in model.parameters():
            each.fill_(7.0)
    best.restore(model)
    assert model.model.norm.weight.eq(1.0).all()
    assert model.model.embed_tokens.weight.eq(7.0).all()


def test_a_missing_file_is_said(tmp_path):
    model = tiny_model(1, 16)
    best = BestWeights(tmp_path, [], Ranks())
    assert best.restore(model) is None
    best.load_state_dict({"step": 3, "level": -1.0})
    with pytest.warns(EffWarning, match="the weights of step 3, the best so far, are not in"):
        assert best.restore(model) is None
    best.remove()
