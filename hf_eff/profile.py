"""How much memory each method would need, term by term, what fits, and what to change first; measured on request."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff import registry
from hf_eff.contracts.budget import Budget
from hf_eff.contracts.cost import Facts, HardwareFacts, ModelFacts, PoolFacts, RunFacts
from hf_eff.contracts.spec import MethodConfig, knob
from hf_eff.errors import OptionError, PlanError
from hf_eff.memory_advice import first_change
from hf_eff.memory_forecast import Setup
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.largest_fit import MOST
from hf_eff.numerics.optimizer_bytes import is_stateless
from hf_eff.numerics.planned_step import planned_step_flops
from hf_eff.profile_table import profile_lines

if TYPE_CHECKING:
    from hf_eff.measured_step import StepRequest

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("none", "ddp", "fsdp2")


@dataclass(frozen=True, kw_only=True)
class ProfileSetting(MethodConfig):
    """How the runs that are compared are set up, alike for all methods."""

    dtype: str | None = knob(
        None, "Type of the weights; None for what the model or its configuration has.", choices=DTYPES
    )
    bf16: bool = knob(False, "Whether the trainer runs with bf16=True (autocast).")
    activation_checkpointing: bool = knob(False, "Whether every layer is checkpointed.")
    optim: str = knob("adamw_torch", "Optimizer, by the name that transformers gives it.")
    optim_args: str | None = knob(None, "Options of the optimizer, such as 'rank=64,scale=2'.")
    optim_target_modules: tuple[str, ...] = knob((), "Modules that a low-rank optimizer projects.")
    max_grad_norm: float = knob(1.0, "Largest norm of the gradients, 0 for any.", low=0)
    device: str | None = knob(None, "Kind of device, 'cpu' or 'cuda'; None for this machine's.")
    world_size: int = knob(1, "Processes that share the work.", low=1)
    backend: str | None = knob(None, "How they share it; None for 'ddp' where there are several.", choices=BACKENDS)


@dataclass(frozen=True)
class MemoryTable:
    """Predicted peak bytes of several memory methods.

    Attributes:
        architecture: Class of the model.
        params: Its parameters.
        batch_size: Rows of a micro-batch on one device.
        max_length: Tokens of a row.
        rows: One mapping a method: ``memory`` (its name), bytes by term, ``total`` and ``host_bytes``; ``binding``, the
            largest term; ``time_factor``, the FLOPs of a step over those of full fine-tuning without checkpointing,
            recomputation included; ``change``, what to change first, or None. With a budget also ``fits``,
            ``largest_batch`` at this length and ``longest`` at this batch size (0 where nothing fits), and
            ``longest_is_model``, whether the model's positions end there. Where it was measured, ``measured`` holds
            ``bytes``, ``total``, ``predicted`` for the very layers that trained, and ``error``; or ``failed``. A method
            that cannot run on this model has ``memory`` and ``refused`` alone.
        budget_bytes: What the device may hold, or None.
        setting: The options of ``ProfileSetting``.
    """

    architecture: str
    params: int
    batch_size: int
    max_length: int
    rows: tuple[dict[str, Any], ...]
    budget_bytes: float | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy of the attributes."""
        return {
            "architecture": self.architecture,
            "params": self.params,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "budget_bytes": self.budget_bytes,
            "setting": dict(self.setting),
            "rows": [*map(dict, self.rows)],
        }

    def __str__(self) -> str:
        """The table as aligned text, one line a method; then what to change, and what was measured."""
        return "\n".join(profile_lines(self.to_dict()))

    def save_figure(self, path: str | Path) -> Path:
        """Draw the rows as stacked bars.

        Args:
            path: A file whose ending, ``.png``, ``.svg`` or ``.pdf``, says the format.

        Raises:
            OptionError: The ending is another one, or no row can be drawn.
            MissingDependencyError: matplotlib is not installed.
        """
        from hf_eff.report.memory_figure import draw_memory

        return draw_memory(self.to_dict(), Path(path))


def profile_memory(
    model_or_config: Any,
    memory: Sequence[str] = ("full", "lora", "badam", "mezo"),
    batch_size: int = 2,
    max_length: int = 512,
    *,
    budget: str | float | None = None,
    measure: bool = False,
    memory_kwargs: Mapping[str, Any] | None = None,
    **setting: Any,
) -> MemoryTable:
    """Predict the peak memory of training a model with each of several methods.

    Args:
        model_or_config: A model, or a transformers configuration, of which only the shapes are read.
        memory: Names of memory methods; ``+`` composes.
        batch_size: Rows of a micro-batch on one device.
        max_length: Tokens of a row, after padding and truncation.
        budget: What the device may hold: ``"24GiB"``, or bytes. Also finds what fits in it.
        measure: Whether two optimizer steps of each method run for real, on random weights and tokens, in a process of
            their own.
        memory_kwargs: Options of the methods, flat or by method name; each method takes its own.
        setting: Fields of ``ProfileSetting``: ``dtype``, ``bf16``, ``activation_checkpointing``, ``optim``, ``device``,
            ``world_size``, ``backend`` and others.

    Raises:
        UnknownMethodError: A name is not registered.
        OptionError: A size is below one, an option does not exist, the configuration describes no model, or the model
            or setting cannot be measured.
    """
    names = [memory] if isinstance(memory, str) else list(memory)
    if min(batch_size, max_length) < 1:
        raise OptionError(f"batch_size={batch_size} and max_length={max_length} must both be at least 1.")
    options = ProfileSetting.from_dict(setting)
    _check_optimizer(options.optim)
    limit, kwargs = _budget_bytes(budget), _kwargs_by_row(names, dict(memory_kwargs or {}))
    model, config = _shapes(model_or_config, options.dtype)
    facts = _facts(model, options, batch_size, max_length)
    profiler = _Profiler(planned_step_flops(facts, everything_trains(model)), limit, _positions(config))
    setups = [Setup(name, kwargs[name], facts) for name in names]
    rows = [profiler.row(setup) for setup in setups]
    if measure:
        request = _request(model_or_config, config, model, options)
        for setup, row in zip(setups, rows, strict=True):
            if "refused" not in row:
                row["measured"] = _measured(request, setup, row["total"])
    shown = options.to_dict()
    return MemoryTable(model.architecture, model.params, batch_size, max_length, tuple(rows), limit, shown)


# -- what is asked --------------------------------------------------------------------------------------------------


def _budget_bytes(budget: str | float | None) -> float | None:
    """The limit on memory.

    Raises:
        OptionError: The budget limits something else, or is not above zero.
    """
    if budget is None or isinstance(budget, (int, float)):
        if budget is not None and not 0 < budget < float("inf"):
            raise OptionError(
                f"budget={budget!r} must be above zero and finite, in bytes; write '24GiB' for gibibytes."
            )
        return None if budget is None else float(budget)
    limits = Budget.parse(budget).limits
    if set(limits) != {"bytes"}:
        raise OptionError(f"budget={budget!r} must be an amount of memory here, such as '24GiB'.")
    return limits["bytes"]


def _kwargs_by_row(names: Sequence[str], given: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Options of each composition, under the names of its parts.

    Raises:
        OptionError: An option belongs to none of the methods.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for key, value in given.items():
        places = [(name, owner) for name in names for owner in _owners(name, key, value)]
        if not places:
            raise OptionError(f"memory_kwargs: {key!r} is no option of {', '.join(dict.fromkeys(names))}.")
        for name, owner in places:
            found[name].setdefault(owner, {}).update(value if key == owner else {key: value})
    return found


def _owners(name: str, key: str, value: Any) -> list[str]:
    """Parts of a composition that take an option, or the part whose options these are."""
    specs = registry.resolve("memory", name)
    if isinstance(value, Mapping) and any(spec.name == key for spec in specs):
        return [key]
    return [spec.name for spec in specs if key in spec.config.__dataclass_fields__]


def _check_optimizer(name: str) -> None:
    """Refuse an optimizer that transformers does not know.

    Raises:
        OptionError: It does not.
    """
    from transformers.training_args import OptimizerNames

    known = [each.value for each in OptimizerNames]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"optim={name!r} is not known to transformers.{hint} Names: {known}.")


def _shapes(model_or_config: Any, dtype: str | None) -> tuple[ModelFacts, Any]:
    """Shapes of the model and its configuration (None for a module without one).

    Raises:
        OptionError: ``dtype`` contradicts the model, or the configuration describes none.
    """
    import torch
    from torch import nn

    from hf_eff.engines.facts import model_facts, model_facts_from_config

    if not isinstance(model_or_config, nn.Module):
        wanted = None if dtype is None else getattr(torch, dtype)
        # transformers writes the type it builds with into the configuration: into a copy.
        return model_facts_from_config(model_or_config, dtype=wanted), model_or_config
    if dtype is not None:
        raise OptionError(f"dtype={dtype!r} is for configurations; a model has its own, change it with model.to(...).")
    return model_facts(model_or_config), getattr(model_or_config, "config", None)


def _facts(model: ModelFacts, setting: ProfileSetting, batch_size: int, max_length: int) -> Facts:
    from hf_eff.hardware.probe import device_name

    backend = setting.backend or ("ddp" if setting.world_size > 1 else "none")
    return Facts(
        model=model,
        pool=PoolFacts(num_rows=None, mean_tokens=max_length, max_tokens=max_length),
        hardware=HardwareFacts(device=setting.device or device_name(), world_size=setting.world_size, backend=backend),
        run=RunFacts(
            batch_size=batch_size,
            length=max_length,
            bf16=setting.bf16,
            compute_bytes=2.0 if setting.bf16 else 4.0,
            checkpointing=setting.activation_checkpointing,
            max_grad_norm=setting.max_grad_norm,
            optim=setting.optim,
            optim_args=setting.optim_args or "",
            optim_target_modules=setting.optim_target_modules,
            optimizer_bytes=0.0 if is_stateless(setting.optim, setting.optim_args or "") else None,
        ),
    )


def _positions(config: Any) -> int | None:
    """Tokens that the model has positions for, or None for no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


# -- one method -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Profiler:
    """Makes rows.

    Attributes:
        full_flops: FLOPs of a step of full fine-tuning.
        budget: Bytes, or None.
        positions: Longest row of the model, or None.
    """

    full_flops: float
    budget: float | None
    positions: int | None

    def row(self, setup: Setup) -> dict[str, Any]:
        """Everything that is predicted of one method."""
        try:
            found = setup.forecast()
        except PlanError as refusal:
            return {"memory": setup.memory, "refused": str(refusal)}
        change = first_change(setup, found, self.budget)
        return {
            "memory": setup.memory,
            **found.bytes,
            "total": found.total,
            "host_bytes": found.host_bytes,
            "binding": found.binding,
            "time_factor": found.step_flops / self.full_flops,
            **self._sizes(setup, found.total),
            "change": None if change is None else {**asdict(change), "text": change.text(found, self.budget)},
        }

    def _sizes(self, setup: Setup, total: float) -> dict[str, Any]:
        if self.budget is None:
            return {}
        longest = setup.most("length", self.budget, self.positions or MOST)
        return {
            "fits": total <= self.budget,
            "largest_batch": setup.most("batch_size", self.budget),
            "longest": longest,
            "longest_is_model": longest == self.positions,
        }


# -- measuring ------------------------------------------------------------------------------------------------------


def _request(given: Any, config: Any, model: ModelFacts, setting: ProfileSetting) -> StepRequest:
    """What a process needs to know to run a step of any method.

    Raises:
        OptionError: The model or the setting cannot be measured.
    """
    from hf_eff.hardware.probe import device_name
    from hf_eff.measured_step import StepRequest

    if setting.world_size > 1 or setting.backend not in (None, "none") or setting.device not in (None, device_name()):
        raise OptionError("measure=True runs one process on this machine; leave out world_size, backend and device.")
    if model.is_peft or model.is_quantized or not hasattr(config, "save_pretrained"):
        raise OptionError(
            f"measure=True makes its own {model.architecture} from a transformers configuration; give that "
            "configuration, or a model without adapters, in full precision."
        )
    if not (model.is_causal_lm or model.is_encoder_decoder or model.architecture.endswith("ForMaskedLM")):
        raise OptionError(f"measure=True trains on random tokens, which {model.architecture} does not; leave it out.")
    frozen = [name for name, each in given.named_parameters() if not each.requires_grad] if given is not config else []
    dtype = setting.dtype or str(getattr(given, "dtype", None) or "float32").removeprefix("torch.")
    return StepRequest(config, model.architecture, dtype, tuple(frozen), setting.to_dict())


def _measured(request: StepRequest, setup: Setup, total: float) -> dict[str, Any]:
    """Measured bytes beside those predicted for what really trained, and the error of each."""
    from hf_eff.measured_step import measure_step

    run = setup.facts.run
    found = measure_step(request, setup.options, run.batch_size, run.length, total)
    if "failed" in found:
        return found
    measured, predicted = {**found["bytes"], "total": found["total"]}, found["predicted"]
    predicted = {**predicted, "total": sum(predicted.values())}
    error = {term: predicted[term] / measured[term] - 1 if measured[term] > 0 else None for term in measured}
    return {**found, "predicted": predicted, "error": error}
