"""Both parts of an Addax step against torch's SGD and against MeZO, bit for bit, and their sum at the old weights."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.contracts.memory import OptimizerContext, StepContext
from hf_eff.engines.facts import model_facts
from hf_eff.errors import CheckpointError, EffWarning, OptionError, PlanError, TrainingDivergedError
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.memory.addax import Addax, AddaxConfig, cost
from hf_eff.memory.mezo import MeZO, MeZOConfig
from hf_eff.numerics.activation_bytes import activation_bytes
from hf_eff.numerics.length_share import of_size
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan
from hf_eff.testing.rehearsal import token_loss
from hf_eff.testing.tiny import collator, tiny_model, tiny_tokenizer

DECAY, SHORT, LONG = 0.1, 6, 14


def toy(dtype=torch.float32, **changes):
    return tiny_model(layers=2, width=32, **{"attn_implementation": "eager", **changes}).to(dtype)


def row(length, seed):
    ids = torch.randint(6, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": ids}


def collated(rows):
    return dict(collator()(copy.deepcopy(rows)))


def short_rows(step):
    return [row(SHORT - i, 100 * step + i) for i in range(2)]


def long_rows(step):
    return [row(LONG - i, 100 * step + 10 + i) for i in range(3)]


def items(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def decayed(model):
    return frozenset(name for name, parameter in model.named_parameters() if parameter.dim() > 1)


def stock_step(model, inputs, num_items, **_changes):
    model.train()
    loss = token_loss(model, inputs, num_items)
    loss.backward()
    return loss.detach()


class Run:
    """One model under a memory method, without a trainer. Batches hold two short rows and three long ones."""

    def __init__(self, model, method=None, *, lr=1e-2, max_grad_norm=0.0, seed=0, weight_decay=DECAY, **options):
        self.model = model
        self.method = method or Addax(AddaxConfig(**{"short_rows": 2, **options}))
        self.optimizer = self.method.create_optimizer(
            OptimizerContext(
                model=model,
                candidates=frozenset(name for name, p in model.named_parameters() if p.requires_grad),
                decay_names=decayed(model),
                optimizer_class=torch.optim.AdamW,
                optimizer_kwargs={"lr": lr},
                weight_decay=weight_decay,
                stock=lambda: None,
                seed=seed,
                max_grad_norm=max_grad_norm,
            )
        )
        self.method.train_begin(model, 0)

    def train(self, index, batch, loss=token_loss):
        self.method.step_begin(index)
        return self.method.training_step(
            StepContext(
                model=self.model,
                unwrapped=self.model,
                inputs=batch,
                num_items=items(batch),
                micro_step=0,
                micro_steps=1,
                global_step=index,
                stock=stock_step,
                loss=loss,
                mean_over_ranks=lambda value: value,
            )
        )

    def step(self, index, batch=None, **changes):
        self.train(index, collated(short_rows(index) + long_rows(index)) if batch is None else batch, **changes)
        self.optimizer.step()
        self.model.zero_grad()
        return self

    def steps(self, *indices):
        for index in indices:
            self.step(index)
        return self

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def different(first, model):
    return [name for name, each in model.named_parameters() if not torch.equal(first[name], each.detach())]


def groups_of(model):
    names = decayed(model)
    return [
        {"params": [p for name, p in model.named_parameters() if name in names], "weight_decay": DECAY},
        {"params": [p for name, p in model.named_parameters() if name not in names], "weight_decay": 0.0},
    ]


def halved(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + step)


# -- fidelity


@pytest.mark.parametrize(("clip", "limit"), [(None, 0.0), ("two_backwards", 0.7)])
def test_without_the_long_rows_it_is_sgd_on_the_short_ones_bit_for_bit(clip, limit):
    run = Run(toy(), alpha=0.0, clip=clip, max_grad_norm=limit)
    model = toy()
    sgd = torch.optim.SGD(groups_of(model), lr=1e-2)
    for step in range(6):
        halved(run.optimizer, step)
        run.step(step)
        halved(sgd, step)
        token_loss(model.train(), collated(short_rows(step))).backward()
        if limit:
            norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
            assert run.method.grad_norm() == float(norm) > limit
        sgd.step()
        model.zero_grad()
    assert different(run.weights(), model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_without_the_short_rows_it_is_mezo_on_the_long_ones_bit_for_bit(dtype, distribution):
    run = Run(toy(dtype), alpha=1.0, distribution=distribution, zo_clip=2.0)
    mezo = Run(toy(dtype), MeZO(MeZOConfig(distribution=distribution, clip=2.0)))
    for step in range(4):
        halved(run.optimizer, step)
        halved(mezo.optimizer, step)
        run.step(step)
        mezo.step(step, collated(long_rows(step)))
    assert different(run.weights(), mezo.model) == []
    assert different(run.weights(), toy(dtype))


def increments(alpha, lr=1e-2):
    """What each part alone adds to the same weights, in float64."""
    model, mezo = toy(torch.float64), Run(toy(torch.float64), MeZO(MeZOConfig()), lr=lr)
    token_loss(model.train(), collated(short_rows(0))).backward()
    decay = {name: DECAY if name in decayed(model) else 0.0 for name, _ in model.named_parameters()}
    first = {n: -lr * (1 - alpha) * (p.grad + decay[n] * p.detach()) for n, p in model.named_parameters()}
    before = mezo.weights()
    after = mezo.step(0, collated(long_rows(0))).weights()
    return first, {name: alpha * (after[name] - before[name]) for name in before}


@pytest.mark.parametrize("alpha", [1e-3, 0.5])
def test_the_move_is_the_sum_of_both_parts_at_the_old_weights(alpha):
    run = Run(toy(torch.float64), alpha=alpha, weight_decay=DECAY)
    before = run.weights()
    after = run.step(0).weights()
    first, second = increments(alpha)
    for name in before:
        move, expected = after[name] - before[name], first[name] + second[name]
        assert float((move - expected).norm() / expected.norm()) < 1e-6, name
        assert float(first[name].norm()) * float(second[name].norm()) > 0


@pytest.mark.parametrize("tied", [True, False])
def test_one_gradient_is_alive_at_a_time(tied):
    model, alive = toy(tie_word_embeddings=tied), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(each.grad is not None for each in model.parameters()))
        )
    Run(model).step(0)
    assert max(alive) == 1
    assert len(alive) == len(list(model.parameters()))


def saved_bytes(model, act):
    """Peak of what autograd keeps alive, each storage once and no weight, while ``act`` runs."""
    live, peak, weights = {}, 0, {each.untyped_storage().data_ptr() for each in model.parameters()}

    class Holder:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            count, _ = live.get(self.key, (0, 0))
            live[self.key] = (count + 1, 0 if self.key in weights else tensor.untyped_storage().nbytes())
            peak = max(peak, sum(size for _, size in live.values()))

        def __del__(self):
            count, size = live.pop(self.key)
            if count > 1:
                live[self.key] = (count - 1, size)

    with torch.autograd.graph.saved_tensors_hooks(Holder, lambda holder: holder.tensor):
        act()
    return peak


def test_what_autograd_keeps_is_that_of_the_short_rows_alone():
    run, model = Run(toy()), toy()
    alone = saved_bytes(model, lambda: token_loss(model.train(), collated(short_rows(0))).backward())
    padded = {name: each[:2].contiguous() for name, each in collated(short_rows(0) + long_rows(0)).items()}
    assert saved_bytes(run.model, lambda: run.step(0)) == alone
    assert saved_bytes(model, lambda: token_loss(model.train(), padded).backward()) > 1.5 * alone


def test_the_probe_neither_trains_nor_uses_dropout():
    with_dropout, without = (Run(toy(attention_dropout=rate).train(), alpha=1.0) for rate in (0.5, 0.0))
    kept = saved_bytes(with_dropout.model, lambda: with_dropout.step(0))
    assert with_dropout.method.step.coefficient == without.step(0).method.step.coefficient
    assert kept == 0
    assert with_dropout.model.training


def test_both_losses_norms_and_alpha_are_logged():
    run = Run(toy())
    short, long = collated(short_rows(0)), collated(long_rows(0))
    model = toy()
    loss = token_loss(model.train(), short)
    loss.backward()
    reported = float(run.train(0, collated(short_rows(0) + long_rows(0))))
    entries = run.method.log_entries()
    size = sum(parameter.numel() for parameter in model.parameters())
    norm = math.sqrt(sum(float(each.grad.double().square().sum()) for each in model.parameters()))
    assert reported == entries["fo_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert entries["zo_loss"] == pytest.approx(token_loss(model.eval(), long).item(), rel=1e-3)
    assert run.method.grad_norm() == entries["fo_grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert entries["zo_grad_norm"] == pytest.approx(abs(run.method.step.coefficient) * math.sqrt(size))
    assert entries["alpha"] == pytest.approx(min(1e-3, 1 / math.sqrt(size)))


def test_alpha_shrinks_with_the_square_root_of_the_trained_parameters():
    assert AddaxConfig().weight(10**8) == pytest.approx(1e-4)
    assert AddaxConfig(kappa=0.5).weight(10**8) == pytest.approx(0.5e-4)
    assert AddaxConfig().weight(100) == 1e-3
    assert AddaxConfig(alpha=0.3).weight(10**8) == 0.3


def test_a_probe_that_is_not_finite_leaves_the_gradient_s_part(recwarn):
    run, sgd = Run(toy(), weight_decay=0.0), Run(toy(), alpha=0.0, weight_decay=0.0, lr=1e-2 * (1 - 1e-3))
    broken = lambda model, inputs, num_items: token_loss(model, inputs, num_items) * math.nan  # noqa: E731
    batch = collated(short_rows(0) + long_rows(0))
    run.step(0, batch, loss=broken)
    sgd.step(0, batch)
    moved = [float((run.weights()[n] - each).abs().max()) for n, each in sgd.weights().items()]
    assert max(moved) < 1e-8
    assert any("no zeroth-order part" in str(each.message) for each in recwarn)
    assert run.method.state_dict()["skipped_steps"] == 1
    fresh = Run(toy())
    fresh.method.load_state_dict(run.method.state_dict(), 1)
    for step in range(1, 9):
        fresh.step(step, batch, loss=broken)
    with pytest.raises(TrainingDivergedError, match="10 steps in a row"):
        fresh.step(9, batch, loss=broken)
    assert fresh.method.log_entries()["skipped_steps"] == 10


# -- the order of rows, in the trainer


def pool(lengths):
    return Dataset.from_list([row(length, seed) for seed, length in enumerate(lengths)])


LENGTHS = [4, 12, 5, 6, 15, 5, 13, 4, 6, 11, 5]  # seven of at most six tokens


def trained(
    folder, lengths=LENGTHS, *, watch=None, dtype=torch.float32, model=None, callbacks=(), resume=False, **changes
):
    options = {"max_first_order_length": 6, **changes.pop("memory_kwargs", {})}
    arguments = {
        "output_dir": str(folder),
        "memory": "addax",
        "memory_kwargs": options if changes.get("memory", "addax") == "addax" else {"addax": options},
        "per_device_train_batch_size": 5,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    model = model or toy(dtype)
    if watch is not None:
        model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer = BudgetedTrainer(
        model=model,
        args=BudgetedTrainingArguments(**{**arguments, **changes}),
        train_dataset=pool(lengths) if isinstance(lengths, list) else lengths,
        data_collator=collator(),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Seen:
    """Rows (as tuples of tokens) that each forward sees, by whether it is differentiated."""

    def __init__(self):
        self.short, self.long = [], []

    def __call__(self, _module, _args, kwargs):
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]
        (self.short if torch.is_grad_enabled() else self.long).append((kwargs["input_ids"].shape[1], rows))


def test_no_long_row_is_differentiated_and_every_short_one_once_an_epoch(tmp_path):
    seen = Seen()
    trainer = trained(tmp_path, watch=seen, num_train_epochs=2)
    whole = [tuple(each["input_ids"]) for each in pool(LENGTHS)]
    short = [each for each in whole if len(each) <= 6]
    assert trainer.state.global_step == 8  # four batches of two short rows and three long ones, the last with one
    assert [len(rows) for _, rows in seen.short] == [2, 2, 2, 1] * 2
    for epoch in (seen.short[:4], seen.short[4:]):
        assert sorted(each for _, rows in epoch for each in rows) == sorted(short)
    assert seen.short[:4] != seen.short[4:]
    assert max(width for width, _ in seen.short) <= 6
    assert all(min(map(len, rows)) > 6 and len(rows) == 3 for _, rows in seen.long)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all({"eff/fo_loss", "eff/zo_loss", "eff/alpha"} <= set(entry) for entry in logged)
    assert all(entry["loss"] == pytest.approx(entry["eff/fo_loss"], abs=1e-3) for entry in logged)


class _Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_both_streams_go_on_where_they_were(tmp_path):
    """In the second epoch; the long rows' stream runs through both."""
    whole, first, second = Seen(), Seen(), Seen()
    run = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1000}
    expected = trained(tmp_path / "whole", watch=whole, num_train_epochs=2)
    trained(tmp_path / "cut", watch=first, callbacks=[_Stop(5)], **run)
    resumed = trained(tmp_path / "cut", watch=second, resume=True, **run)
    assert first.short + second.short == whole.short
    assert [rows for _, rows in first.long + second.long if rows] == [rows for _, rows in whole.long]
    assert different({n: p.detach() for n, p in expected.model.named_parameters()}, resumed.model) == []
    assert resumed.ledger.spent()["flops"] == expected.ledger.spent()["flops"]


def test_a_checkpoint_dealt_out_by_another_length_is_refused():
    run = Run(toy())
    state = {**run.method.state_dict(), "first_order_length": 9}
    run.method._limit = 8
    with pytest.raises(CheckpointError, match="up to 9 tokens short, and this one those of up to 8"):
        run.method.load_state_dict(state, 1)
    run.method.load_state_dict({}, 1)


def test_counted_flops_are_those_that_run(tmp_path):
    """Charged for the padded length, the short rows would cost twice as much."""
    with FlopCounterMode(display=False) as counter:
        trainer = trained(tmp_path, max_steps=2)
    stated = trainer.ledger.spent()["flops"]
    assert stated == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_equal_rows_use_both_parts_without_assignment(tmp_path):
    seen = Seen()
    trainer = trained(
        tmp_path, [8] * 6, watch=seen, memory_kwargs={"max_first_order_length": None, "assign": False, "alpha": 0.1}
    )
    assert trainer.state.global_step == 3
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert [len(rows) for _, rows in seen.short] == [2, 2, 2]
    assert {len(rows) for _, rows in seen.long} == {3}
    assert sorted(each for _, rows in seen.short for each in rows) == sorted(
        tuple(each["input_ids"]) for each in pool([8] * 6)
    )


@pytest.mark.parametrize(("limit", "what"), [(8, "first-order"), (7, "zeroth-order")])
def test_rows_all_on_one_side_train_by_one_order_with_a_warning(tmp_path, limit, what):
    seen = Seen()
    with pytest.warns(EffWarning, match=f"all 5 rows of a batch are {what}"):
        trainer = trained(tmp_path, [8] * 6, watch=seen, memory_kwargs={"max_first_order_length": limit})
    assert trainer.state.global_step == 2
    assert bool(seen.short) == (what == "first-order")
    assert bool(seen.long) == (what == "zeroth-order")
    entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert entries
    assert all(entry["grad_norm"] > 0 for entry in entries)


def test_it_follows_a_selection(tmp_path):
    seen = Seen()
    trainer = trained(tmp_path, watch=seen, selection="random", selection_kwargs={"num_examples": 8})
    kept = [tuple(trainer.train_dataset[i]["input_ids"]) for i in range(len(trainer.train_dataset))]
    assert len(kept) == 8
    short = sorted(each for _, rows in seen.short for each in rows)
    assert short == sorted(each for each in kept if len(each) <= 6)


def test_recomputed_layers_change_nothing(tmp_path):
    plain = trained(tmp_path / "a", max_steps=2)
    thin = trained(tmp_path / "b", max_steps=2, memory="checkpointing+addax")
    assert different({n: p.detach() for n, p in plain.model.named_parameters()}, thin.model) == []


def test_adapters_alone_are_trained(tmp_path):
    trainer = trained(tmp_path, memory="lora+addax")
    moved = [name for name, each in trainer.model.named_parameters() if "lora_B" in name and each.abs().max() > 0]
    base = toy().state_dict()
    assert moved
    for name, each in trainer.model.named_parameters():
        if "lora" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(each.detach(), base[plain]), name


def test_bf16_is_rounded_by_seed_step_and_name_alone():
    def run(seed=0):
        torch.rand(seed + 3)
        return Run(toy(torch.bfloat16), seed=seed, alpha=0.1).steps(0, 1, 2)

    whole = run().weights()
    assert different(whole, run().model) == []
    assert different(whole, run(seed=1).model)
    half = Run(toy(torch.bfloat16), alpha=0.1).steps(0, 1)
    assert different(whole, half.model)
    assert different(whole, Run(half.model, alpha=0.1).steps(2).model) == []


def test_another_order_of_rows_is_refused(tmp_path):
    with pytest.raises(PlanError, match="orders the rows itself"):
        trained(tmp_path, train_sampling_strategy="sequential")


def test_short_rows_that_grew_in_the_collator_are_refused():
    run = Run(toy())
    run.method._limit = SHORT
    batch = {name: each for name, each in collated(short_rows(0) + long_rows(0)).items() if name != "attention_mask"}
    with pytest.raises(PlanError, match=f"{LONG} tokens in the batch and at most {SHORT}"):
        run.step(0, batch)


# -- options and plans


def facts_of(model=None, pool=None, **run):
    return Facts(
        model=model_facts(model or toy()),
        pool=PoolFacts(**{"num_rows": 100, "mean_tokens": 30.4, "max_tokens": 64, **(pool or {})}),
        hardware=HardwareFacts(),
        run=RunFacts(**{"batch_size": 5, "max_grad_norm": 0.0, **run}),
    )


def test_short_is_what_is_set_or_at_most_the_mean_length():
    share = AddaxConfig().share(facts_of())
    assert (share.short_rows, share.long_rows, share.short_length, share.long_length) == (2, 3, 30, 64)
    assert AddaxConfig(max_first_order_length=9, long_rows=1).share(facts_of()).short_rows == 4
    assert AddaxConfig(max_first_order_length=9).share(facts_of()).short_length == 9
    everything = AddaxConfig(max_first_order_length=64).share(facts_of())
    assert (everything.short_rows, everything.long_rows) == (5, 0)
    assert AddaxConfig(assign=False).share(facts_of()).short_length == 64


def test_a_byte_budget_gives_the_longest_length_whose_activations_fit():
    facts = facts_of(toy(attn_implementation="sdpa"))
    needed = [activation_bytes(of_size(facts, 2, length), facts.model.trainable) for length in range(65)]
    for length in (1, 17, 63):
        budget = f"{math.ceil(needed[length])}B"
        assert AddaxConfig(activation_budget=budget).share(facts).short_length == length
    model, batch = toy(attn_implementation="sdpa"), collated([row(40, 0), row(40, 1)])
    kept = saved_bytes(model, lambda: token_loss(model.train(), batch).backward())
    assert AddaxConfig(activation_budget=f"{kept}B").share(facts).short_length == pytest.approx(40, abs=2)
    with pytest.raises(PlanError, match="does not hold short_rows=2 rows of one token"):
        AddaxConfig(activation_budget="1B").share(facts)
    with pytest.raises(PlanError, match="64 tokens, the longest there are, so that no row needs zeroth order"):
        AddaxConfig(activation_budget="1GiB").share(facts)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ({"accumulation": 2}, "gradient accumulation"),
        ({"fp16": True}, "fp16"),
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free=False"),
        ({"batch_size": 1}, "no room for a short and a long row"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=0, or clip='two_backwards'"),
        ({"optim": "sgd"}, "leave optim at its default"),
    ],
)
def test_runs_that_would_not_be_what_they_say_are_refused(run, sentence):
    with pytest.raises(PlanError, match=sentence):
        make_plan(EffOptions(memory="addax"), facts_of(**run))


def test_streams_processes_and_other_splits_are_refused():
    with pytest.raises(PlanError, match="dataset of known length"):
        make_plan(EffOptions(memory="addax"), facts_of(pool={"num_rows": None, "streaming": True}))
    for backend in ("ddp", "fsdp2"):
        facts = facts_of().replace(hardware=HardwareFacts(backend=backend, world_size=2))
        with pytest.raises(PlanError, match=backend.upper()):
            make_plan(EffOptions(memory="addax"), facts)
    with pytest.raises(PlanError, match="'row_chunks' would split; lower short_rows"):
        make_plan(EffOptions(memory="row_chunks+addax"), facts_of())
    with pytest.raises(PlanError, match="'chunked_loss' still needs"):
        make_plan(EffOptions(memory="chunked_loss+addax"), facts_of())
    with pytest.raises(PlanError, match="max_grad_norm=0"):
        Run(toy(), max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"zo_clip": 0}, "zo_clip must be above 0"),
        ({"clip_value": 0}, "clip_value must be above 0"),
        ({"activation_budget": "3h"}, "no number of bytes"),
        ({"activation_budget": "1GiB", "max_first_order_length": 9}, "set one of them"),
        ({"assign": False, "max_first_order_length": 9}, "set one of them"),
        ({"alpha": 1.5}, "alpha"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        AddaxConfig(**options)


def test_rows_of_a_batch_have_to_add_up():
    for options in ({"short_rows": 5}, {"short_rows": 2, "long_rows": 2}, {"long_rows": 6}):
        with pytest.raises(PlanError, match="do not make up per_device_train_batch_size=5"):
            AddaxConfig(**options).share(facts_of())


# -- cost


@pytest.mark.parametrize("lengths", [(30, 60), (8, 90)])
def test_predicted_bytes_are_those_measured(lengths):
    """Of the short rows' backward, whatever the long rows' length; within the ledger's own accuracy."""
    short, long = lengths
    model = tiny_model(layers=2, width=64, attn_implementation="sdpa")
    facts = facts_of(model, pool={"max_tokens": long})
    predicted = cost(AddaxConfig(max_first_order_length=short), facts).bytes
    run, meter = Run(model), MemoryMeter(model)
    batch = collated([row(short, i) for i in range(2)] + [row(long, 9 + i) for i in range(3)])
    for step in range(2):
        with meter.forward_backward():
            run.step(step, batch)
        meter.observe(run.optimizer)
    measured = meter.peak_bytes()
    assert predicted["weights"] == pytest.approx(measured["weights"], rel=0.02)
    assert predicted["gradients"] == predicted["optimizer"] == measured["gradients"] == 0
    assert measured["optimizer"] <= 2**20  # room for random numbers, which the forecast has under "rest"
    assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)


def test_the_peak_is_the_larger_of_both_parts():
    def peak(**options):
        return sum(cost(AddaxConfig(**options), facts_of(pool={"max_tokens": 2000})).bytes.values())

    forward, backward = peak(alpha=1.0, max_first_order_length=4), peak(alpha=0.0, max_first_order_length=900)
    assert peak(max_first_order_length=900) == pytest.approx(max(backward, peak(alpha=1.0, max_first_order_length=900)))
    assert peak(max_first_order_length=4) == pytest.approx(forward)
    assert peak(alpha=0.0, max_first_order_length=4) < forward


def test_planned_flops_count_the_parts_that_run():
    def flops(**options):
        return cost(AddaxConfig(max_first_order_length=20, **options), facts_of(**options_of_run)).step_flops

    options_of_run = {}
    first, second, both = flops(alpha=0.0), flops(alpha=1.0), flops()
    assert both == pytest.approx(first + second)
    options_of_run = {"max_grad_norm": 1.0}
    assert flops(alpha=0.0, clip="two_backwards") == pytest.approx(5 / 3 * first, rel=0.05)
