from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_eff.engines import example_gradients as module
from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.engines.example_gradients import example_gradients
from hf_eff.engines.scoring import scoring_mode
from hf_eff.errors import DataError, PlanError
from hf_eff.testing.tiny import tiny_model

pytest.importorskip("peft")

LENGTHS = (9, 4, 7, 12)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64)))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return seeded(lambda: BertForSequenceClassification(BertConfig(vocab_size=97, num_labels=3, **shape)))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return seeded(lambda: T5ForConditionalGeneration(T5Config(vocab_size=97, **shape)))


def rows_of(model, seed=0):
    """Ragged rows, one of them with a masked prompt; ``labels`` as the model's head wants them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, 97, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = -100
        if type(model).__name__ == "BertForSequenceClassification":
            labels = torch.tensor(length % 3)
        if type(model).__name__ == "T5ForConditionalGeneration":
            labels = torch.randint(3, 97, (length // 2 + 1,), generator=generator)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def padded(rows, side="right"):
    """One batch of ragged rows; classification labels are stacked."""
    batch = {}
    for key, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        values = [row[key] for row in rows]
        if values[0].dim() == 0:
            batch[key] = torch.stack(values)
            continue
        width = max(len(value) for value in values)
        ends = [(width - len(v), 0) if side == "left" else (0, width - len(v)) for v in values]
        batch[key] = torch.stack(
            [torch.nn.functional.pad(v, end, value=fill) for v, end in zip(values, ends, strict=True)]
        )
    return batch


def looped(model, factors, rows, *, causal, divide="mean"):
    """The definition: each row alone, unpadded, through autograd and a cross-entropy of our own."""
    gradients = []
    for row in rows:
        inputs = {key: value[None] for key, value in row.items()}
        logits = model(**inputs, **({"use_cache": False} if causal else {})).logits
        labels = inputs["labels"]
        if causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        labels = labels.reshape(-1)
        loss = cross_entropy(logits.reshape(len(labels), -1), labels, ignore_index=-100, reduction="sum")
        count = (labels != -100).sum()
        loss = loss / {"mean": count, "sum": 1, "sqrt": count.sqrt()}[divide]
        gradients.append(torch.autograd.grad(loss, [factor.weight for factor in factors.values()]))
    return [torch.stack([row[i].flatten() for row in gradients]) for i in range(len(factors))]


def spread(adapter, seed=1):
    """Factors of ordinary size: with B at zero every gradient of A would vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter.factors.values():
            factor.weight.copy_(0.05 * torch.randn(factor.weight.shape, generator=generator))


def worst(found, expected):
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, expected, strict=True)
    )


def compare(model, *, causal, side="right", reduction="mean", targets=None):
    rows = rows_of(model)
    with scoring_mode(model), temporary_adapter(model, LoraShape(rank=3, alpha=7, target_modules=targets)) as adapter:
        spread(adapter)
        batch = padded(rows, side)
        found = dict(example_gradients(model, adapter.factors, batch, is_causal_lm=causal, reduction=reduction))
        assert list(found) == list(range(len(adapter.factors)))
        expected = looped(model, adapter.factors, rows, causal=causal, divide=reduction)
        return worst(list(found.values()), expected)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_equals_the_loop_on_causal_models(make, side):
    assert compare(make(), causal=True, side=side) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
def test_equals_the_loop_for_each_reduction(reduction):
    assert compare(tiny_model(), causal=True, reduction=reduction) < 1e-5


@pytest.mark.parametrize("make", [bert, t5])
def test_equals_the_loop_on_other_models(make):
    assert compare(make(), causal=False) < 1e-5


def test_equals_the_loop_on_every_linear_layer():
    targets = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert compare(tiny_model(), causal=True, targets=targets) < 1e-5


def test_equals_the_loop_in_float64():
    # Layer norms and attention of GPT-2 keep float64; Llama's norm computes in float32.
    assert compare(gpt2().double(), causal=True) < 1e-10
    assert compare(bert().double(), causal=False) < 1e-10


def test_bfloat16_autocast_stays_close():
    model = tiny_model()
    batch = padded(rows_of(model))
    with scoring_mode(model), temporary_adapter(model, LoraShape()) as adapter:
        spread(adapter)
        exact = [g for _, g in example_gradients(model, adapter.factors, batch, is_causal_lm=True)]
        half = [
            g
            for _, g in example_gradients(
                model, adapter.factors, batch, is_causal_lm=True, compute_dtype=torch.bfloat16
            )
        ]
    assert all(gradient.dtype == torch.float32 for gradient in half)
    assert 1e-5 < worst([torch.cat(half, dim=1)], [torch.cat(exact, dim=1)]) < 0.05


def test_a_factor_that_is_called_twice_counts_both_calls():
    model = tiny_model()
    model.model.layers[1] = model.model.layers[0]
    assert compare(model, causal=True) < 1e-5


def test_a_row_without_loss_has_gradient_zero_and_spoils_no_other():
    model, rows = tiny_model(), rows_of(tiny_model())
    rows[1]["labels"] = torch.full_like(rows[1]["labels"], -100)
    with scoring_mode(model), temporary_adapter(model, LoraShape()) as adapter:
        spread(adapter)
        found = [g for _, g in example_gradients(model, adapter.factors, padded(rows), is_causal_lm=True)]
        kept = [rows[i] for i in (0, 2, 3)]
        expected = looped(model, adapter.factors, kept, causal=True)
    assert all(torch.count_nonzero(gradient[1]) == 0 for gradient in found)
    assert worst([gradient[[0, 2, 3]] for gradient in found], expected) < 1e-5


def test_a_head_scored_row_by_row_is_followed():
    from transformers import BertConfig, BertForQuestionAnswering

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = seeded(lambda: BertForQuestionAnswering(BertConfig(vocab_size=97, **shape)))
    batch = {
        "input_ids": torch.randint(3, 97, (3, 8), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
        "start_positions": torch.tensor([1, 2, 3]),
        "end_positions": torch.tensor([4, 4, 6]),
    }
    with scoring_mode(model), temporary_adapter(model, LoraShape(rank=2)) as adapter:
        spread(adapter)
        found = [g for _, g in example_gradients(model, adapter.factors, batch, is_causal_lm=False)]
        for row in range(3):
            loss = model(**{key: value[row : row + 1] for key, value in batch.items()}).loss
            expected = torch.autograd.grad(loss, [factor.weight for factor in adapter.factors.values()])
            assert worst([g[row] for g in found], [g.flatten() for g in expected]) < 1e-5


def test_the_fused_head_that_trl_patches_in_is_passed_by():
    trl_utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(trl_utils, "add_fused_lm_head"):
        pytest.skip("this trl patches no head in")
    import inspect

    model = tiny_model()
    arguments = inspect.signature(trl_utils.add_fused_lm_head).parameters
    trl_utils.add_fused_lm_head(model, *([8] if len(arguments) > 1 else []))
    assert compare(model, causal=True) < 1e-5


def test_no_gradient_hook_or_global_state_is_left_behind():
    model = tiny_model()
    batch = padded(rows_of(model))
    with temporary_adapter(model, LoraShape()) as adapter:
        weight = next(iter(adapter.factors.values())).weight
        weight.grad = torch.ones_like(weight)
        before = torch.random.get_rng_state()
        for _ in example_gradients(model, adapter.factors, batch, is_causal_lm=True):
            pass
        assert torch.equal(before, torch.random.get_rng_state())
        assert torch.equal(weight.grad, torch.ones_like(weight))
        others = [f.weight for f in adapter.factors.values() if f.weight is not weight]
        assert all(each.grad is None for each in [*others, *model.parameters()] if each is not weight)
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("key", ["cu_seq_lens_q", "seq_idx"])
def test_packed_batches_are_refused_by_key(key):
    model = tiny_model()
    batch = {**padded(rows_of(model)), key: torch.tensor([0, 4, 9])}
    with temporary_adapter(model, LoraShape()) as adapter, pytest.raises(DataError, match=f"packed .{key}"):
        next(example_gradients(model, adapter.factors, batch, is_causal_lm=True))


def test_packed_batches_are_refused_by_their_positions():
    model = tiny_model()
    ids = torch.arange(3, 12)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    with temporary_adapter(model, LoraShape()) as adapter:
        with pytest.raises(DataError, match="position_ids restart inside a row"):
            next(example_gradients(model, adapter.factors, batch, is_causal_lm=True))
        left = {**padded(rows_of(model), "left")}
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).masked_fill(left["attention_mask"] == 0, 1)
        assert list(example_gradients(model, adapter.factors, left, is_causal_lm=True))


def test_experts_that_see_loose_tokens_are_refused():
    from torch import nn

    class Router(nn.Module):
        def __init__(self, expert):
            super().__init__()
            self.q_proj = expert

        def forward(self, values):
            flat = values.reshape(-1, values.shape[-1])
            return self.q_proj(flat[: len(flat) // 2]).new_zeros(values.shape) + self.q_proj(flat).view(values.shape)

    model = tiny_model()
    mlp = model.model.layers[0].mlp
    model.model.layers[0].mlp = Router(nn.Linear(64, 64))
    assert mlp is not model.model.layers[0].mlp
    with temporary_adapter(model, LoraShape()) as adapter, pytest.raises(DataError, match="routed experts"):
        list(example_gradients(model, adapter.factors, padded(rows_of(model)), is_causal_lm=True))


def test_a_loss_over_the_whole_batch_is_refused():
    model = tiny_model()
    model.config.output_router_logits = True
    with temporary_adapter(model, LoraShape()) as adapter, pytest.raises(PlanError, match="output_router_logits"):
        next(example_gradients(model, adapter.factors, padded(rows_of(model)), is_causal_lm=True))


def test_an_adapter_that_is_switched_off_is_reported():
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = tiny_model()
    with temporary_adapter(model, LoraShape()) as adapter:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = True
        with pytest.raises(DataError, match="no LoRA factor took part"):
            next(example_gradients(model, adapter.factors, padded(rows_of(model)), is_causal_lm=True))


def test_logits_without_a_label_are_not_computed():
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    rows = rows_of(model)
    with temporary_adapter(model, LoraShape()) as adapter:
        list(example_gradients(model, adapter.factors, padded(rows), is_causal_lm=True))
        list(example_gradients(model, adapter.factors, padded(rows, "left"), is_causal_lm=True))
    # The earliest label to the right of a padded prompt is at 2, to the right of padding at 6; one less predicts it.
    assert seen == [12 - 1, 12 - 5]


@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_attention_equals_the_fused_kernel_in_half_precision(side, monkeypatch):
    model = tiny_model()
    batch, found = padded(rows_of(model), side), []
    with scoring_mode(model), temporary_adapter(model, LoraShape()) as adapter:
        spread(adapter)
        for short in (0, 128):
            monkeypatch.setattr(module, "_SHORT", short)
            half = example_gradients(model, adapter.factors, batch, is_causal_lm=True, compute_dtype=torch.bfloat16)
            found.append([gradient for _, gradient in half])
        exact = [g for _, g in example_gradients(model, adapter.factors, batch, is_causal_lm=True)]
    errors = [worst([torch.cat(each, dim=1)], [torch.cat(exact, dim=1)]) for each in found]
    between = worst([torch.cat(found[0], dim=1)], [torch.cat(found[1], dim=1)])
    # As close to each other as half precision is to the truth, and neither the closer one by much.
    assert between < 1.5 * max(errors)
    assert 0.5 < errors[0] / errors[1] < 2


@pytest.mark.parametrize(
    ("dtype", "width", "plain"),
    [(torch.bfloat16, 128, True), (torch.float16, 8, True), (torch.bfloat16, 129, False), (None, 8, False)],
)
def test_plain_attention_is_for_short_rows_in_half_precision(dtype, width, plain):
    batch = {"input_ids": torch.zeros(2, width, dtype=torch.long)}
    before = torch.backends.cuda.flash_sdp_enabled()
    with module._attention(tiny_model(), batch, dtype):
        assert torch.backends.cuda.flash_sdp_enabled() is (before and not plain)
    assert torch.backends.cuda.flash_sdp_enabled() is before
    with module._attention(tiny_model().to(torch.bfloat16), batch, None):
        assert torch.backends.cuda.flash_sdp_enabled() is (before and width > 128)


def test_the_head_multiplies_contiguous_states(monkeypatch):
    """A slice of the positions would be multiplied row by row, with a copy of the head's weight for each."""
    model, seen = tiny_model(2, 32), []
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda states: seen.append(states) or forward(states))
    ids = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < 6, -100)}
    with temporary_adapter(model, LoraShape(rank=2)) as adapter:
        list(example_gradients(model, adapter.factors, batch, is_causal_lm=True))
        model(input_ids=ids, logits_to_keep=7)
    assert [states.shape[1] for states in seen] == [7, 7]
    assert [states.is_contiguous() for states in seen] == [True, False]
    assert not model.lm_head._forward_pre_hooks
