"""The options as fields of ``TrainingArguments``, so that flags, YAML and JSON all reach them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import TrainingArguments

from hf_eff import registry
from hf_eff.contracts.cost import RunFacts
from hf_eff.errors import OptionError
from hf_eff.numerics.optimizer_bytes import is_stateless
from hf_eff.options import EffOptions, ResolvedOptions, resolve_options

_DICT_FIELDS = ("selection_kwargs", "memory_kwargs", "governor_kwargs")


@dataclass
class BudgetedArguments:
    """Fields that hf_eff adds. A mixin: put it before any ``TrainingArguments`` class.

    With every field at its default a trainer behaves exactly as its parent class. The options are
    those of ``EffOptions``.
    """

    selection: str = field(
        default="all", metadata={"help": "Which examples to train on: a selection method, such as 'less'."}
    )
    selection_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of the selection method, as a mapping or JSON."}
    )
    memory: str = field(
        default="full", metadata={"help": "How the update fits: a memory method, or several joined by '+'."}
    )
    memory_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of the memory method(s), as a mapping or JSON."}
    )
    governor: str | None = field(default=None, metadata={"help": "When to stop: a governor, such as 'marginal_gain'."})
    governor_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of the governor, as a mapping or JSON."}
    )
    budget: str | None = field(
        default=None, metadata={"help": "Limits that are kept: '2h, 3e15flop, 20Mtok, 22GiB, 0.5kWh, 4usd'."}
    )
    governor_mode: str = field(
        default="act", metadata={"help": "What happens to decisions: 'act', 'advise' (print) or 'observe' (log)."}
    )
    out_of_memory: str | None = field(
        default=None,
        metadata={"help": "When memory runs out: 'adapt' (the plan's ladder), 'exact' (its exact rungs) or 'raise'."},
    )
    price_per_hour: float | None = field(
        default=None, metadata={"help": "Price of the machine in USD per hour; turns time into money."}
    )
    power_watts: float | None = field(
        default=None, metadata={"help": "Power of the machine under full load; estimates energy where none is counted."}
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let ``TrainingArguments`` parse the mapping fields from JSON strings too."""
        super().__init_subclass__(**kwargs)
        inherited = list(getattr(cls, "_VALID_DICT_FIELDS", []))
        wanted = inherited + [name for name in _DICT_FIELDS if name not in inherited]
        type.__setattr__(cls, "_VALID_DICT_FIELDS", wanted)

    def __post_init__(self) -> None:
        """Check names, options and the budget at once, before anything is loaded."""
        resolved = resolve_options(_without_trainer_defaults(options_of(self)))
        expect_unused_parameters(self, resolved)
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()


@dataclass
class BudgetedTrainingArguments(BudgetedArguments, TrainingArguments):
    """``TrainingArguments`` with the fields of ``BudgetedArguments``."""


def expect_unused_parameters(args: Any, resolved: ResolvedOptions) -> None:
    """Tell DDP before it exists that blocks rest in turn, or ranks would drift apart.

    Args:
        args: Training arguments; ``ddp_find_unused_parameters`` is set where the user left it open.
        resolved: The methods.

    Raises:
        OptionError: ``ddp_static_graph`` is set.
    """
    freezing = [chosen.spec.address for chosen in resolved.memory if chosen.spec.traits.freezes_parameters]
    if not freezing:
        return
    if getattr(args, "ddp_static_graph", None):
        raise OptionError(f"{freezing[0]} trains other parameters from step to step; leave ddp_static_graph unset.")
    if getattr(args, "ddp_find_unused_parameters", None) is None:
        args.ddp_find_unused_parameters = True


def options_of(args: Any) -> EffOptions:
    """Read the options from any arguments object; fields it lacks take their defaults."""
    defaults = EffOptions()

    def read(name: str) -> Any:
        value = getattr(args, name, None)
        return getattr(defaults, name) if value is None else value

    return EffOptions(
        selection=read("selection"),
        memory=read("memory"),
        governor=getattr(args, "governor", None),
        budget=getattr(args, "budget", None),
        governor_mode=read("governor_mode"),
        out_of_memory=getattr(args, "out_of_memory", None),
        price_per_hour=_number(getattr(args, "price_per_hour", None)),
        power_watts=_number(getattr(args, "power_watts", None)),
        **{name: _mapping(getattr(args, name, None)) for name in _DICT_FIELDS},
    )


def _without_trainer_defaults(options: EffOptions) -> EffOptions:
    """Without an update method the trainer adds its own, so that only the trainer can judge ``memory_kwargs``."""
    if any(spec.slot == "update" for spec in registry.resolve("memory", options.memory)):
        return options
    return replace(options, memory_kwargs={})


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _mapping(value: Any) -> Any:
    """Mappings are copied; a JSON string stays a string and is read, with its errors, by the options."""
    if isinstance(value, Mapping):
        return dict(value)
    return {} if value is None else value


def run_facts(args: TrainingArguments, trainer: str = "trainer", *, custom_optimizer: bool = False) -> RunFacts:
    """The part of the training arguments that a plan depends on.

    Args:
        args: Arguments of any trainer; TRL fields are read where present.
        trainer: ``"trainer"`` or ``"sft"``.
        custom_optimizer: Whether an optimizer object was passed to the trainer.
    """
    options = options_of(args)
    checkpointing = getattr(args, "activation_checkpointing", None)
    if checkpointing is None:
        checkpointing = getattr(args, "gradient_checkpointing", False)
    half = bool(args.bf16 or args.fp16)
    optim = str(getattr(args.optim, "value", args.optim))
    return RunFacts(
        trainer=trainer,
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        max_steps=args.max_steps,
        epochs=float(args.num_train_epochs),
        length=0,
        compute_bytes=2.0 if half else 4.0,
        checkpointing=bool(checkpointing),
        packing=bool(getattr(args, "packing", False)),
        padding_free=bool(getattr(args, "padding_free", False)),
        by_length=_sorts_by_length(args),
        fp16=bool(args.fp16),
        bf16=bool(args.bf16),
        max_grad_norm=float(args.max_grad_norm),
        optim=optim,
        optim_args=args.optim_args or "",
        optim_target_modules=_targets(args.optim_target_modules),
        optimizer_bytes=0.0 if is_stateless(optim, args.optim_args or "") else None,
        auto_find_batch_size=bool(args.auto_find_batch_size),
        custom_optimizer=custom_optimizer,
        load_best_model=bool(args.load_best_model_at_end),
        lr_scheduler=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        learning_rate=float(args.learning_rate),
        remove_unused_columns=bool(args.remove_unused_columns),
        price_per_hour=options.price_per_hour,
        ddp_find_unused_parameters=args.ddp_find_unused_parameters,
    )


def _sorts_by_length(args: TrainingArguments) -> bool:
    strategy = getattr(args, "train_sampling_strategy", "random")
    return strategy == "group_by_length" or bool(getattr(args, "group_by_length", False))


def _targets(modules: Any) -> str | tuple[str, ...]:
    return modules if isinstance(modules, str) else tuple(modules or ())
