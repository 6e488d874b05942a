from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_eff.contracts.selection import SelectionContext
from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.engines.scoring import scoring_mode
from hf_eff.engines.warmup import WarmupSettings, scheduled_rate, untrained, warm_up
from hf_eff.errors import BudgetExceededError, DataError, ManifestError, ScoringStoppedError, TrainingDivergedError
from hf_eff.numerics.keyed_random import content_order
from hf_eff.testing.selection_scene import toy_pool
from hf_eff.testing.tiny import collator, tiny_model

pytest.importorskip("peft")

SETTINGS = WarmupSettings(epochs=2, batch_size=4, learning_rate=1e-2, seed=5)
ROWS = np.array([3, 0, 8, 11, 14, 2, 20, 19, 7, 5])


def scene(padding=0, **changes):
    def collate(rows):
        batch = collator()([dict(row) for row in rows])
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {key: torch.nn.functional.pad(value, (0, padding), value=fill[key]) for key, value in batch.items()}

    model = tiny_model(layers=2, width=32, attn_implementation="eager")
    fields = {"pool": toy_pool(), "model": model, "collate": collate, "batch_tokens": 256}
    return SelectionContext(generator=torch.Generator(), **{**fields, **changes})


def run(settings=SETTINGS, rows=ROWS, context=None, **options):
    context = context or scene()
    with scoring_mode(context.model), temporary_adapter(context.model, LoraShape(rank=2), seed=1) as adapter:
        return warm_up(context, adapter, rows, settings, **options)


def differing(first, second):
    tables = ("weights", "first_moment", "second_moment")
    pairs = [(getattr(first, table), getattr(second, table)) for table in tables]
    return [name for a, b in pairs for name in a if not torch.equal(a[name], b[name])]


def test_equals_a_literal_loop_with_adam():
    """Token-mean loss of the model itself, clipping, linear schedule, torch's Adam."""
    context = scene()
    found = run(replace(SETTINGS, dropout=0.0, max_grad_norm=0.5))
    hashes = context.pool.row_hash
    with temporary_adapter(context.model, LoraShape(rank=2), seed=1) as adapter:
        weights = [factor.weight for factor in adapter.factors.values()]
        optimizer = torch.optim.Adam(weights, lr=1e-2)
        step, rates = 0, []
        for _ in range(2):
            order = ROWS[content_order([hashes[row] for row in ROWS], 5, step)]
            for rows in np.array_split(order, 3):
                batch = context.collate([context.pool.rows[row] for row in rows])
                optimizer.zero_grad()
                context.model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 0.5)
                rates.append(1e-2 * (6 - step) / 6)
                optimizer.param_groups[0]["lr"] = rates[-1]
                optimizer.step()
                step += 1
        last = found[-1]
        assert [checkpoint.step for checkpoint in found] == [3, 6]
        assert math.isclose(found[0].learning_rate, sum(rates[:3]) / 3)
        assert math.isclose(found[1].learning_rate, sum(rates[3:]) / 3)
        for name, factor in adapter.factors.items():
            state = optimizer.state[factor.weight]
            assert torch.allclose(last.weights[name], factor.weight, rtol=1e-4, atol=2e-6)
            assert torch.allclose(last.first_moment[name], state["exp_avg"], rtol=1e-3, atol=1e-7)
            assert torch.allclose(last.second_moment[name], state["exp_avg_sq"], rtol=1e-3, atol=1e-10)


def test_learns():
    context = scene()
    batch = context.collate([context.pool.rows[row] for row in ROWS])
    settings = replace(SETTINGS, epochs=15, learning_rate=3e-2)
    shape = LoraShape(rank=4, target_modules=("o_proj", "down_proj"))
    with scoring_mode(context.model), temporary_adapter(context.model, shape) as adapter:
        before = context.model(**batch).loss.item()
        warm_up(context, adapter, ROWS, settings)
        assert context.model(**batch).loss.item() < before - 0.1


def test_equal_seeds_give_equal_bits_and_others_do_not():
    random_state = torch.random.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        first = run()
    second = run()
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert not any(differing(a, b) for a, b in zip(first, second, strict=True))
    assert differing(first[-1], run(replace(SETTINGS, seed=6))[-1])


@pytest.mark.parametrize("changes", [{"batch_tokens": 40}, {"batch_tokens": 10_000}, {"padding": 7}])
def test_dropout_included_batches_and_padding_do_not_matter(changes):
    plain, other = run()[-1], run(context=scene(**changes))[-1]
    for name, value in plain.weights.items():
        assert torch.allclose(value, other.weights[name], rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-5)


def test_order_of_the_rows_does_not_matter():
    shuffled = ROWS[np.random.default_rng(0).permutation(len(ROWS))]
    plain, other = run()[-1], run(rows=shuffled)[-1]
    assert not differing(plain, other)


def test_dropout_drops_its_share_and_keeps_the_mean():
    seen = []
    context = scene()
    with scoring_mode(context.model), temporary_adapter(context.model, LoraShape(rank=2)) as adapter:
        a, b = (next(f for n, f in adapter.factors.items() if part in n) for part in (".lora_A.", ".lora_B."))
        warm_up(context, adapter, ROWS, replace(SETTINGS, dropout=0.3, epochs=1, learning_rate=0.0))
        for factor in (a, b):
            factor.register_forward_hook(lambda module, inputs, output: seen.append((module is a, inputs[0].detach())))
        warm_up(context, adapter, ROWS, replace(SETTINGS, dropout=0.3, epochs=1, learning_rate=0.0))
        dropped = torch.cat([x.flatten() for is_a, x in seen if is_a])
        kept_rows = [x[0, 0] == 0 for is_a, x in seen if is_a]
        seen.clear()
        warm_up(context, adapter, ROWS, replace(SETTINGS, dropout=0.0, epochs=1, learning_rate=0.0))
        plain = torch.cat([x.flatten() for is_a, x in seen if is_a])
    # Inputs at padding are zero to begin with.
    share = (dropped == 0)[plain != 0].double().mean().item()
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / int((plain != 0).sum()))
    kept = dropped != 0
    assert torch.allclose(dropped[kept], plain[kept] / 0.7, rtol=1e-3, atol=1e-6)
    assert not all(torch.equal(kept_rows[0], other) for other in kept_rows[1:])


def test_no_training_is_the_adapter_with_moments_of_zero():
    with temporary_adapter(tiny_model(), LoraShape()) as adapter:
        start = untrained(adapter)
        assert (start.step, start.learning_rate) == (0, 0.0)
        assert not any(moment.any() for moment in (*start.first_moment.values(), *start.second_moment.values()))
        assert all(torch.equal(start.weights[name], factor.weight) for name, factor in adapter.factors.items())


def test_schedule_rises_and_falls():
    settings = WarmupSettings(learning_rate=1.0, rise=0.1)
    rates = [scheduled_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == 0
    assert rates[5] == 0.5
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(1 / 90)
    assert scheduled_rate(0, 3, settings) == 1.0


class Tally:
    """Counts charges and refuses the one after ``limit``."""

    def __init__(self, limit=math.inf):
        self.count, self.limit = 0, limit

    def __call__(self, flops, tokens):
        if self.count >= self.limit:
            raise BudgetExceededError("enough")
        self.count += 1


@pytest.mark.parametrize("limit", range(1, 6))
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, limit):
    whole = Tally()
    expected = run(context=scene(spend=whole))
    assert whole.count == 6
    with pytest.raises(BudgetExceededError):
        run(context=scene(spend=Tally(limit)), folder=tmp_path / "w", header={"model": "m"})
    rest = Tally()
    resumed = run(context=scene(spend=rest), folder=tmp_path / "w", header={"model": "m"})
    assert not any(differing(a, b) for a, b in zip(expected, resumed, strict=True))
    assert [c.learning_rate for c in resumed] == [c.learning_rate for c in expected]
    assert rest.count == 6 - 3 * (limit // 3)
    again = Tally(0)
    run(context=scene(spend=again), folder=tmp_path / "w", header={"model": "m"})


def test_another_warmup_in_the_folder_is_refused(tmp_path):
    run(folder=tmp_path / "w", header={"model": "m"})
    for problem, options in (
        ("model", {"header": {"model": "n"}}),
        ("learning_rate", {"settings": replace(SETTINGS, learning_rate=1e-3), "header": {"model": "m"}}),
        ("num_chosen", {"rows": ROWS[:4], "header": {"model": "m"}}),
        ("rows", {"context": scene(pool=toy_pool(order=range(23, -1, -1))), "header": {"model": "m"}}),
    ):
        with pytest.raises(ManifestError, match=f"another selection: {problem} is"):
            run(folder=tmp_path / "w", **options)


def test_nothing_is_computed_before_it_is_paid_for():
    calls = []
    context = scene(spend=Tally(0))
    context.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(BudgetExceededError):
        run(context=context)
    assert not calls


def test_stops_on_request():
    with pytest.raises(ScoringStoppedError):
        run(context=scene(stop_requested=lambda: True))


def test_a_loss_that_is_not_finite_ends_it():
    context = scene()
    with torch.no_grad():
        context.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="loss is nan at step 0"):
        run(context=context)


def test_packed_rows_are_refused():
    packed = lambda rows: {**collator()([dict(row) for row in rows]), "cu_seq_lens_q": torch.tensor([0, 3])}  # noqa: E731
    with pytest.raises(DataError, match="packed"):
        run(context=scene(collate=packed))
