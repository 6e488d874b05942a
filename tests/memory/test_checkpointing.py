"""Activation checkpointing: the same gradients to the last bit, layer inputs only, and no visit below what trains."""

import copy
import logging

import pytest
import torch
import transformers

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts
from hf_eff.engines.layer_checkpointing import checkpoint_layers, is_checkpointing
from hf_eff.engines.module_tree import find_blocks
from hf_eff.errors import PlanError
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.memory.checkpointing import Checkpointing, CheckpointingConfig, adapt, cost
from hf_eff.memory.lora import Lora, LoraConfig
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_tokenizer, tokenised

FACTS_RUN = {"batch_size": 2, "length": 16}


def batch(rows=2, length=16):
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradients(model, seed=0):
    torch.manual_seed(seed)
    model.train()(**batch()).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def state_of(model):
    parts = {}
    for name, module in model.named_modules():
        kept = {key: value for key, value in module.__dict__.items() if not key.startswith("_buffers")}
        parts[name] = {key: len(value) if "hooks" in key else value for key, value in kept.items() if value is not None}
        parts[name].pop("_modules", None)
        parts[name].pop("_parameters", None)
    return parts


def families():
    return {
        "llama": lambda: tiny_model(layers=4, width=32, attention_dropout=0.3),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=4, n_head=4, n_positions=64)
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=256, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
            )
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=256, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
    }


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("family", sorted(families()))
def test_gradients_are_bitwise_those_without_dropout_included(family, every):
    model = families()[family]()
    before = gradients(model)
    restore = checkpoint_layers(model, every)
    assert is_checkpointing(model)
    during = gradients(model)
    restore()
    assert before.keys() == during.keys()
    assert all(torch.equal(before[name], during[name]) for name in before)
    assert not is_checkpointing(model)


@pytest.mark.parametrize("every", [1, 2])
def test_layers_are_computed_twice_exactly_where_the_option_says(every):
    model, calls = tiny_model(layers=5, width=32), [0] * 5
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    checkpoint_layers(model, every)
    gradients(model)
    assert calls == [2 if index % every == 0 else 1 for index in range(5)]


@pytest.mark.parametrize("wrapped", [False, True])
def test_everything_is_put_back(wrapped):
    model = tiny_model(layers=2, width=32)
    if wrapped:
        model = Lora(LoraConfig(r=4)).prepare_model(model, 0)
    model.enable_input_require_grads()
    before = state_of(model)
    checkpoint_layers(model)()
    assert state_of(model) == before


def test_a_cache_is_not_asked_for_while_training(caplog):
    model = tiny_model(layers=2, width=32)
    assert model.config.use_cache
    restore = checkpoint_layers(model)
    with caplog.at_level(logging.WARNING):
        assert model.train()(**batch()).past_key_values is None
    assert not caplog.records
    assert model.eval()(**batch()).past_key_values is not None
    assert model.config.use_cache  # what a checkpoint would save
    restore()
    assert model.train()(**batch()).past_key_values is not None


# -- the backward stops at the lowest trained parameter


def visited(model):
    """Layers whose backward ran."""
    seen, handles = set(), []
    for index, (_, layer) in enumerate(find_blocks(model)):

        def note(_module, _inputs, output, index=index):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: seen.add(index))

        handles.append(layer.register_forward_hook(note))
    model.train()(**batch()).loss.backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("already_on", [False, True])
def test_frozen_layers_below_are_neither_visited_nor_recomputed(already_on):
    model = tiny_model(layers=4, width=32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.2." in name)
    if already_on:  # what activation_checkpointing=True does
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert visited(model) == {0, 1, 2, 3}
    method = Checkpointing(CheckpointingConfig())
    method.train_begin(model, 0)
    assert visited(model) == {2, 3}
    method.train_end()
    assert is_checkpointing(model) == already_on
    assert visited(model) == ({0, 1, 2, 3} if already_on else {2, 3})


def test_adapters_of_the_top_layers_keep_their_saving():
    model = Lora(LoraConfig(r=4, top_layers=1)).prepare_model(tiny_model(layers=4, width=32), 0)
    before = gradients(copy.deepcopy(model))
    Checkpointing(CheckpointingConfig()).train_begin(model, 0)
    assert visited(model) == {3}
    model.zero_grad()
    during = gradients(model)
    assert before.keys() == during.keys()
    assert all(torch.equal(before[name], during[name]) for name in before)


def trained(folder, memory, options=None, **arguments):
    trainer = BudgetedTrainer(
        model=tiny_model(layers=4, width=32),
        args=BudgetedTrainingArguments(
            output_dir=str(folder),
            memory=memory,
            memory_kwargs=options or {},
            budget="100steps",
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=tokenised(tiny_pool(8), tiny_tokenizer()),
        data_collator=collator(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert not is_checkpointing(trainer.model)
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("below", ["full", "badam", "lora"])
def test_a_run_is_bitwise_the_run_without(tmp_path, below):
    options = {"badam": {"switch_every": 1, "mode": "ascending"}}.get(below, {})
    plain = trained(tmp_path / "plain", below, options)
    together = "checkpointing" if below == "full" else f"checkpointing+{below}"
    checkpointed = trained(tmp_path / "checkpointed", together, {below: options} if options else {})
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


# -- memory


@pytest.mark.parametrize("every", [1, 2])
def test_kept_bytes_are_the_layers_inputs_and_the_logits(every):
    model = tiny_model(layers=6, width=64)
    facts = Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=8, mean_tokens=64, max_tokens=64),
        run=RunFacts(batch_size=2, length=64),
    )
    config = CheckpointingConfig(every_n_layers=every)
    method = Checkpointing(config)
    method.train_begin(model, 0)
    meter = MemoryMeter(model)
    with meter.forward_backward():
        loss = model.train()(**batch(2, 64)).loss
    held = meter.peak_bytes()["activations"]
    loss.backward()
    assert held == pytest.approx(cost(config, facts).bytes["activations"], rel=0.08)
    if every == 1:  # A = 4 V T + h T 4 L and the last norm
        tokens, hidden = 128, 64
        assert held == pytest.approx(4 * tokens * (262 + 6 * hidden + 3 * hidden), rel=0.03)


def test_facts_tell_later_methods():
    facts = Facts(
        model=model_facts(tiny_model(layers=2, width=32)),
        pool=PoolFacts(num_rows=8, mean_tokens=16, max_tokens=16),
        run=RunFacts(**FACTS_RUN),
    )
    run = adapt(CheckpointingConfig(every_n_layers=3), facts).run
    assert run.checkpointing
    assert run.checkpoint_every == 3


# -- what is refused or said


def test_reentrant_checkpointing_is_refused():
    model = tiny_model(layers=2, width=32)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(PlanError, match="reentrant"):
        Checkpointing(CheckpointingConfig()).train_begin(model, 0)


def test_a_model_that_was_reentrant_once_is_not_so_now():
    model = tiny_model(layers=2, width=32)
    before = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    Checkpointing(CheckpointingConfig()).train_begin(model, 0)
    during = gradients(model)
    assert all(torch.equal(before[name], during[name]) for name in during)


def test_a_model_without_switches_is_refused():
    with pytest.raises(PlanError, match="no layers that transformers can checkpoint"):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_taking_over_is_said(caplog):
    model = tiny_model(layers=2, width=32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with caplog.at_level(logging.INFO, logger="hf_eff"):
        Checkpointing(CheckpointingConfig()).train_begin(model, 0)
    assert "takes its place" in caplog.text
