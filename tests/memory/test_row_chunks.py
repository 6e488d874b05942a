"""Micro-batches in parts of rows: the trajectory of the whole, in a fraction of the activations."""

import pytest
import torch

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts
from hf_eff.errors import OptionError, PlanError
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.memory.row_chunks import SPEC, RowChunksConfig, adapt, cost
from hf_eff.testing.rehearsal import Rehearsal, toy_batches
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_tokenizer, tokenised

ROWS = tokenised(tiny_pool(16), tiny_tokenizer())


def trained(folder, memory="full", options=None, model=None, **arguments):
    trainer = BudgetedTrainer(
        model=model or tiny_model(layers=2, width=32),
        args=BudgetedTrainingArguments(
            output_dir=str(folder),
            memory=memory,
            memory_kwargs=options or {},
            budget="100steps",
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            optim="adamw_torch" if "mezo" in memory else "sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            **arguments,
        ),
        train_dataset=ROWS,
        data_collator=collator(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def apart(first, second, start):
    return float((weights(first) - weights(second)).norm() / (weights(first) - start).norm())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("options", [{"chunks": 2}, {"chunks": 3}, {"rows_at_once": 1}, {"chunks": 4, "trim": True}])
def test_trainer_moves_as_without(tmp_path, options, accumulation):
    start = torch.cat([parameter.detach().flatten() for parameter in tiny_model(layers=2, width=32).parameters()])
    whole = trained(tmp_path / "whole", gradient_accumulation_steps=accumulation)
    parts = trained(tmp_path / "parts", "row_chunks", options, gradient_accumulation_steps=accumulation)
    assert apart(whole, parts, start) < 1e-5
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_zeroth_order_sees_more_micro_batches_and_finds_the_same_slope(tmp_path):
    options = {"row_chunks": {"chunks": 2}}
    whole = trained(tmp_path / "whole", "mezo", gradient_accumulation_steps=2)
    parts = trained(tmp_path / "parts", "row_chunks+mezo", options, gradient_accumulation_steps=2)
    slopes = [run.state.log_history[0]["eff/projected_grad"] for run in (whole, parts)]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-2)


def test_blockwise_below_moves_as_without(tmp_path):
    inner = {"switch_every": 1, "mode": "ascending"}
    start = torch.cat([parameter.detach().flatten() for parameter in tiny_model(layers=2, width=32).parameters()])
    whole = trained(tmp_path / "whole", "badam", inner)
    parts = trained(tmp_path / "parts", "row_chunks+badam", {"badam": inner})
    assert apart(whole, parts, start) < 1e-5


def test_sft_trainer_moves_as_without(tmp_path):
    from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer

    def run(memory):
        trainer = BudgetedSFTTrainer(
            model=tiny_model(layers=2, width=32),
            args=BudgetedSFTConfig(
                output_dir=str(tmp_path / memory),
                memory=memory,
                budget="100steps",
                max_steps=2,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                optim="sgd",
                bf16=False,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                logging_steps=1,
            ),
            train_dataset=tiny_pool(16),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        return trainer

    start = torch.cat([parameter.detach().flatten() for parameter in tiny_model(layers=2, width=32).parameters()])
    whole, parts = run("full"), run("row_chunks")
    assert apart(whole, parts, start) < 1e-5
    counted = [
        [entry["num_tokens"] for entry in run.state.log_history if "num_tokens" in entry] for run in (whole, parts)
    ]
    assert counted[0] == counted[1]


def test_activations_shrink_with_the_parts():
    def kept(chunks):
        run = Rehearsal(SPEC, options={"chunks": chunks}).begin()
        meter = MemoryMeter(run.model)
        with meter.forward_backward():
            run.step(toy_batches(1, rows=8))
        return meter.peak_bytes()["activations"]

    assert kept(4) < 0.3 * kept(1)


def test_facts_and_refusals():
    facts = Facts(
        model=model_facts(tiny_model(layers=2, width=32)),
        pool=PoolFacts(num_rows=100, mean_tokens=16, max_tokens=16),
        run=RunFacts(batch_size=6, length=16),
    )
    assert adapt(RowChunksConfig(chunks=3), facts).run.row_chunks == 3
    assert adapt(RowChunksConfig(chunks=30), facts).run.row_chunks == 6
    assert adapt(RowChunksConfig(rows_at_once=4), facts).run.row_chunks == 2
    assert cost(RowChunksConfig(), facts).step_flops > 0
    flat = facts.replace(run=RunFacts(padding_free=True))
    with pytest.raises(PlanError, match="padding_free=False"):
        adapt(RowChunksConfig(), flat)
    with pytest.raises(OptionError, match="set one of them"):
        RowChunksConfig(chunks=4, rows_at_once=2)
    assert not SPEC.traits.packing
