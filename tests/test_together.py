"""Methods of different kinds together: every method trains beside several of each other kind, or is refused by name."""

import itertools
import json

import pytest
from transformers import PrinterCallback

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments, Selection
from hf_eff.contracts.spec import KINDS
from hf_eff.errors import PlanError
from hf_eff.hardware.probe import device_name
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tiny_tokenizer, tokenised
from hf_eff.testing.trial import AMPLE

STEPS = 4
PARTNERS = 7
SPECS = {kind: [get_method(kind, name) for name in list_methods(kind)] for kind in KINDS}
MEMORY = [spec for spec in SPECS["memory"] if not spec.traits.needs_accelerator or device_name() != "cpu"]


def cover():
    """Triples in which every selection meets some memory methods, in rotation, and these meet every governor."""
    governors = SPECS["governor"]
    for i, selection in enumerate(SPECS["selection"]):
        for j in range(PARTNERS):
            place = PARTNERS * i + j
            triple = (selection, MEMORY[place % len(MEMORY)], governors[(place // len(MEMORY)) % len(governors)])
            yield pytest.param(*triple, id="-".join(spec.name for spec in triple))


def build(folder, **names):
    tokenizer = tiny_tokenizer()
    trainer = BudgetedTrainer(
        model=tiny_model(2, 32),
        args=BudgetedTrainingArguments(
            output_dir=str(folder),
            budget=AMPLE,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **names,
        ),
        train_dataset=tokenised(tiny_pool(16), tokenizer),
        eval_dataset=tokenised(tiny_target(), tokenizer),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_cover_holds_enough():
    triples = [case.values for case in cover()]
    for selection in SPECS["selection"]:
        assert len({memory.name for chosen, memory, _ in triples if chosen is selection}) == PARTNERS
    for memory, governor in itertools.product(MEMORY, SPECS["governor"]):
        assert any((memory, governor) == triple[1:] for triple in triples), (memory.name, governor.name)


# What is chosen of a toy pool may leave rows of one length, which addax says aloud.
@pytest.mark.filterwarnings("ignore:(no|every) row is longer than:hf_eff.errors.EffWarning")
@pytest.mark.parametrize(("selection", "memory", "governor"), cover())
def test_triple_trains(selection, memory, governor, tmp_path):
    named = {spec.kind: spec.name for spec in (selection, memory, governor)}
    options = {f"{spec.kind}_kwargs": dict(spec.tiny) for spec in (selection, memory, governor)}
    trainer = build(tmp_path, **named, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert any(not before[name].equal(p) for name, p in trainer.model.named_parameters())
    for file in ("plan.json", "report.json"):
        assert json.loads((tmp_path / file).read_text())
    if trainer.selection is not None:
        again = Selection.load(tmp_path / "selection")
        assert again.digest == trainer.selection.digest
        assert len(again.apply(tokenised(tiny_pool(16)))) == len(trainer.train_dataset)


PAIRS = [
    pytest.param(a, b, id=f"{a.name}+{b.name}")
    for specs in (SPECS["selection"], MEMORY)
    for a, b in itertools.combinations(specs, 2)
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pair_of_one_kind_trains_or_is_refused_by_both_names(first, second, tmp_path):
    composition = {
        first.kind: f"{first.name}+{second.name}",
        f"{first.kind}_kwargs": {spec.name: dict(spec.tiny) for spec in (first, second) if spec.tiny},
    }
    if first.slot == second.slot:
        with pytest.raises(PlanError, match=rf"(?s){first.name}.*{second.name}"):
            build(tmp_path, **composition)
        return
    refusal = None
    try:
        trainer = build(tmp_path, **composition)
    except PlanError as error:
        refusal = str(error)
    if refusal is not None:
        assert all(spec.name in refusal for spec in (first, second)), refusal
        return
    trainer.train()
    assert trainer.state.global_step == STEPS
