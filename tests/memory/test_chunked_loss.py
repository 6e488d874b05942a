"""The chunked loss in a run: the trajectory of the plain one, evaluation untouched, TRL's own head left at work."""

import logging

import pytest
import torch

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts
from hf_eff.errors import PlanError
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.memory.chunked_loss import SPEC, ChunkedLoss, ChunkedLossConfig, adapt, cost
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tiny_tokenizer, tokenised


def trained(folder, memory="chunked_loss", options=None, **arguments):
    trainer = BudgetedTrainer(
        model=tiny_model(layers=2, width=32),
        args=BudgetedTrainingArguments(
            output_dir=str(folder),
            memory=memory,
            memory_kwargs=options or {},
            budget="100steps",
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            **{"optim": "sgd", **arguments},
        ),
        train_dataset=tokenised(tiny_pool(16), tiny_tokenizer()),
        eval_dataset=tokenised(tiny_target(), tiny_tokenizer()),
        data_collator=collator(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


START = weights(tiny_model(layers=2, width=32))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_moves_as_without(tmp_path, accumulation):
    whole = trained(tmp_path / "whole", "full", gradient_accumulation_steps=accumulation)
    parts = trained(tmp_path / "parts", options={"chunk_tokens": 7}, gradient_accumulation_steps=accumulation)
    moved = weights(whole.model) - START
    assert (weights(whole.model) - weights(parts.model)).norm() < 1e-5 * moved.norm()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_autocast_moves_as_without(tmp_path):
    whole = trained(tmp_path / "whole", "full", bf16=True)
    parts = trained(tmp_path / "parts", options={"chunk_tokens": 7}, bf16=True)
    moved = weights(whole.model) - START
    assert (weights(whole.model) - weights(parts.model)).norm() < 0.02 * moved.norm()


def test_evaluation_in_the_middle_sees_logits(tmp_path):
    seen = []

    def look(logits, labels):
        seen.append(logits.shape[-1])
        return logits.argmax(dim=-1)

    trainer = BudgetedTrainer(
        model=tiny_model(layers=2, width=32),
        args=BudgetedTrainingArguments(
            output_dir=str(tmp_path),
            memory="chunked_loss",
            budget="100steps",
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=tokenised(tiny_pool(16), tiny_tokenizer()),
        eval_dataset=tokenised(tiny_target(), tiny_tokenizer()),
        data_collator=collator(),
        processing_class=tiny_tokenizer(),
        compute_metrics=lambda prediction: {},
        preprocess_logits_for_metrics=look,
    )
    trainer.train()
    assert set(seen) == {262}


@pytest.mark.parametrize("memory", ["mezo", "badam", "lora"])
def test_other_methods_go_on_top_or_below(tmp_path, memory):
    together = f"{memory}+chunked_loss" if memory == "lora" else f"chunked_loss+{memory}"
    inner = {"switch_every": 1, "mode": "ascending"} if memory == "badam" else {}
    optim = {"optim": "adamw_torch"} if memory == "mezo" else {}
    alone = trained(tmp_path / "alone", memory, inner, **optim)
    both = trained(tmp_path / "both", together, {memory: inner} if inner else {}, **optim)
    names = [name for name, parameter in alone.model.named_parameters() if parameter.requires_grad]
    for name in names:
        first, second = alone.model.get_parameter(name), both.model.get_parameter(name)
        assert torch.allclose(first, second, rtol=1e-2, atol=1e-5), name


def test_label_smoothing_and_custom_losses_are_refused(tmp_path):
    with pytest.raises(PlanError, match="label_smoothing_factor"):
        trained(tmp_path, label_smoothing_factor=0.1)


def test_under_sft_the_fused_head_stays_at_work(tmp_path, caplog):
    from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer

    def run(memory):
        trainer = BudgetedSFTTrainer(
            model=tiny_model(layers=2, width=32),
            args=BudgetedSFTConfig(
                output_dir=str(tmp_path / memory),
                memory=memory,
                budget="100steps",
                max_steps=2,
                bf16=False,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=tiny_pool(16),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        return weights(trainer.model)

    with caplog.at_level(logging.INFO, logger="hf_eff"):
        found = run("chunked_loss")
    assert torch.equal(found, run("full"))
    assert "fused head" in caplog.text


def facts_of(model, trainer="trainer"):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=8, mean_tokens=64, max_tokens=64),
        run=RunFacts(batch_size=2, length=64, trainer=trainer),
    )


def test_forecast_of_what_is_kept():
    model = tiny_model(layers=2, width=32, vocab_size=4000, tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    facts, config = facts_of(model), ChunkedLossConfig(chunk_tokens=8)
    method = ChunkedLoss(config)
    method.train_begin(model, 0)
    ids = torch.randint(3, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    meter = MemoryMeter(model)
    with meter.forward_backward(), method._head.active():
        model.train()(input_ids=ids, labels=ids).loss.backward()
    forecast = cost(config, facts).bytes["activations"]
    assert meter.peak_bytes()["activations"] == pytest.approx(forecast, rel=0.08)
    assert forecast < 0.5 * 4 * 128 * 4000  # the logits alone


def test_facts_tell_later_methods():
    model = tiny_model(layers=2, width=32)
    assert adapt(ChunkedLossConfig(chunk_tokens=64), facts_of(model)).run.loss_tokens == 64
    assert adapt(ChunkedLossConfig(chunk_tokens=64), facts_of(model, "sft")).run.loss_tokens == 4096
    assert SPEC.traits.needs_causal_lm
