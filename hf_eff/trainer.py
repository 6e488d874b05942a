"""Trainers: the stock loop, reached only through a few overrides, each a line or two to the run.

Put ``BudgetedTrainerMixin`` first among the bases of any ``Trainer`` subclass::

    class BudgetedDPOTrainer(BudgetedTrainerMixin, DPOTrainer): ...
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, Trainer, TrainerCallback

from hf_eff.arguments import expect_unused_parameters, options_of, run_facts
from hf_eff.contracts.cost import Facts, ModelFacts
from hf_eff.contracts.memory import OptimizerContext, SamplerContext, StepContext
from hf_eff.engines.checkpoints import is_complete, resolve_checkpoint
from hf_eff.engines.facts import batch_shape, model_facts, model_facts_from_config, pool_facts
from hf_eff.engines.log_checkpoint import is_log_checkpoint, load_log_checkpoint
from hf_eff.engines.logged_metrics import metrics_kept, metrics_snapshot
from hf_eff.engines.objectives import Objective, as_objective, objective_value, with_objective
from hf_eff.engines.packed_weights import never_packed
from hf_eff.engines.plain_state import follow_schedule, keep_plain
from hf_eff.engines.schedule_progress import follow_budget, hold, scale_rate
from hf_eff.engines.sharded_resume import keeps_no_state, load_schedule, trainable
from hf_eff.engines.spool import spooled
from hf_eff.engines.update_hooks import UpdateHooks, without_new_hooks
from hf_eff.errors import PlanError
from hf_eff.files import require_writable
from hf_eff.hardware.ledger import Ledger, Purpose
from hf_eff.hardware.probe import hardware_facts
from hf_eff.manifest import Selection
from hf_eff.memory import MemoryStack
from hf_eff.options import ResolvedOptions, resolve_options, with_default_memory
from hf_eff.plan import Plan, make_plan
from hf_eff.publish.evaluation import data_origins
from hf_eff.publish.from_trainer import find_repository, push_checkpoint, push_run, without_token
from hf_eff.run import BudgetedRun
from hf_eff.run_ends import extend_card, finish_run, start_run
from hf_eff.selection_stage import SelectionStage

# For type checkers the mixin is a Trainer; at run time it has no base, so that it goes over any subclass.
if TYPE_CHECKING:
    _Parent = Trainer
else:
    _Parent = object


class BudgetedTrainerMixin(_Parent):
    """Adds selection, memory methods and a governor to any ``Trainer`` subclass.

    With every hf_eff field at its default the parent class runs untouched.

    Args:
        positional: Passed on to the parent.
        named: Passed on to the parent, but for two. ``objective``: what a zeroth-order method makes smaller instead of
            the loss, a function of (model, inputs) or an ``hf_eff.Objective``. ``governor_objective``: what a governor
            watches on the held-out rows instead of their loss: a function of (model, batch), an ``Objective``, or the
            name of a metric.

    Attributes:
        plan: The ``Plan`` of the run; None while nothing of hf_eff is asked for.
        report: Predicted beside measured, a mapping, or None before ``train()`` ends.
        data_origins: Where training and evaluation rows come from, as far as the Hub knows them.
    """

    default_memory: ClassVar[str] = "full"
    trainer_kind: ClassVar[str] = "trainer"

    plan: Plan | None = None
    report: dict[str, Any] | None = None
    _resolved: ResolvedOptions | None = None
    _given_model: ModelFacts | None = None
    budgeted_run: BudgetedRun | None = None
    _objective: Objective | None = None
    _governor_objective: Any = None
    data_origins: Mapping[str, Any] = MappingProxyType({})
    _micro_step: int = 0
    _update_hooks: UpdateHooks | None = None

    def __init__(self, *positional: Any, **named: Any) -> None:
        self._objective = as_objective(named.pop("objective", None))
        self._governor_objective = named.pop("governor_objective", None)
        given = _by_name(type(self), positional, named)
        options = with_default_memory(options_of(given.get("args")), self.default_memory)
        if self._objective is not None or not options.is_neutral:
            self._resolved = resolve_options(options)
            expect_unused_parameters(given.get("args"), self._resolved)
            self.memory_stack = MemoryStack(self._resolved.memory)
            self.selection_stage = SelectionStage(self._resolved)
            self._prepare_given(given)
        self._expect_watched_objective()
        super().__init__(**given)
        if self._resolved is not None:
            self.add_callback(_RunCallback(self))
            self.plan = self._make_plan(self.model, self.train_dataset, self.eval_dataset, self.args)

    def _expect_watched_objective(self) -> None:
        """Refuse a quantity to watch that nothing would watch."""
        watched = self._resolved is not None and self._resolved.governor.spec.traits.needs_reference_set
        if self._governor_objective is not None and not watched:
            raise PlanError(
                "governor_objective is given and the governor reads no held-out rows; set governor=..., such as "
                "'marginal_gain', or leave governor_objective out."
            )

    def _prepare_given(self, given: dict[str, Any]) -> None:
        """Refuse what cannot work and change the model, before the parent is built."""
        args, model = given.get("args"), given.get("model")
        self.data_origins = data_origins(given.get("train_dataset"), given.get("eval_dataset"))
        if self._resolved is not None and self._resolved.selects:
            given["train_dataset"] = spooled(given.get("train_dataset"), limit=self._resolved.pool.stream_rows)
        if args is not None and args.output_dir is not None:
            require_writable(args.output_dir)
        if isinstance(model, nn.Module):
            if args is not None:
                self._make_plan(model, given.get("train_dataset"), given.get("eval_dataset"), args)
            given["model"] = self._change_model(model, getattr(args, "seed", 42))

    def _change_model(self, model: nn.Module, seed: int) -> nn.Module:
        """Apply the memory methods; a plan goes on to speak of the model as the user gave it."""
        if self.memory_stack.changes_model:
            self._given_model = model_facts(model)
        return self.memory_stack.prepare_model(model, seed)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from ``model_init``, with the memory methods' changes."""
        model = super().call_model_init(trial)
        return model if self._resolved is None else self._change_model(model, self.args.seed)

    def _make_plan(self, model: Any, pool: Any, target: Any, args: Any) -> Plan:
        assert self._resolved is not None  # noqa: S101 - callers hold it
        custom = getattr(self, "optimizer", None) is not None
        facts = Facts(
            model=self._given_model or model_facts(model),
            pool=pool_facts(pool, target),
            hardware=hardware_facts(world_size=args.world_size, backend=_backend(args)),
            run=run_facts(args, self.trainer_kind, custom_optimizer=custom),
            proxy=_proxy_facts(self._resolved.pool.proxy_model),
        )
        return make_plan(self._resolved.options, with_objective(facts, self._objective))

    # What a run leaves behind

    @property
    def ledger(self) -> Ledger | None:
        """What was spent, by purpose and currency; None before ``train()``."""
        return self.budgeted_run.ledger if self.budgeted_run is not None else None

    @property
    def selection(self) -> Selection | None:
        """The rows that were trained on, or None when every row is."""
        return self.selection_stage.selection if self._resolved is not None else None

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or "trainer_output")

    # The run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Select, train under the budget, report.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last complete one.
            args: Passed on to the parent.
            kwargs: Passed on to the parent.
        """
        if self.plan is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self._folder)
        self.budgeted_run = start_run(self, self.plan, checkpoint)
        self.budgeted_run.rescue.attach(self._current_optimizer, partial(metrics_snapshot, self))
        try:
            # Evaluation between steps would cut 4-bit layers off from gradients.
            packed = never_packed(self.accelerator.unwrap_model(self.model))
            with packed, self.selection_stage.counted_steps(self):
                output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        finally:
            self.budgeted_run.end()
        self.report = finish_run(self, self.budgeted_run)
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Let the memory methods make the optimizer, else the one that ``optim`` names."""
        if self.budgeted_run is None:
            optimizer = super().create_optimizer(*args, **kwargs)
            keep_plain(optimizer)
            return optimizer
        model = next(iter([*args, *kwargs.values()]), None) or self.model
        stock = _Once(lambda: super(BudgetedTrainerMixin, self).create_optimizer(*args, **kwargs))
        with self._hooks_of_a_new_optimizer(model):
            if self.optimizer is None:
                self.optimizer = self.memory_stack.create_optimizer(self._optimizer_context(model, stock))
            optimizer = super().create_optimizer(*args, **kwargs)
        keep_plain(optimizer, always=True)
        follow_schedule(optimizer)
        return optimizer

    def _hooks_of_a_new_optimizer(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Take off the hooks of the run before, if the optimizer starts anew, and note those of this one."""
        if self._update_hooks is None or self.optimizer is None:
            if self._update_hooks is not None:
                self._update_hooks.remove()
            self._update_hooks = UpdateHooks()
        return self._update_hooks.watch(model)

    def _optimizer_context(self, model: Any, stock: Callable[[], torch.optim.Optimizer]) -> OptimizerContext:
        with without_new_hooks(model):  # asking for a layerwise class makes optimizers that would update, too
            chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
        return OptimizerContext(
            model=model,
            candidates=frozenset(name for name, tensor in model.named_parameters() if tensor.requires_grad),
            decay_names=frozenset(self.get_decay_parameter_names(model)),
            optimizer_class=chosen[0],
            optimizer_kwargs=dict(chosen[1]),
            weight_decay=self.args.weight_decay,
            stock=stock,
            seed=self.args.seed,
            total_steps=(self.plan.stop_step if self.plan is not None else None) or 0,
            max_grad_norm=self.args.max_grad_norm or 0.0,
        )

    def _current_optimizer(self) -> OptimizerContext:
        """The context of a method that takes over in the middle of a run: its stock optimizer is the one in use."""
        optimizer: Any = self.optimizer
        return self._optimizer_context(self.model, lambda: getattr(optimizer, "optimizer", optimizer))

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The parent's schedule, sped up so that it ends when an additive budget ends."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.budgeted_run is not None:
            hold(scheduler, self.memory_stack.schedule_every())
        if self.budgeted_run is not None and self.budgeted_run.limits_progress:
            follow_budget(scheduler, num_training_steps, self.budgeted_run.progress)
        if self.budgeted_run is not None and self.budgeted_run.cooldown is not None:
            scale_rate(scheduler, self.budgeted_run.rate_factor)
        return scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of rows that may change, that of the memory methods, or the parent's."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        plan = self.plan if self.budgeted_run is not None else None
        order = self.memory_stack.sampler(self._sampler_context(plan, rows)) if plan is not None else None
        windows = plan is not None and self.selection_stage.phases is not None
        if plan is None or (order is None and not windows):
            return super()._get_train_sampler(train_dataset)
        owner = (
            f"governor={plan.resolved.governor.spec.name!r}" if windows else f"memory={plan.resolved.options.memory!r}"
        )
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy != "random" or getattr(self.args, "group_by_length", False):
            raise PlanError(
                f"{owner} orders the rows itself, so that another order would be "
                "ignored; leave train_sampling_strategy at 'random' and group_by_length off."
            )
        if windows and order is not None:
            raise PlanError(
                f"{owner} changes the rows and memory={plan.resolved.options.memory!r} orders them itself; leave the "
                "data actions out, or use another memory method."
            )
        return self.selection_stage.sampler(lambda: self.state.global_step) if windows else order

    def _sampler_context(self, plan: Plan, rows: Any) -> SamplerContext:
        args = self.args
        return SamplerContext(
            dataset=rows,
            batch_size=self._train_batch_size,
            processes=args.world_size,
            drop_last=args.dataloader_drop_last,
            seed=args.seed if args.data_seed is None else args.data_seed,
            facts=plan.training_facts,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of the next optimizer step, or none when a limit would be passed."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.budgeted_run is None or not batches or self.budgeted_run.admit(batches, self.state.global_step):
            return batches, num_items
        self._stop(self.budgeted_run)
        return [], None

    def _stop(self, run: BudgetedRun) -> None:
        """End the loop; where checkpoints are kept, keep this state too, as transformers does at the end."""
        run.settle(self.accelerator.unwrap_model(self.model))
        self.control.should_training_stop = True
        step, folder = self.state.global_step, self._folder
        # The first rank's view: saving is collective, and other nodes may see another disk.
        saved = run.ranks.broadcast(is_complete(folder / f"checkpoint-{step}"))
        if self.args.save_strategy == "steps" and step > 0 and not saved:
            self.control.should_save = True

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, through the memory methods."""
        if self.budgeted_run is None:
            return super().training_step(model, inputs, num_items_in_batch)
        context = StepContext(
            model=model,
            unwrapped=self.accelerator.unwrap_model(model),
            inputs=inputs,
            num_items=num_items_in_batch,
            micro_step=self._micro_step,
            micro_steps=self.current_gradient_accumulation_steps,
            global_step=self.state.global_step,
            stock=self._stock_step,
            loss=self._loss_alone,
            mean_over_ranks=self.budgeted_run.ranks.mean,
            holds_weights=self._objective is not None and self._objective.holds_weights,
        )
        with self.budgeted_run.measured(context.unwrapped):
            loss = self.budgeted_run.rescue.training_step(context)
        self._micro_step += 1
        self.budgeted_run.note_loss(loss)
        return loss

    def _stock_step(self, model: nn.Module, inputs: Any, num_items: Any, **_changes: Any) -> torch.Tensor:
        """The parent's training step."""
        return super().training_step(model, inputs, num_items)

    def _loss_alone(self, model: nn.Module, inputs: Any, num_items: Any) -> torch.Tensor:
        """The parent's loss or the objective, scaled for accumulation, with no trace left in the parent's metrics."""
        batch = dict(self._prepare_inputs(inputs))
        if self._objective is not None:
            with self.compute_loss_context_manager():
                return objective_value(self._objective, model, batch) / self.current_gradient_accumulation_steps
        with metrics_kept(self), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, batch, num_items_in_batch=num_items)
        loss = loss.mean() if self.args.n_gpu > 1 else loss
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items is not None)
        return loss if scaled else loss / self.current_gradient_accumulation_steps

    def floating_point_ops(self, inputs: Any) -> int:
        """True FLOPs of a micro-batch, so that every tracker shows them."""
        if self.budgeted_run is None:
            return super().floating_point_ops(inputs)
        shape = batch_shape(inputs, self.budgeted_run.model)
        return int(self.budgeted_run.step_flops([shape], self.state.global_step))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.budgeted_run is not None and self.memory_stack.grad_norm() is not None:
            return None
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        own = self.memory_stack.grad_norm() if self.budgeted_run is not None else None
        return super()._get_grad_norm(model, grad_norm=grad_norm) if own is None else own

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's evaluation, timed under its own purpose."""
        with self._clock("eval"):
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's saving; checkpoints of a run with ``save="log"`` hold the replay log instead of weights."""
        run = self.budgeted_run
        if run is None or not (run.saves_log and _internal_call and output_dir is not None):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            run.write_log(Path(output_dir), self.accelerator.unwrap_model(self.model))

    def save_log(self, folder: str | Path) -> None:
        """Write ``replay.jsonl`` of a zeroth-order run, from which its weights can be rebuilt.

        Args:
            folder: Where to write it.

        Raises:
            PlanError: No method of the run keeps a log.
        """
        if self.budgeted_run is None or self.budgeted_run.replay_log is None:
            raise PlanError("there is no replay log: train with a zeroth-order method first, such as memory='mezo'.")
        self.budgeted_run.write_log(Path(folder), self.accelerator.unwrap_model(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if self.budgeted_run is None or not is_log_checkpoint(checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        unwrapped = self.accelerator.unwrap_model(self.model if model is None else model)
        load_log_checkpoint(checkpoint, unwrapped, self._folder)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._clock("save"):
            super()._save_checkpoint(*args, **kwargs)

    def _clock(self, purpose: Purpose) -> contextlib.AbstractContextManager[Any]:
        return self.budgeted_run.ledger.clock(purpose) if self.budgeted_run is not None else contextlib.nullcontext()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer: Any = self.optimizer
        sharded = self.budgeted_run is not None and self.is_fsdp_enabled
        with trainable(optimizer) if sharded else contextlib.nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)
        if self.budgeted_run is not None and self.args.should_save:
            self.budgeted_run.save(output_dir, self.state.global_step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.budgeted_run is not None and checkpoint is not None:
            self.budgeted_run.load_methods()
            optimizer: Any = self.optimizer
            if self.is_fsdp_enabled and keeps_no_state(optimizer.optimizer):
                load_schedule(self.lr_scheduler, optimizer, checkpoint)
                return
        super()._load_optimizer_and_scheduler(checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The parent's log; training entries also show the budget and the methods' own numbers."""
        if self.budgeted_run is not None and "loss" in logs:
            logs.update(self.budgeted_run.log_entries())
        super().log(logs, *args, **kwargs)

    # The Hub

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Name the repository. Where the Hub cannot be written now, the run starts all the same."""
        super().init_hf_repo(*args, **kwargs) if self._resolved is None else find_repository(self, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Send model or adapter, card, plan, report, manifest and recipe (``publish.from_trainer.push_run``)."""
        return super().push_to_hub(*args, **kwargs) if self._resolved is None else push_run(self, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._resolved is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            push_checkpoint(self, checkpoint_folder)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with without_token(self.args) if self._resolved is not None else contextlib.nullcontext():
            super()._save(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card with the run's plan and measurements added."""
        super().create_model_card(*args, **kwargs)
        if self.report is not None and self.is_world_process_zero():
            extend_card(self.report, self._folder)


class _Once:
    """Builds the stock optimizer at most once."""

    def __init__(self, build: Callable[[], torch.optim.Optimizer]) -> None:
        self._build = build
        self._made: torch.optim.Optimizer | None = None

    def __call__(self) -> torch.optim.Optimizer:
        if self._made is None:
            self._made = self._build()
        return self._made


class _RunCallback(TrainerCallback):
    """Tells the run where the loop is. Its state lives in the side-car, not in transformers' own."""

    def __init__(self, trainer: BudgetedTrainerMixin) -> None:
        self._trainer: Any = weakref.proxy(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.memory_stack.train_begin(trainer.model, state.global_step)
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainer.budgeted_run.note_origin(model, state.global_step)
        trainer.budgeted_run.training_begins(model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.budgeted_run.window_begins(state.global_step, trainer.accelerator.unwrap_model(trainer.model))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._micro_step = 0  # noqa: SLF001
        trainer.memory_stack.step_begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainer.budgeted_run.rescue.before_update(kwargs["optimizer"], model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        model = trainer.accelerator.unwrap_model(trainer.model)
        decision = trainer.budgeted_run.finish_step(state.global_step, model, kwargs["optimizer"], rate)
        if decision.action == "stop":
            trainer._stop(trainer.budgeted_run)  # noqa: SLF001
        elif state.global_step >= state.max_steps:
            trainer.budgeted_run.settle(model)


def _by_name(kind: type, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as the first real constructor below the mixin would bind them."""
    for base in kind.__mro__[kind.__mro__.index(BudgetedTrainerMixin) + 1 :]:
        constructor = base.__dict__.get("__init__")
        if constructor is None:
            continue
        signature = inspect.signature(constructor)
        args = signature.parameters.get("args")
        if args is not None and args.kind is not inspect.Parameter.VAR_POSITIONAL:
            bound = dict(list(signature.bind_partial(None, *positional, **named).arguments.items())[1:])
            kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
            return {**bound, **bound.pop(kinds.get(inspect.Parameter.VAR_KEYWORD, ""), {})}
    raise TypeError(f"{kind.__name__} has no base whose constructor takes args=...; use a Trainer subclass.")


def _proxy_facts(name: str | None) -> ModelFacts | None:
    """Shapes of the proxy, read from its configuration alone."""
    return None if name is None else model_facts_from_config(AutoConfig.from_pretrained(name))


def _backend(args: Any) -> str:
    """How processes share the work, read from the arguments before anything is wrapped."""
    if getattr(args, "deepspeed", None):
        return "deepspeed"
    if getattr(args, "fsdp", None):
        version = (getattr(args, "fsdp_config", None) or {}).get("version", 2)
        return "fsdp2" if int(version) == 2 else "fsdp1"
    return "ddp" if args.world_size > 1 else "none"


class BudgetedTrainer(BudgetedTrainerMixin, Trainer):
    """``Trainer`` with selection, memory methods and a governor, picked by name."""


class BlockwiseTrainer(BudgetedTrainer):
    """``BudgetedTrainer`` that updates one block of layers at a time (``memory="badam"``)."""

    default_memory = "badam"


class ZOTrainer(BudgetedTrainer):
    """``BudgetedTrainer`` that trains without a backward pass (``memory="mezo"``)."""

    default_memory = "mezo"
