import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from hf_eff.engines.directions import FAMILIES, Gaussian
from hf_eff.engines.replay import replay
from hf_eff.engines.replay_header import LogHeader
from hf_eff.engines.replay_log import ReplayLog, StepRecord
from hf_eff.engines.zeroth_order_optimizer import SKIPS_IN_A_ROW, ZerothOrderOptimizer
from hf_eff.errors import CheckpointError, EffError, EffWarning, TrainingDivergedError


def model_of(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def optimizer_of(model, family="gaussian", seed=0, eps=1e-3, **options):
    named = dict(model.named_parameters())
    decayed = {name: p for name, p in named.items() if p.ndim > 1}
    others = {name: p for name, p in named.items() if p.ndim == 1}
    return ZerothOrderOptimizer([decayed, others], [0.1, 0.0], FAMILIES[family](seed, **options), lr=1e-2, eps=eps)


def run(model, steps=5, optimizer=None, start=0, **options):
    optimizer = optimizer or optimizer_of(model, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(start, start + steps):
        optimizer.stage(step, [math.sin(step + 1), 0.1 * step])
        optimizer.step()
        schedule.step()
    return optimizer


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_replay_rebuilds_the_weights_bit_for_bit(tmp_path, family, dtype):
    model, start = model_of(dtype), model_of(dtype)
    optimizer = run(model, family=family)
    middle = model_of(dtype)
    run(middle, steps=3, family=family)
    optimizer.log.save(tmp_path / "replay.jsonl")
    for until, expected in ((None, model), (3, middle), (0, start)):
        again = model_of(dtype)
        replay(again, ReplayLog.load(tmp_path / "replay.jsonl"), until)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expected.parameters(), strict=True))
    assert not torch.equal(model[0].weight, start[0].weight)


def test_step_equals_the_formula():
    model, start = model_of(), dict(model_of().named_parameters())
    optimizer = optimizer_of(model)
    optimizer.param_groups[1]["lr"] = 0.5
    optimizer.stage(7, [2.0, -1.0])
    optimizer.step()
    for name, parameter in model.named_parameters():
        lr, decay = (1e-2, 0.1) if parameter.ndim > 1 else (0.5, 0.0)
        z = [Gaussian(0).add_(torch.zeros_like(parameter), name, 7, 1.0, draw=draw) for draw in (0, 1)]
        expected = start[name] * (1 - lr * decay) - lr * (2.0 * z[0] - 1.0 * z[1]) / 2
        assert torch.allclose(parameter, expected, rtol=1e-5, atol=1e-6)
    assert optimizer.state_dict()["state"] == {}


def test_optimizer_state_brings_the_rate_back():
    model = model_of()
    optimizer = run(model, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    other = optimizer_of(model_of())
    other.load_state_dict(saved)
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert other.names == optimizer.names


def test_step_needs_a_probe():
    optimizer = run(model_of(), steps=1)
    with pytest.raises(EffError, match="call training_step before step"):
        optimizer.step()


def test_clip_bounds_each_coefficient():
    optimizer = optimizer_of(model_of())
    optimizer.stage(0, [5.0, -7.0, 0.5], clip=1.0)
    optimizer.step()
    assert optimizer.log.records[0].coefficients == (1.0, -1.0, 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_moves_nothing_and_is_recorded(tmp_path, bad):
    model, start = model_of(), model_of()
    optimizer = optimizer_of(model)
    with pytest.warns(EffWarning, match="step 0 moves nothing"):
        optimizer.stage(0, [1.0, bad], clip=1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    optimizer.log.save(tmp_path / "log")
    (record,) = ReplayLog.load(tmp_path / "log").records
    assert record.skipped
    assert record.coefficients[0] == 1.0
    assert str(record.coefficients[1]) == str(bad)


def test_ten_steps_without_a_finite_loss_end_the_run():
    optimizer = run(model_of(), steps=1)
    for step in range(1, SKIPS_IN_A_ROW):
        with pytest.warns(EffWarning):
            optimizer.stage(step, [math.nan])
        optimizer.step()
    with pytest.raises(TrainingDivergedError, match="10 steps in a row"):
        optimizer.stage(SKIPS_IN_A_ROW, [math.nan])
    optimizer.stage(SKIPS_IN_A_ROW, [1.0])
    optimizer.step()
    assert optimizer.log.trailing_skips() == 0


def test_log_survives_json_and_stays_small():
    log = run(model_of(), steps=50).log
    text = json.dumps(log.to_dict(), allow_nan=False)
    back = ReplayLog.from_dict(json.loads(text))
    assert back.header == log.header
    assert back.records == log.records
    assert len(json.dumps(log.to_dict()["records"])) / 50 < 150


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("0x1.", "0x2.", 1),
        lambda text: "\n".join(text.splitlines()[:-1]),
        lambda text: "\n".join(text.splitlines()[:2] + text.splitlines()[3:]),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: "",
        lambda text: "[]\n[]\n",
    ],
    ids=["one digit", "no end", "a step left out", "cut short", "another seed", "empty", "other JSON"],
)
def test_damage_is_found(tmp_path, damage):
    path = tmp_path / "log"
    run(model_of()).log.save(path)
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    with pytest.raises(CheckpointError, match="replay log"):
        ReplayLog.load(path)


def test_a_failed_write_leaves_the_old_log(tmp_path, monkeypatch):
    path = tmp_path / "log"
    log = run(model_of(), steps=2).log
    log.save(path)
    before = path.read_text()
    log.append(StepRecord(2, (1.0,), (0.1, 0.1), (0.0, 0.0)))
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        log.save(path)
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["log"]


def test_truncation_drops_what_will_be_done_again():
    log = run(model_of(), steps=5).log
    log.truncate(3)
    assert [record.step for record in log.records] == [0, 1, 2]
    log.truncate(3)
    assert len(log) == 3
    with pytest.raises(CheckpointError, match=r"has steps 0 to 2; a run cannot resume from it at 5"):
        log.truncate(5)


def test_truncation_of_a_log_that_began_later():
    log = run(model_of(), steps=3, start=10).log
    log.truncate(12)
    assert [record.step for record in log.records] == [10, 11]
    with pytest.raises(CheckpointError, match="steps 10 to 11"):
        log.truncate(4)
    empty = ReplayLog(log.header)
    empty.truncate(4)
    assert len(empty) == 0


def test_steps_follow_each_other():
    log = run(model_of(), steps=2).log
    with pytest.raises(CheckpointError, match="step 5 cannot follow step 1"):
        log.append(StepRecord(5, (1.0,), (0.1,), (0.0,)))


def replayed_on(model, log):
    with pytest.raises(CheckpointError) as caught:
        replay(model, log)
    return str(caught.value)


def test_replay_refuses_other_models():
    log = run(model_of()).log
    assert "started from other weights" in replayed_on(model_of(seed=1), log)
    assert "no parameter '2.weight'" in replayed_on(nn.Sequential(*list(model_of())[:2]), log)
    wider = model_of()
    wider[2] = nn.Linear(16, 5)
    assert "the trained parameters differ, first at ('2.bias', (4,)" in replayed_on(wider, log)
    assert "differ" in replayed_on(model_of(torch.bfloat16), log)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arithmetic": "0"}, "computes other directions"),
        ({"version": 2}, "version is 1 here and 2 in the log"),
        ({"family": {"name": "gaussian", "chunk": 64, "rng": "other"}}, "family is"),
        ({"family": {"name": "levy", "chunk": 64, "rng": "other"}}, "directions 'levy' are none of"),
        ({"seed": 1}, "computes other directions"),
    ],
)
def test_replay_refuses_other_headers(change, message):
    log = run(model_of()).log
    changed = ReplayLog(dataclasses.replace(log.header, **change), log.records)
    model = model_of()
    assert message in replayed_on(model, changed)
    assert torch.equal(model[0].weight, model_of()[0].weight)


def test_version_of_torch_is_judged_by_its_arithmetic():
    model = model_of()
    log = run(model).log
    again = model_of()
    replay(again, ReplayLog(dataclasses.replace(log.header, torch="2.0.0"), log.records))
    assert torch.equal(again[0].weight, model[0].weight)


def test_header_tells_runs_apart():
    def header(**options):
        return optimizer_of(model_of(), **options).log.header

    assert header() == header()
    for other in ({"seed": 1}, {"eps": 2e-3}, {"family": "rademacher"}, {"chunk": 128}):
        with pytest.raises(CheckpointError, match="cannot resume: "):
            header().require_same(header(**other), "resume")
    assert LogHeader.from_dict(json.loads(json.dumps(header().to_dict()))) == header()


def test_base_digest_sees_every_tensor():
    for index in range(6):
        model = model_of()
        with torch.no_grad():
            list(model.parameters())[index].add_(1e-3)
        assert optimizer_of(model).log.header.base != optimizer_of(model_of()).log.header.base
