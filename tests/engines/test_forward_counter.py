import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.engines.forward_counter import ForwardCounter, cached_forward_flops
from hf_eff.engines.rollout_cost import rollouts_of, unseen_flops
from hf_eff.errors import EffWarning
from hf_eff.numerics.flops import forward_flops, generation_flops, recompute_flops, training_flops
from hf_eff.testing.tiny import tiny_model


def tokens(rows, length, seed=0):
    return torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    return tiny_model(2, 32, attn_implementation="eager")


def test_training_and_looking_are_told_apart(model):
    facts, counter, ids = model_facts(model), ForwardCounter(model), tokens(2, 7)
    shape = BatchShape(2, 7)
    model.train()(input_ids=ids, labels=ids)
    amounts, seen = counter.take()
    assert amounts["flops"] == training_flops(facts, shape)
    assert (amounts["tokens"], amounts["loss_tokens"]) == (14, 12)
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()(input_ids=ids)
    amounts, seen = counter.take()
    assert amounts["flops"] == 2 * forward_flops(facts, shape)
    assert amounts["tokens"] == 0
    assert [each.trains for each in seen] == [False, False]
    with counter.paused():
        model(input_ids=ids)
    assert counter.take()[0]["flops"] == 0
    counter.remove()
    model(input_ids=ids)
    assert counter.take()[0]["flops"] == 0
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_checkpointing_runs_blocks_again(model):
    counter, facts = ForwardCounter(model, checkpointing=True), model_facts(model)
    shape = BatchShape(2, 7)
    model.train()(input_ids=tokens(2, 7))
    assert counter.take()[0]["flops"] == training_flops(facts, shape) + recompute_flops(facts, shape)


@pytest.mark.parametrize("rows", [1, 3])
def test_generation_costs_what_torch_counts(model, rows):
    counter = ForwardCounter(model)
    with FlopCounterMode(display=False) as measured:
        model.generate(tokens(rows, 9), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    amounts, seen = counter.take()
    assert amounts["flops"] == measured.get_total_flops()
    assert amounts["flops"] == pytest.approx(generation_flops(counter.facts, BatchShape(rows, 9), 5))
    assert [each.cached for each in seen] == [0, 9, 10, 11, 12]


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 40))
def test_positions_from_a_cache_add_up_to_the_causal_square(rows, new, cached):
    facts = model_facts(tiny_model(2, 32))
    whole = sum(cached_forward_flops(facts, rows, 1, cached + i) for i in range(new))
    assert whole == pytest.approx(
        generation_flops(facts, BatchShape(rows, cached + 1), new + 1)
        - generation_flops(facts, BatchShape(rows, cached + 1), 1)
        + cached_forward_flops(facts, rows, 1, cached)
        - cached_forward_flops(facts, rows, 1, cached + new)
    )


def test_an_adapter_is_its_own_reference_and_generates(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    counter, ids = ForwardCounter(adapted), tokens(2, 6)
    facts, shape = model_facts(adapted), BatchShape(2, 6)
    adapted.train()(input_ids=ids)
    assert counter.take()[0]["flops"] == training_flops(facts, shape)
    with torch.no_grad(), adapted.disable_adapter():
        adapted(input_ids=ids)
    assert counter.take()[0]["flops"] == forward_flops(facts, shape)
    with torch.no_grad():
        adapted.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert counter.take()[0]["flops"] == pytest.approx(generation_flops(facts, shape, 3))


def test_other_models_cost_their_own_forwards(model):
    other = tiny_model(3, 64).eval()
    counter = ForwardCounter(model, [other])
    other.train()(input_ids=tokens(2, 5))
    amounts, seen = counter.take()
    assert amounts["flops"] == forward_flops(model_facts(other), BatchShape(2, 5))
    assert not seen[0].is_policy


def test_a_failed_forward_is_counted_once_and_the_next_one_too(model):
    counter = ForwardCounter(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6))
    counter.take()
    model(input_ids=tokens(1, 4))
    assert counter.take()[0]["flops"] > 0


def test_what_cannot_be_counted_is_said_once():
    class Odd(torch.nn.Module):
        def forward(self, **_):
            return 0

    model = tiny_model(2, 32)
    odd = Odd()
    odd.config, odd.weight = model.config, torch.nn.Parameter(torch.zeros(2))
    counter = ForwardCounter(model, [odd])
    with pytest.warns(EffWarning, match="forwards of Odd without gradients are not counted"):
        odd(speed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd(speed=3)
    assert counter.take()[0]["flops"] == 0


def test_an_encoder_is_read_once():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    counter = ForwardCounter(model)
    with FlopCounterMode(display=False, custom_mapping=SDPA) as measured:
        model.generate(tokens(2, 6) % 100, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert counter.take()[0]["flops"] == pytest.approx(measured.get_total_flops(), rel=0.05)


def attention(query, key, value, *_, **__):
    rows, heads, length, width = query
    return 4 * rows * heads * length * key[2] * width


SDPA = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}


# -- what trainers that generate may spend ---------------------------------------------------------------------------


def arguments(**changes):
    return SimpleNamespace(
        **{
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 1,
            "num_generations": 4,
            "num_iterations": 1,
            "max_completion_length": 8,
            "beta": 0.0,
            **changes,
        }
    )


@settings(max_examples=30)
@given(prompt=st.integers(1, 30), length=st.integers(1, 8), accumulation=st.integers(1, 4), beta=st.booleans())
def test_no_rollout_costs_more_than_the_bound(prompt, length, accumulation, beta):
    facts = model_facts(tiny_model(2, 32))
    rollouts = rollouts_of(arguments(gradient_accumulation_steps=accumulation, beta=0.1 * beta))
    spent = 0.0
    for _ in range(accumulation):
        spent += generation_flops(facts, BatchShape(4, prompt), length)
        spent += (1 + beta) * forward_flops(facts, BatchShape(4, prompt + length))
        spent += training_flops(facts, BatchShape(4, prompt + length))
        spent += 2 * facts.head_matmul_params * 4 * (prompt + length)
    bound = rollouts.bound(facts, prompt)
    assert spent <= bound * (1 + 1e-12)
    if length == 8:
        assert spent == pytest.approx(bound)


def test_arguments_of_a_trainer_that_does_not_generate():
    assert rollouts_of(SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=1)) is None


def test_rows_are_generated_for_several_steps():
    rollouts = rollouts_of(arguments(gradient_accumulation_steps=6, steps_per_generation=4, num_iterations=2))
    assert (rollouts.rows, rollouts.times, rollouts.trained_rows, rollouts.uses) == (16, 1, 24, 2)


@pytest.mark.parametrize(
    ("args", "options", "share"),
    [
        (SimpleNamespace(precompute_ref_log_probs=False), {}, 1.0),
        (SimpleNamespace(precompute_ref_log_probs=True), {}, 0.0),
        (SimpleNamespace(precompute_ref_log_probs=False), {"sees_reference": True}, 0.0),
        (SimpleNamespace(precompute_ref_log_probs=False), {"is_peft": True}, 0.0),
        (SimpleNamespace(), {}, 0.0),
        (arguments(beta=0.1), {}, 1.0),
        (arguments(beta=0.1, num_iterations=2), {}, 0.5),
        (arguments(beta=0.1), {"sees_reference": True}, 0.0),
        (arguments(use_vllm=True), {}, 1.0),
    ],
)
def test_what_no_hook_sees(model, args, options, share):
    counter = ForwardCounter(model)
    model.train()(input_ids=tokens(2, 7))
    _, seen = counter.take()
    hidden = unseen_flops(args, seen, **{"sees_reference": False, "is_peft": False, **options})
    assert hidden == share * forward_flops(counter.facts, BatchShape(2, 7))
