import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_eff import (
    BlockwiseTrainer,
    BudgetedSFTConfig,
    BudgetedSFTTrainer,
    BudgetedTrainer,
    BudgetedTrainerMixin,
    BudgetedTrainingArguments,
    ZOTrainer,
)
from hf_eff.errors import DataError, EffWarning, OptionError, PlanError, TrainingDivergedError
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tiny_tokenizer, tokenised

COMMON = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "seed": 3,
}


def make(folder, cls=BudgetedTrainer, model=None, **options):
    named = {
        name: options.pop(name)
        for name in ("train_dataset", "eval_dataset", "callbacks", "model_init", "optimizers", "governor_objective")
        if name in options
    }
    named.setdefault("train_dataset", tokenised(tiny_pool(24)))
    named.setdefault("eval_dataset", tokenised(tiny_target(8)))
    if "model_init" not in named:
        named["model"] = model or tiny_model(2, 32)
    args = BudgetedTrainingArguments(output_dir=str(folder), **{**COMMON, **options})
    return cls(args=args, data_collator=collator(), **named)


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# budgets


def test_a_flop_budget_is_spent_to_the_last_step_that_fits(tmp_path):
    free = make(tmp_path / "free", budget="1e30flop")
    free.train()
    steps = [entry["eff/flops"] for entry in free.state.log_history if "eff/flops" in entry]
    assert len(steps) == 6
    limit = (steps[3] + steps[4]) / 2
    trainer = make(tmp_path / "bound", budget=f"{limit:.0f}flop")
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.ledger.spent()["flops"] == steps[3] <= limit
    assert trainer.report["binding"]["stopped_by"] == "flops"


def test_a_token_budget_counts_padding(tmp_path):
    lengths = []

    class Shapes(TrainerCallback):
        pass

    trainer = make(tmp_path, budget="1e9tok", callbacks=[Shapes()])
    stock = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        lengths.append(inputs["input_ids"].numel())
        return stock(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert trainer.ledger.spent()["tokens"] == sum(lengths)


def test_a_budget_below_one_step_trains_nothing_and_says_so(tmp_path):
    trainer = make(tmp_path, budget="10tok")
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 0
    assert equal(before, weights(trainer))
    assert "does not cover one optimizer step" in (tmp_path / "report.md").read_text()


def test_a_time_budget_ends_the_run(tmp_path):
    trainer = make(tmp_path, budget="6s", max_steps=10_000)
    trainer.train()
    assert 0 < trainer.state.global_step < 10_000
    assert trainer.report["binding"]["stopped_by"] == "seconds"


def test_the_schedule_ends_with_the_budget(tmp_path):
    probe = make(tmp_path / "probe", budget="1e30flop", max_steps=4, lr_scheduler_type="linear")
    probe.train()
    limit = probe.ledger.spent()["flops"] * 1.01
    trainer = make(tmp_path / "run", budget=f"{limit:.0f}flop", max_steps=400, lr_scheduler_type="linear")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == 1e-3
    assert rates[-1] < 0.5e-3


def test_where_a_budget_stops_a_checkpoint_is_kept(tmp_path):
    trainer = make(tmp_path, budget="3steps", save_strategy="steps", save_steps=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    again = make(tmp_path, budget="5steps", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


# the governor's modes


def test_observe_changes_no_bit(tmp_path):
    plain = make(tmp_path / "plain")
    plain.train()
    watched = make(
        tmp_path / "watched",
        governor="marginal_gain",
        governor_mode="observe",
        governor_kwargs={"num_examples": 2, "probe_share": 1.0},
    )
    watched.train()
    assert equal(weights(plain), weights(watched))
    log = [json.loads(line) for line in (tmp_path / "watched" / "governor.jsonl").read_text().splitlines()]
    assert log[0]["kind"] == "header"
    assert any(record["kind"] == "decision" for record in log)


def test_a_governor_may_watch_another_quantity_than_the_loss(tmp_path):
    def hits(model, batch):
        labels = batch["labels"][:, 1:]
        right = model(**batch).logits[:, :-1].argmax(-1) == labels
        return (right & (labels != -100)).sum(1).double()

    trainer = make(
        tmp_path,
        governor="marginal_gain",
        governor_mode="observe",
        governor_kwargs={"num_examples": 8, "probe_share": 1.0},
        governor_objective=hits,
    )
    trainer.train()
    log = [json.loads(line) for line in (tmp_path / "governor.jsonl").read_text().splitlines()]
    means = [record["telemetry"]["probe"]["mean"] for record in log if record["kind"] == "decision"]
    assert means
    assert all(float(mean * 8).is_integer() for mean in means)  # counts of eight rows, not nats
    assert all(-16 <= mean <= 16 for mean in means)


def test_a_quantity_that_no_governor_watches_is_refused(tmp_path):
    for options in ({}, {"budget": "1Tflop"}):
        with pytest.raises(PlanError, match="governor_objective is given and the governor reads no held-out rows"):
            make(tmp_path, governor_objective=lambda model, batch: 0.0, **options)


def test_estimated_energy_is_called_so(tmp_path):
    trainer = make(tmp_path, budget="1kWh", power_watts=100.0)
    trainer.train()
    source = trainer.ledger.energy_source
    kwh = trainer.report["currencies"]["kwh"]["measured"]
    assert trainer.state.global_step == COMMON["max_steps"]
    assert kwh > 0
    label = "energy (estimated)" if source == "estimated" else "| energy |"
    assert label in (tmp_path / "report.md").read_text()


@pytest.fixture
def stopping_governor():
    from hf_eff.contracts.cost import Cost
    from hf_eff.contracts.governor import Decision, Governor
    from hf_eff.contracts.spec import MethodConfig, MethodSpec
    from hf_eff.registry import register_method, unregister_method

    class StopAtThree(Governor):
        def observe(self, telemetry):
            return Decision("stop", "three is enough") if telemetry.step >= 3 else Decision("continue", "go on")

    spec = MethodSpec(
        name="stop_at_three",
        kind="governor",
        slot="policy",
        summary="Stops at step 3.",
        config=MethodConfig,
        build=lambda config: StopAtThree(),
        cost=lambda config, facts: Cost(),
    )
    yield register_method(spec)
    unregister_method("governor", "stop_at_three")


def test_act_stops_advise_speaks_observe_is_silent(tmp_path, stopping_governor):
    acting = make(tmp_path / "act", governor="stop_at_three")
    acting.train()
    assert acting.state.global_step == 3
    assert acting.report["governor"]["ended"] == "three is enough"
    advising = make(tmp_path / "advise", governor="stop_at_three", governor_mode="advise")
    with pytest.warns(EffWarning, match="at step 3 the governor advises to stop: three is enough"):
        advising.train()
    assert advising.state.global_step == 6
    silent = make(tmp_path / "observe", governor="stop_at_three", governor_mode="observe")
    silent.train()
    assert silent.state.global_step == 6


# methods and trainers


def test_trainers_bring_their_methods(tmp_path):
    block = make(tmp_path / "block", BlockwiseTrainer, memory_kwargs={"switch_every": 3})
    zeroth = make(tmp_path / "zo", ZOTrainer)
    assert [chosen.spec.name for chosen in block.plan.resolved.memory] == ["badam"]
    assert [chosen.spec.name for chosen in zeroth.plan.resolved.memory] == ["mezo"]
    assert block.args.ddp_find_unused_parameters is True  # DDP is told, although memory= named no method
    for trainer in (block, zeroth):
        before = weights(trainer)
        trainer.train()
        assert not equal(before, weights(trainer))
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_lora_and_a_method_under_it(tmp_path):
    trainer = make(tmp_path, memory="lora+badam", memory_kwargs={"r": 2, "switch_every": 3})
    before = weights(trainer)
    trainer.train()
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_second_call_is_a_new_run(tmp_path):
    trainer = make(tmp_path, BlockwiseTrainer, memory_kwargs={"switch_every": 2}, budget="4steps")
    trainer.train()
    first = trainer.ledger.spent()["flops"]
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.ledger.spent()["flops"] == pytest.approx(first, rel=0.5)


def test_model_init_with_a_method_that_changes_the_model(tmp_path):
    trainer = make(tmp_path, model_init=lambda: tiny_model(2, 32), memory="lora", memory_kwargs={"r": 2})
    trainer.train()
    assert type(trainer.model).__name__.startswith("Peft")


def test_the_mixin_goes_over_any_trainer(tmp_path):
    class Doubling(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return 2 * loss

    class Budgeted(BudgetedTrainerMixin, Doubling):
        pass

    trainer = make(tmp_path, Budgeted, memory="badam", memory_kwargs={"switch_every": 2}, budget="4steps")
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.log_history[0]["loss"] > 9


def test_true_flops_reach_the_trackers(tmp_path):
    trainer = make(tmp_path, BlockwiseTrainer, memory_kwargs={"switch_every": 3}, save_strategy="steps", save_steps=6)
    trainer.train()
    assert trainer.state.total_flos == pytest.approx(trainer.ledger.by_purpose()["train"]["flops"])


# selection inside a trainer


def test_selection_narrows_what_is_trained_on(tmp_path):
    pool = tokenised(tiny_pool(24))
    trainer = make(tmp_path, selection="random", selection_kwargs={"num_examples": 8}, train_dataset=pool)
    assert trainer.selection is None
    trainer.train()
    assert len(trainer.train_dataset) == len(trainer.selection.indices) == 8
    kept = trainer.selection.apply(pool)
    assert sorted(map(tuple, kept["input_ids"])) == sorted(map(tuple, trainer.train_dataset["input_ids"]))
    assert (tmp_path / "selection" / "manifest.json").is_file()


def test_sft_selects_users_rows_before_packing(tmp_path):
    pool = tiny_pool(24)
    args = BudgetedSFTConfig(
        output_dir=str(tmp_path), **COMMON, bf16=False, activation_checkpointing=False, packing=True, max_length=64,
        selection="length", selection_kwargs={"num_examples": 6},
    )  # fmt: skip
    trainer = BudgetedSFTTrainer(
        model=tiny_model(2, 32), args=args, train_dataset=pool, processing_class=tiny_tokenizer()
    )
    trainer.train()
    chosen = trainer.selection.apply(pool)
    longest = sorted((len(row["completion"]) for row in pool), reverse=True)[:6]
    assert sorted((len(text) for text in chosen["completion"]), reverse=True) == longest
    packed = [token for row in trainer.train_dataset["input_ids"] for token in row]
    tokens = sum(len(trainer.processing_class(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in chosen)
    assert len(packed) == tokens
    assert set(trainer.train_dataset.column_names) == {"input_ids", "labels", "seq_lengths"}


def test_stages_narrow_the_pool_one_after_another(tmp_path):
    pool = tokenised(tiny_pool(24))
    kwargs = {"pipeline": [{"length": {"fraction": 0.5}}], "num_examples": 4, "band": "low"}
    trainer = make(tmp_path, selection="perplexity", selection_kwargs=kwargs, train_dataset=pool)
    assert trainer.plan.selected_rows == 4
    trainer.train()
    scored = trainer.ledger.by_purpose()["select"]["tokens"]
    lengths = sorted((len(row["input_ids"]) for row in pool), reverse=True)
    assert sum(lengths[:12]) <= scored < sum(lengths)
    assert trainer.plan.flops["select"] == pytest.approx(trainer.ledger.by_purpose()["select"]["flops"], rel=0.5)
    params = trainer.selection.manifest["selection"]["params"]
    assert params["pipeline"][0]["method"] == "length"
    assert "then" in str(trainer.plan).splitlines()[0]


def test_a_plan_over_the_cap_trains_on_random_rows(tmp_path):
    options = {"selection": "perplexity", "selection_kwargs": {"num_examples": 8, "max_selection_fraction": 0.01}}
    trainer = make(tmp_path, **options)
    assert trainer.plan.flops["select"] == 0
    assert "more than the max_selection_fraction=0.01 allowed" in trainer.plan.warnings[0]
    trainer.train()
    assert trainer.selection.manifest["selection"]["method"] == "random"
    assert len(trainer.selection) == 8
    assert trainer.ledger.by_purpose().get("select", {}).get("flops", 0.0) == 0.0


def test_a_stream_is_narrowed_too(tmp_path):
    pool = tokenised(tiny_pool(24))
    options = {"selection": "random", "selection_kwargs": {"num_examples": 8}}
    streamed = make(tmp_path / "stream", **options, train_dataset=pool.to_iterable_dataset())
    whole = make(tmp_path / "whole", **options, train_dataset=pool)
    for trainer in (streamed, whole):
        trainer.train()
    assert streamed.selection.indices.tolist() == whole.selection.indices.tolist()
    assert equal(weights(streamed), weights(whole))


def test_a_proxy_must_share_the_tokenizer(tmp_path):
    tiny_model(1, 32, vocab_size=100).save_pretrained(tmp_path / "proxy")
    args = BudgetedSFTConfig(
        output_dir=str(tmp_path / "out"), **COMMON, bf16=False, activation_checkpointing=False, max_length=64,
        selection="perplexity", selection_kwargs={"num_examples": 6, "proxy_model": str(tmp_path / "proxy")},
    )  # fmt: skip
    trainer = BudgetedSFTTrainer(
        model=tiny_model(2, 32), args=args, train_dataset=tiny_pool(24), processing_class=tiny_tokenizer()
    )
    with pytest.raises(PlanError, match="the proxy has 100 embeddings and the tokenizer 262 tokens"):
        trainer.train()


def test_a_changed_dataset_is_refused_on_resume(tmp_path):
    options = {
        "selection": "random",
        "selection_kwargs": {"num_examples": 12},
        "save_strategy": "steps",
        "save_steps": 2,
    }
    make(tmp_path, **options).train()
    rows = tokenised(tiny_pool(24)).to_list()
    for row in rows:
        row["input_ids"][0] = 99
    from datasets import Dataset

    changed = make(tmp_path, **options, train_dataset=Dataset.from_list(rows))
    with pytest.raises(Exception, match="have another content than when selected"):
        changed.train(resume_from_checkpoint=True)
    shorter = make(tmp_path, **options, train_dataset=tokenised(tiny_pool(23)))
    with pytest.raises(Exception, match="trained on a pool of 24 rows and this one has 23"):
        shorter.train(resume_from_checkpoint=True)


# what cannot work


def test_other_methods_cannot_resume_a_run(tmp_path):
    make(tmp_path, BlockwiseTrainer, memory_kwargs={"switch_every": 2}, save_strategy="steps", save_steps=2).train()
    with pytest.raises(Exception, match=r"the checkpoint was written with .*badam.* and this run has .*mezo"):
        make(tmp_path, ZOTrainer).train(resume_from_checkpoint=True)


def test_diverging_losses_end_the_run_with_one_sentence(tmp_path):
    model = tiny_model(2, 32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="the loss is nan for 3 steps in a row"):
        make(tmp_path, model=model, budget="1h").train()


def test_unwritable_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((OptionError, OSError), match=r"cannot be written|Not a directory"):
        make(tmp_path / "file" / "out", budget="1h")


def test_empty_pool_and_missing_target(tmp_path):
    with pytest.raises(PlanError, match="train_dataset is empty"):
        make(tmp_path, budget="1h", train_dataset=tokenised(tiny_pool(24)).select([]))
    with pytest.raises(PlanError, match="selection='less' needs a target"):
        make(tmp_path, selection="less", eval_dataset=None)
    with pytest.raises(DataError, match="num_examples=99 is more than the 24 valid rows"):
        make(tmp_path, selection="random", selection_kwargs={"num_examples": 99}).train()


def test_run_folder_holds_the_whole_story(tmp_path):
    trainer = make(
        tmp_path, selection="random", selection_kwargs={"num_examples": 12}, memory="badam",
        memory_kwargs={"switch_every": 3}, governor="marginal_gain", budget="1Tflop",
    )  # fmt: skip
    trainer.train()
    names = {path.name for path in Path(tmp_path).iterdir()}
    assert {"plan.json", "selection", "governor.jsonl", "report.json", "report.md", "README.md"} <= names
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["memory"]["weights"]["measured"] == pytest.approx(report["memory"]["weights"]["predicted"], rel=0.02)
    assert report["memory"]["optimizer"]["measured"] == pytest.approx(
        report["memory"]["optimizer"]["predicted"], rel=0.02
    )
    assert report["currencies"]["flops"]["measured"] == trainer.ledger.spent()["flops"]
    assert report["currencies"]["kwh"]["measured"] is None or report["currencies"]["kwh"]["measured"] > 0


def test_stock_arguments_and_no_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
    trainer = BlockwiseTrainer(tiny_model(2, 32), args, collator(), tokenised(tiny_pool(24)))
    assert [chosen.spec.name for chosen in trainer.plan.resolved.memory] == ["badam"]
