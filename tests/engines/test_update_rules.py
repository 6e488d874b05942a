import copy
import json
import math

import pytest
import torch
from torch import nn

from hf_eff.engines.directions import Gaussian, Rademacher, Shard
from hf_eff.engines.low_rank_directions import LowRank
from hf_eff.engines.low_rank_momentum import LowRankMomentum
from hf_eff.engines.part_rounding import round_part_
from hf_eff.engines.replay import replay
from hf_eff.engines.replay_log import ReplayLog, StepRecord
from hf_eff.engines.stochastic_rounding import round_stochastically_
from hf_eff.engines.update_rules import RecentMomentum, momentum_window
from hf_eff.engines.zeroth_order_optimizer import ZerothOrderOptimizer
from hf_eff.errors import CheckpointError, EffError, EffWarning

BETA, LR, DECAY, WINDOW = 0.8, 1e-2, 0.1, 3


def model_of(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 8, bias=False))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def coefficients(step):
    return [math.sin(step + 1.0), 0.3 * math.cos(step)]


def run(model, family, rule, steps=range(9), optimizer=None, skip=()):
    optimizer = optimizer or ZerothOrderOptimizer(
        [dict(model.named_parameters())], [DECAY], family, lr=LR, eps=1e-3, rule=rule
    )
    for step in steps:
        optimizer.stage(step, [math.nan, 1.0] if step in skip else coefficients(step))
        optimizer.step()
    return optimizer


def z_of(family, like, name, step, draw):
    return family.add_(torch.zeros_like(like), name, step, 1.0, draw=draw)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("family", [Gaussian, Rademacher])
@pytest.mark.filterwarnings("ignore::hf_eff.errors.EffWarning")
def test_momentum_without_a_buffer_equals_momentum_with_one(family):
    """Up to the steps left out, whose weight has fallen below the tolerance."""
    model, literal, skip = model_of(), model_of(), (4,)
    made, window = family(0), momentum_window(BETA, 1e-6)
    run(model, made, RecentMomentum(BETA, window), steps=range(25), skip=skip)
    buffers = {name: torch.zeros_like(p) for name, p in literal.named_parameters()}
    with torch.no_grad():
        for step in range(25):
            if step in skip:
                continue
            for name, parameter in literal.named_parameters():
                z = [z_of(made, parameter, name, step, draw) for draw in (0, 1)]
                estimate = sum(c * each for c, each in zip(coefficients(step), z, strict=True)) / 2
                buffers[name] = BETA * buffers[name] + (1 - BETA) * estimate
                parameter *= 1 - LR * DECAY
                parameter -= LR * buffers[name]
    for first, second in zip(model.parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-7)
    short = model_of()
    run(short, made, RecentMomentum(BETA, 2), steps=range(25), skip=skip)
    assert (short[0].weight - model[0].weight).abs().max() > 1e-3


def test_window_of_the_momentum():
    assert momentum_window(0.9, 0.01) == 44
    for beta, tolerance in ((0.5, 0.3), (0.99, 1e-4)):
        window = momentum_window(beta, tolerance)
        assert beta**window <= tolerance < beta ** (window - 1)


@pytest.mark.filterwarnings("ignore::hf_eff.errors.EffWarning")
def test_low_rank_momentum_equals_its_formula():
    """N and V written out, over three refreshes; vectors keep a dense mean."""
    family, rank, skip = LowRank(0, 2, WINDOW), 2, (5,)
    model, literal, held = model_of(), model_of(), {}
    run(model, family, LowRankMomentum(BETA), skip=skip)
    with torch.no_grad():
        for step in range(9):
            if step in skip:
                continue
            for name, parameter in literal.named_parameters():
                parameter *= 1 - LR * DECAY
                if parameter.ndim == 1:
                    z = [z_of(family, parameter, name, step, draw) for draw in (0, 1)]
                    parameter -= LR * dense_mean(held, name, z, step)
                    continue
                m, n = parameter.shape
                v = family.right(name, step, n, parameter.device).double()
                u = [family.left(name, step, draw, m, parameter.device).double() for draw in (0, 1)]
                old, before = held.get(name, (torch.zeros(m, rank).double(), v))
                carried = old if torch.equal(before, v) else old @ (before.t() @ v) / n
                mean = sum(c * each for c, each in zip(coefficients(step), u, strict=True)) / 2
                held[name] = (BETA * carried + (1 - BETA) * mean, v)
                parameter -= LR * held[name][0] @ v.t() / rank
    for first, second in zip(model.parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


def dense_mean(held, name, z, step):
    estimate = sum(c * each for c, each in zip(coefficients(step), z, strict=True)) / 2
    held[name] = BETA * held.get(name, 0.0) + (1 - BETA) * estimate
    return held[name]


def test_state_is_one_thin_factor_a_matrix():
    model = model_of(torch.float32)
    optimizer = run(model, LowRank(0, 2, WINDOW), LowRankMomentum(BETA))
    shapes = {name: tuple(optimizer.state[p]["momentum"].shape) for name, p in model.named_parameters()}
    assert shapes == {"0.weight": (16, 2), "0.bias": (16,), "1.weight": (16,), "1.bias": (16,), "2.weight": (8, 2)}


def test_a_refresh_makes_nothing_of_the_matrix_size():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    rule, family, state, w = LowRankMomentum(BETA), LowRank(0, 2, 1), {}, torch.zeros(40, 60)
    for step in (0, 1):
        rule.apply(StepRecord(step, (1.0,), (LR,), (0.0,)), [{"w": w}], family, state)
    with Sizes():
        rule._left(state[w], StepRecord(2, (1.0,), (LR,), (0.0,)), "w", w, family)
    assert max(largest) <= 60 * 2


def test_low_rank_momentum_needs_low_rank_directions():
    with pytest.raises(EffError, match="needs low-rank directions, not 'gaussian'"):
        run(model_of(), Gaussian(0), LowRankMomentum(BETA), steps=range(1))


RULES = {
    "recent": (lambda: Gaussian(0), lambda: RecentMomentum(BETA, 4)),
    "low rank": (lambda: LowRank(0, 2, WINDOW), lambda: LowRankMomentum(BETA)),
}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_with_momentum_is_bitwise(tmp_path, kind, dtype):
    family, rule = (make() for make in RULES[kind])
    model, middle, start = model_of(dtype), model_of(dtype), model_of(dtype)
    with pytest.warns(EffWarning, match="moves nothing"):
        optimizer = run(model, family, rule, skip=(4,))
    run(middle, RULES[kind][0](), RULES[kind][1](), steps=range(4))
    optimizer.log.save(tmp_path / "log")
    for until, expected in ((None, model), (4, middle), (0, start)):
        again = model_of(dtype)
        replay(again, ReplayLog.load(tmp_path / "log"), until)
        assert same(again, expected)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [WINDOW, WINDOW + 1])
def test_resume_with_momentum_is_bitwise(kind, dtype, cut):
    def fresh(model):
        family, rule = (make() for make in RULES[kind])
        return run(model, family, rule, steps=())

    whole, first, second = model_of(dtype), model_of(dtype), model_of(dtype)
    run(whole, None, None, optimizer=fresh(whole))
    before = run(first, None, None, range(cut), optimizer=fresh(first))
    saved = copy.deepcopy({"model": first.state_dict(), "optimizer": before.state_dict()})
    log = json.loads(json.dumps(before.log.to_dict()))
    optimizer = fresh(second)
    second.load_state_dict(saved["model"])
    optimizer.resume(ReplayLog.from_dict(log))
    optimizer.load_state_dict(saved["optimizer"])
    run(second, None, None, range(cut, 9), optimizer=optimizer)
    assert same(whole, second)
    held = {value.dtype for state in optimizer.state.values() for key, value in state.items() if key == "momentum"}
    assert held <= {torch.float32}


def test_a_rule_of_another_kind_is_refused():
    plain = run(model_of(), Gaussian(0), None).log
    momentum = run(model_of(), Gaussian(0), RecentMomentum(BETA, 4)).log
    with pytest.raises(CheckpointError, match="rule is"):
        momentum.header.require_same(plain.header, "resume")
    unknown = ReplayLog.from_dict(momentum.to_dict())
    object.__setattr__(unknown.header, "rule", {"name": "adam"})
    with pytest.raises(CheckpointError, match="update rule 'adam' is not known"):
        replay(model_of(), unknown)


def test_a_plain_header_looks_as_it_did_before_there_were_rules():
    """Digests of logs that exist must hold."""
    assert "rule" not in run(model_of(), Gaussian(0), None).log.to_dict()["header"]


def test_a_step_at_rate_zero_without_a_probe_does_nothing():
    """Those who ask an optimizer what state it keeps take one."""
    model = model_of()
    optimizer = run(model, Gaussian(0), None, steps=())
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert same(model, model_of())
    assert len(optimizer.log) == 0
    optimizer.param_groups[0]["lr"] = LR
    with pytest.raises(EffError, match="call training_step before step"):
        optimizer.step()


@pytest.mark.parametrize("rows", [5, 3000])
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.99, 1.0])
def test_parts_are_rounded_as_in_the_whole(rows, cut):
    wide = torch.randn(rows, 700, generator=torch.Generator().manual_seed(0))
    whole = round_stochastically_(torch.empty(rows, 700).bfloat16(), wide, torch.Generator().manual_seed(1))
    split = round(cut * rows)
    for part in (slice(0, split), slice(split, rows)):
        held = torch.empty_like(wide[part], dtype=torch.bfloat16)
        round_part_(held, wide[part], torch.Generator().manual_seed(1), Shard((rows, 700), part.start))
        assert torch.equal(held, whole[part])
