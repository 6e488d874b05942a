"""What the mixin takes for granted about Trainer and SFTTrainer: names, signatures and the order of calls.

A new release of transformers or TRL that breaks one of these would otherwise break silently.
"""

import inspect

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTTrainer

from hf_eff.sft import BudgetedSFTTrainer
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tokenised
from hf_eff.trainer import BudgetedTrainerMixin

# Parameters that are passed on, after self.
OVERRIDDEN = {
    "train": ("resume_from_checkpoint",),
    "create_optimizer": (),
    "create_scheduler": ("num_training_steps", "optimizer"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "floating_point_ops": ("inputs",),
    "evaluate": (),
    "log": ("logs",),
    "create_model_card": (),
    "call_model_init": ("trial",),
    "_clip_grad_norm": ("model",),
    "_get_grad_norm": ("model", "grad_norm"),
    "save_model": ("output_dir", "_internal_call"),
    "_save_checkpoint": ("model", "trial"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_get_train_sampler": ("train_dataset",),
    "_save": (),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "init_hf_repo": (),
    "push_to_hub": (),
}
CALLED = {
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "compute_loss_context_manager": (),
    "get_decay_parameter_names": ("model",),
    "get_optimizer_cls_and_kwargs": ("args", "model"),
    "is_world_process_zero": (),
    "_prepare_inputs": ("inputs",),
    "_remove_unused_columns": ("dataset",),
    "_get_collator_with_removed_columns": ("data_collator",),
}
ATTRIBUTES = (
    "accelerator",
    "args",
    "callback_handler",
    "compute_loss_func",
    "control",
    "current_gradient_accumulation_steps",
    "data_collator",
    "eval_dataset",
    "lr_scheduler",
    "model",
    "model_accepts_loss_kwargs",
    "optimizer",
    "optimizer_cls_and_kwargs",
    "processing_class",
    "state",
    "train_dataset",
)


def parameters(kind, name):
    return [word for word in inspect.signature(getattr(kind, name)).parameters if word != "self"]


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_method_exists_with_its_parameters(kind, name):
    wanted = {**OVERRIDDEN, **CALLED}[name]
    found = parameters(kind, name)
    variadic = {"args", "kwargs"} & set(found)
    assert variadic or list(wanted) == [word for word in found if word in wanted]


def test_mixin_overrides_what_is_listed_and_nothing_else():
    own = {name for name, value in vars(BudgetedTrainerMixin).items() if inspect.isfunction(value)}
    assert {name for name in own if hasattr(Trainer, name) and not name.startswith("__")} == set(OVERRIDDEN)


def test_sft_overrides_only_the_preparation():
    own = {name for name, value in vars(BudgetedSFTTrainer).items() if inspect.isfunction(value)}
    assert {name for name in own if hasattr(SFTTrainer, name) and not name.startswith("__")} == {"_prepare_dataset"}
    assert parameters(SFTTrainer, "_prepare_dataset")[:4] == ["dataset", "processing_class", "args", "packing"]
    assert parameters(SFTTrainer, "_prepare_dataset")[-1] == "dataset_name"


def test_new_names_do_not_hide_names_of_the_parents():
    own = {name for name in vars(BudgetedTrainerMixin) if not name.startswith("__")} - set(OVERRIDDEN)
    for kind in (Trainer, SFTTrainer):
        assert not own & {name for base in kind.__mro__ for name in vars(base)}


class Recorder(Trainer):
    """Notes the order in which the loop calls what the mixin overrides."""

    calls: list

    def note(self, name):
        self.calls.append((name, self.state.global_step))


def _recording(name):
    def method(self, *args, **kwargs):
        self.note(name)
        return getattr(super(Recorder, self), name)(*args, **kwargs)

    return method


_UNRECORDED = ("log", "create_model_card", "evaluate", "_get_train_sampler", "_save", "init_hf_repo")
for _name in [*OVERRIDDEN, "get_train_dataloader"]:
    if _name not in _UNRECORDED:
        setattr(Recorder, _name, _recording(_name))


class Events(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, *args, **kwargs):
        self.trainer.note("on_train_begin")

    def on_step_begin(self, *args, **kwargs):
        self.trainer.note("on_step_begin")

    def on_step_end(self, *args, **kwargs):
        self.trainer.note("on_step_end")


@pytest.fixture
def trainer(tmp_path):
    def make(kind=Recorder, **options):
        arguments = {
            "output_dir": str(tmp_path),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        kind.calls = []
        made = kind(
            model=tiny_model(2, 32),
            args=TrainingArguments(**{**arguments, **options}),
            train_dataset=tokenised(tiny_pool(16)),
            data_collator=collator(),
        )
        made.add_callback(Events(made))
        return made

    return make


STEP = [
    "get_batch_samples",
    "on_step_begin",
    *("training_step", "floating_point_ops") * 2,
    "_clip_grad_norm",
    "_get_grad_norm",
    "on_step_end",
    "_save_checkpoint",
    "save_model",
    "_save_optimizer_and_scheduler",
]


def test_order_of_a_run(trainer):
    run = trainer()
    run.train()
    begin = ["train", "get_train_dataloader", "create_optimizer", "create_scheduler"]
    expected = [*begin, "on_train_begin", *STEP, *STEP]
    assert [name for name, _ in run.calls] == expected


def test_state_is_loaded_before_training_begins(trainer, tmp_path):
    trainer().train()
    run = trainer()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    names = [name for name, _ in run.calls]
    assert names.index("_load_from_checkpoint") < names.index("create_optimizer")  # replaying needs no optimizer
    assert (
        names.index("_load_optimizer_and_scheduler") < names.index("on_train_begin") < names.index("get_batch_samples")
    )
    assert dict(run.calls)["on_train_begin"] == 1


def test_attributes_exist_during_a_run(trainer):
    run = trainer()
    run.train()
    assert not [name for name in ATTRIBUTES if not hasattr(run, name)]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_an_epoch_are_drawn_after_it_has_begun(trainer, workers):
    """What changes at ``on_epoch_begin`` is what the epoch trains on, with ``args.max_steps`` counting the steps."""
    drawn = []

    class Noting(torch.utils.data.SequentialSampler):
        def __iter__(self):
            drawn.append("rows")
            return iter(range(8))

        def __len__(self):
            return 8

    class Sampled(Recorder):
        def _get_train_sampler(self, train_dataset=None):
            return Noting(train_dataset)

    class Beginning(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            drawn.append(state.global_step)

    run = trainer(Sampled, max_steps=5, save_strategy="no", dataloader_num_workers=workers)
    run.args.dataloader_persistent_workers = workers > 0
    run.add_callback(Beginning())
    run.train()
    assert drawn == [0, "rows", 2, "rows", 4, "rows"]
    assert run.state.global_step == 5


def test_no_batches_end_the_loop_cleanly(trainer):
    class Gated(Recorder):
        def get_batch_samples(self, *args, **kwargs):
            batches = super().get_batch_samples(*args, **kwargs)
            if self.state.global_step < 1:
                return batches
            self.control.should_training_stop = True
            return [], None

    run = trainer(Gated)
    output = run.train()
    assert output.global_step == 1


def test_the_trainer_state_is_written_last(trainer, tmp_path, monkeypatch):
    written = []
    stock = torch.save
    monkeypatch.setattr(
        torch, "save", lambda value, path, *a, **k: (written.append(str(path)), stock(value, path, *a, **k))
    )
    run = trainer(max_steps=1)
    state = run.state.__class__.save_to_json
    monkeypatch.setattr(
        run.state.__class__, "save_to_json", lambda self, path: (written.append(str(path)), state(self, path))
    )
    run.train()
    inside = [path.rsplit("/", 1)[1] for path in written if "checkpoint-1" in path]
    assert inside[-1] == "trainer_state.json"
    assert "optimizer.pt" in inside
