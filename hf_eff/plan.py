"""Options and facts in, a plan out: what will run, what it will cost, and why it cannot. Pure, no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_eff import registry
from hf_eff.contracts.cost import MEMORY_TERMS, Cost, Facts
from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import PlanError
from hf_eff.numerics.optim_rules import optim_problem, optim_warning
from hf_eff.numerics.payback import PayBack
from hf_eff.numerics.planned_step import planned_length
from hf_eff.options import Chosen, EffOptions, ResolvedOptions, choose, resolve_options
from hf_eff.plan_memory import Rung, memory_cost, planned_ladder
from hf_eff.plan_probes import probe_note
from hf_eff.plan_reallocation import planned_window, reallocation_notes, refuse_reallocation
from hf_eff.plan_table import payback_facts, plan_lines
from hf_eff.units import format_amount, format_bytes


@dataclass(frozen=True)
class Refusal:
    """One reason for which a method cannot run: its flag ``trait`` equals ``value`` while ``when`` holds."""

    trait: str
    value: bool
    when: Callable[[Facts], bool]
    sentence: str
    instead: str
    kind: str | None = None
    """The kind of method it concerns; None for all."""


REFUSALS = (
    Refusal("ddp", False, lambda f: f.hardware.backend == "ddp", "does not keep ranks equal under DDP", "one process"),
    Refusal("fsdp2", False, lambda f: f.hardware.backend == "fsdp2", "does not work under FSDP2", "DDP"),
    Refusal(
        "owns_optimizer",
        True,
        lambda f: f.hardware.backend in ("deepspeed", "fsdp1"),
        "replaces the optimizer, which DeepSpeed and FSDP1 own",
        "DDP or FSDP2",
    ),
    Refusal(
        "freezes_parameters",
        True,
        lambda f: f.hardware.backend in ("deepspeed", "fsdp1"),
        "freezes parameters in turn, which DeepSpeed and FSDP1 cannot follow",
        "DDP",
    ),
    Refusal(
        "freezes_parameters",
        True,
        lambda f: f.hardware.backend == "ddp" and f.run.ddp_find_unused_parameters is False,
        "leaves parameters without gradients, which DDP would wait for",
        "ddp_find_unused_parameters=True, or leave it unset",
    ),
    Refusal(
        "grad_accum",
        False,
        lambda f: f.run.accumulation > 1,
        "does not work with gradient accumulation",
        "gradient_accumulation_steps=1",
    ),
    Refusal("fp16", False, lambda f: f.run.fp16, "does not work with fp16 loss scaling", "bf16=True"),
    Refusal("peft", False, lambda f: f.model.is_peft, "does not work on a PEFT model", "the base model"),
    Refusal("quantized", False, lambda f: f.model.is_quantized, "does not work on quantised weights", "full precision"),
    Refusal(
        "needs_causal_lm",
        True,
        lambda f: not f.model.is_causal_lm,
        "needs a decoder-only language model",
        "a causal language model",
    ),
    Refusal(
        "needs_accelerator",
        True,
        lambda f: f.hardware.device == "cpu",
        "moves data off an accelerator, and there is none",
        "memory='checkpointing'",
    ),
    Refusal(
        "needs_blocks",
        True,
        lambda f: len(f.model.blocks) < 2,
        "needs a model with at least two alike layers in a row",
        "memory='full' or memory='lora'",
    ),
    Refusal(
        "needs_reference_set",
        True,
        lambda f: f.pool.num_reference == 0,
        "needs a target to compare with, and none was given",
        "eval_dataset=... with a few examples of what the model should learn",
    ),
    Refusal(
        "streaming",
        False,
        lambda f: f.pool.streaming,
        "needs a dataset of known length, and an IterableDataset was given",
        "a map-style Dataset, or selection='all'",
        kind="selection",
    ),
    Refusal("packing", False, lambda f: f.run.packing, "does not work with packing", "packing=False"),
    Refusal(
        "owns_optimizer",
        True,
        lambda f: f.run.custom_optimizer,
        "makes its own optimizer, and another one was passed in",
        "no optimizers=... argument",
    ),
)
_STOCK_OPTIMS = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it is predicted to cost.

    Attributes:
        resolved: The methods with their options, and the budget.
        facts: What the prediction rests on.
        training_facts: The same while training: the selected rows, model and step as memory methods change them.
        bytes: Peak bytes per memory term.
        selected_rows: Rows that are trained on, or None when the pool's size is unknown.
        steps: Optimizer steps without a budget, or None.
        step_flops, step_tokens: Mean cost of one optimizer step over all processes.
        flops: Predicted FLOPs by purpose (``select``, ``train``, ``probe``), budget not applied.
        ladder: What is tried, in order, when memory runs out.
        warnings: What the user should know before spending.
    """

    resolved: ResolvedOptions
    facts: Facts
    training_facts: Facts
    bytes: Mapping[str, float]
    selected_rows: int | None
    steps: int | None
    step_flops: float
    step_tokens: float
    flops: Mapping[str, float]
    selection_tokens: float
    ladder: tuple[Rung, ...]
    warnings: tuple[str, ...]

    @property
    def peak_bytes(self) -> float:
        """Predicted peak of the device that holds the model."""
        return float(sum(self.bytes.values()))

    @property
    def seconds(self) -> float | None:
        """Predicted duration, or None while the machine's speed is unknown."""
        speed = self.facts.hardware.flops_per_second
        return sum(self.flops.values()) / speed / self.facts.hardware.world_size if speed else None

    @property
    def stop_step(self) -> int | None:
        """Optimizer step at which the plan or a FLOP, token or step budget ends the run."""
        ends = [self.steps] if self.steps is not None else []
        limits = self.resolved.budget.limits
        if "steps" in limits:
            ends.append(int(limits["steps"]))
        if "flops" in limits and self.step_flops > 0:
            left = limits["flops"] - self.flops["select"] - self.flops["probe"]
            ends.append(max(0, int(left / self.step_flops)))
        if "tokens" in limits and self.step_tokens > 0:
            ends.append(max(0, int((limits["tokens"] - self.selection_tokens) / self.step_tokens)))
        return min(ends, default=None)

    @property
    def window_steps(self) -> int | None:
        """Optimizer steps between two moments at which the rows may change; None where they never do."""
        return planned_window(self.resolved, self.stop_step)

    @property
    def selection_share(self) -> float:
        """Selection FLOPs as a fraction of all predicted FLOPs, in [0, 1]."""
        total = sum(self.flops.values())
        return self.flops["select"] / total if total else 0.0

    @property
    def payback(self) -> PayBack | None:
        """Whether selecting pays; None where every row is trained on or the steps are unknown."""
        if not self.resolved.selects or not self.flops["train"]:
            return None
        return PayBack(self.flops["select"], self.flops["train"], self.resolved.pool.expected_speedup)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy."""
        options = self.resolved.options
        return {
            "format": "hf_eff.plan",
            "format_version": 1,
            "methods": {
                chosen.spec.kind + ":" + chosen.spec.name: chosen.config.to_dict() for chosen in self.resolved.methods
            },
            "options": {key: value for key, value in dataclasses.asdict(options).items() if value is not None},
            "budget": dict(self.resolved.budget.limits),
            "predicted": {
                "bytes": dict(self.bytes),
                "peak_bytes": self.peak_bytes,
                "flops": dict(self.flops),
                "seconds": self.seconds,
                "step_flops": self.step_flops,
                "step_tokens": self.step_tokens,
                "selection_tokens": self.selection_tokens,
                "selected_rows": self.selected_rows,
                "steps": self.steps,
                "stop_step": self.stop_step,
                "selection_share": self.selection_share,
                "payback": None if self.payback is None else payback_facts(self.payback),
            },
            "ladder": [dataclasses.asdict(rung) for rung in self.ladder],
            "facts": dataclasses.asdict(self.facts),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        """The plan as a table of text."""
        return "\n".join(plan_lines(self))


def make_plan(options: EffOptions, facts: Facts) -> Plan:
    """Check a combination and predict its cost. Spends nothing.

    Args:
        options: What the user set.
        facts: Shapes of the model, size of the pool, hardware, training arguments.

    Raises:
        UnknownMethodError: A method name is not registered.
        OptionError: An option or the budget is malformed.
        PlanError: The combination cannot work; the sentence says what to use instead.
    """
    resolved = resolve_options(options)
    _refuse(resolved, facts)
    rows, selection = _selection_cost(resolved, facts)
    trained = _with_rows(facts, rows)
    steps = planned_steps(trained)
    adapted, memory = memory_cost(resolved, trained)
    step_flops = memory.step_flops * adapted.hardware.world_size
    flops = {"select": selection.flops, "train": step_flops * (steps or 0)}
    governor: Cost = resolved.governor.spec.cost(resolved.governor.config, adapted)
    plan = Plan(
        resolved=resolved,
        facts=facts,
        training_facts=adapted,
        bytes={term: float(memory.bytes.get(term, 0.0)) for term in MEMORY_TERMS},
        selected_rows=rows,
        steps=steps,
        step_flops=step_flops,
        step_tokens=_step_tokens(trained),
        flops={**flops, "probe": governor.flops},
        selection_tokens=selection.tokens,
        ladder=planned_ladder(resolved, trained),
        warnings=(),
    )
    plan = _capped(plan)
    _refuse_budget(plan)
    return dataclasses.replace(plan, warnings=tuple(_warnings(plan)))


def planned_steps(facts: Facts) -> int | None:
    """Optimizer steps that transformers would do, or None when the pool's length is unknown."""
    if facts.run.max_steps > 0:
        return facts.run.max_steps
    if facts.pool.num_rows is None:
        return None
    batches = math.ceil(math.ceil(facts.pool.num_rows / facts.hardware.world_size) / max(1, facts.run.batch_size))
    per_epoch = max(1, math.ceil(batches / max(1, facts.run.accumulation)))
    return math.ceil(per_epoch * facts.run.epochs)


def _step_tokens(facts: Facts) -> float:
    rows = facts.run.batch_size * facts.run.accumulation * facts.hardware.world_size
    return rows * planned_length(facts)


def _with_rows(facts: Facts, rows: int | None) -> Facts:
    return facts.replace(pool=dataclasses.replace(facts.pool, num_rows=rows))


def _selection_cost(resolved: ResolvedOptions, facts: Facts) -> tuple[int | None, Cost]:
    """Rows that are left to train on, and the cost of getting there stage by stage."""
    rows, flops, tokens, disk = facts.pool.num_rows, 0.0, 0.0, 0.0
    for chosen in (*resolved.stages, *resolved.selection):
        by_proxy = facts.proxy is not None and chosen.spec.traits.uses_proxy
        scored = facts.replace(model=facts.proxy, trained=facts.model) if by_proxy else facts
        cost: Cost = chosen.spec.cost(chosen.config, _with_rows(scored, rows))
        flops, tokens, disk = flops + cost.flops, tokens + cost.tokens, disk + cost.disk_bytes
        if rows is not None and resolved.selects:
            rows = _kept(chosen, rows, facts.pool.mean_tokens)
    return rows, Cost(flops=flops, tokens=tokens, disk_bytes=disk)


def _capped(plan: Plan) -> Plan:
    """The plan with random rows instead of chosen ones where choosing would take more than its share."""
    share, resolved = plan.resolved.pool.max_selection_fraction, plan.resolved
    if share is None or plan.flops["select"] <= share * (plan.flops["select"] + plan.flops["train"]):
        return plan
    asked, last = resolved.options.selection, resolved.pool_stages[-1]
    size = getattr(last.config, "size", {"kind": "fraction", "value": 1.0})
    mode = "balanced" if "source" in plan.facts.pool.columns else "plain"
    drawn = choose("selection", "random", {size["kind"]: size["value"], "mode": mode})
    others = tuple(chosen for chosen in resolved.selection if chosen is not last)
    sentence = (
        f"selection={asked!r} would take {plan.selection_share:.0%} of the FLOPs, more than the "
        f"max_selection_fraction={share:g} allowed; {mode} random rows are drawn instead."
    )
    return dataclasses.replace(
        plan,
        resolved=dataclasses.replace(resolved, selection=(*drawn, *others), stages=()),
        flops={**plan.flops, "select": 0.0},
        selection_tokens=0.0,
        warnings=(sentence,),
    )


def _kept(chosen: Chosen, rows: int, mean_tokens: float) -> int:
    """Rows that a method's size option keeps; all of them for a method without one."""
    size = getattr(chosen.config, "size", None)
    if size is None:
        return rows
    if size["kind"] == "fraction":
        return int(size["value"] * rows + 1e-9)
    if size["kind"] == "num_tokens":
        return min(rows, int(size["value"] / max(1.0, mean_tokens)))
    return min(rows, int(size["value"]))


def _refuse(resolved: ResolvedOptions, facts: Facts) -> None:
    for chosen in resolved.methods:
        registry.require(chosen.spec)
        for refusal in REFUSALS:
            if _applies(refusal, chosen.spec) and refusal.when(facts):
                raise PlanError(_sentence(chosen.spec, refusal))
    if facts.pool.num_rows == 0:
        raise PlanError("train_dataset is empty; give at least one example.")
    _refuse_objective(resolved, facts)
    if resolved.options.is_neutral:
        return
    if facts.run.auto_find_batch_size:
        raise PlanError(
            "auto_find_batch_size=True restarts the step count and would break the budget and the block schedule; "
            "set per_device_train_batch_size instead."
        )
    _refuse_optim(resolved, facts)
    _refuse_log_alone(resolved, facts)
    refuse_reallocation(resolved, facts)


def _refuse_objective(resolved: ResolvedOptions, facts: Facts) -> None:
    """Refuse an objective without gradient for methods that differentiate, or that cut the batch it is asked of."""
    if facts.run.objective_forwards is None:
        return
    addresses = "+".join(chosen.spec.name for chosen in resolved.memory)
    if all(chosen.spec.traits.needs_backward for chosen in resolved.memory):
        able = [
            repr(name)
            for name in registry.list_methods("memory")
            if not registry.get_method("memory", name).traits.needs_backward
        ]
        raise PlanError(
            f"objective=... has no gradient and memory={addresses!r} differentiates; use a method that does not: "
            f"{', '.join(able)}."
        )
    if any(chosen.spec.slot == "activations.rows" for chosen in resolved.memory):
        raise PlanError(
            f"memory={addresses!r} splits micro-batches, and objective=... is asked of whole ones; lower "
            "per_device_train_batch_size and raise gradient_accumulation_steps instead."
        )


def _refuse_log_alone(resolved: ResolvedOptions, facts: Facts) -> None:
    """Refuse checkpoints without weights where weights would be read from them."""
    for chosen in resolved.memory:
        if getattr(chosen.config, "save", "weights") != "log":
            continue
        if facts.run.load_best_model:
            raise PlanError(
                f"{chosen.spec.address} with save='log' keeps no weights for load_best_model_at_end=True to load; use "
                "save='weights', or rebuild the best step afterwards with 'hf-eff replay --until-step'."
            )
        if facts.hardware.backend == "fsdp2":
            raise PlanError(f"{chosen.spec.address} with save='log' does not work under FSDP2; use save='weights'.")


def _refuse_optim(resolved: ResolvedOptions, facts: Facts) -> None:
    """Refuse an ``optim`` that a method would ignore, or that would silently do something else."""
    owner = next((chosen.spec for chosen in resolved.memory if chosen.spec.traits.owns_optimizer), None)
    if owner is not None and facts.run.optim not in _STOCK_OPTIMS:
        raise PlanError(
            f"{owner.address} makes its own update, so optim={facts.run.optim!r} would be ignored; leave optim at its "
            "default or use memory='full'."
        )
    problem = None if owner is not None else optim_problem(facts.run, facts.hardware.backend)
    if problem is not None:
        raise PlanError(problem)


def _applies(refusal: Refusal, spec: MethodSpec) -> bool:
    concerned = refusal.kind in (None, spec.kind)
    return concerned and getattr(spec.traits, refusal.trait) == refusal.value


def _sentence(spec: MethodSpec, refusal: Refusal) -> str:
    others = _alternatives(spec, refusal)
    also = f", or another method: {', '.join(others)}" if others else ""
    return f"{spec.address} {refusal.sentence}; use {refusal.instead}{also}."


def _alternatives(spec: MethodSpec, refusal: Refusal) -> list[str]:
    names = []
    for name in registry.list_methods(spec.kind):
        other = registry.get_method(spec.kind, name)
        if other.slot == spec.slot and not _applies(refusal, other):
            names.append(repr(name))
    return names


def _refuse_budget(plan: Plan) -> None:
    limits = plan.resolved.budget.limits
    cap = limits.get("bytes")
    least = min([plan.peak_bytes, *(rung.bytes for rung in plan.ladder)])
    if cap is not None and least > cap:
        also = ", with all that out_of_memory allows" if plan.ladder else ""
        raise PlanError(
            f"budget={format_bytes(cap)} is below the predicted peak of {format_bytes(least)}{also}, for "
            f"memory={plan.resolved.options.memory!r}; lower the batch size or the length, or use a method that "
            f"holds less ('hf-eff profile' compares them)."
        )
    uncounted = plan.facts.hardware.energy_source == "unavailable" and plan.resolved.options.power_watts is None
    if "kwh" in limits and uncounted:
        raise PlanError(
            "budget limits energy and nothing here counts it; pip install 'hf_eff[energy]' on a machine with counters, "
            "or give power_watts=..., the machine's power under full load, for an estimate."
        )
    for currency, spent in (("flops", plan.flops["select"]), ("tokens", plan.selection_tokens)):
        limit = limits.get(currency)
        if limit is not None and spent >= limit:
            raise PlanError(
                f"selection={plan.resolved.options.selection!r} alone would spend {format_amount(currency, spent)} of "
                f"budget={format_amount(currency, limit)}; raise the budget or use selection='random'."
            )


def _warnings(plan: Plan) -> list[str]:
    found = list(plan.warnings)
    resolved, facts = plan.resolved, plan.facts
    if plan.stop_step == 0:
        found.append(f"budget {resolved.budget} does not cover one optimizer step; nothing will be trained.")
    if plan.selection_share > 0.5:
        found.append(
            f"selection takes {plan.selection_share:.0%} of the predicted FLOPs; a smaller pool, a cheaper method "
            "or reuse of the manifest would pay back sooner."
        )
    cap = resolved.budget.limits.get("bytes")
    if cap is not None and plan.peak_bytes > cap:
        rung = next(rung for rung in plan.ladder if rung.bytes <= cap)
        found.append(
            f"the longest batches would need {format_bytes(plan.peak_bytes)} and the budget is {format_bytes(cap)}; "
            f"they are trained with what out_of_memory allows, up to {rung.name!r}"
            f"{'' if rung.exact else ', which changes the result'}."
        )
    for chosen in resolved.methods:
        if chosen.spec.status == "experimental":
            found.append(f"{chosen.spec.address} is experimental and may change.")
        if chosen.spec.traits.dropout_off and facts.model.dropout > 0:
            found.append(f"{chosen.spec.address} trains with dropout off.")
        if not chosen.spec.traits.max_grad_norm and facts.run.max_grad_norm > 0:
            found.append(f"{chosen.spec.address} does not apply max_grad_norm={facts.run.max_grad_norm:g}.")
    found += reallocation_notes(resolved, plan.training_facts, plan.stop_step)
    reached = plan.stop_step / plan.steps if plan.steps and plan.stop_step is not None else 1.0
    unpaid = probe_note(resolved, plan.training_facts, plan.flops["probe"], reached)
    found += [unpaid] if unpaid is not None else []
    undone = optim_warning(facts.run)
    found += [undone] if undone is not None else []
    if not facts.model.exact_flops:
        found.append("this model has layers of unknown cost; FLOPs are an estimate.")
    probabilistic = sorted({"seconds", "kwh", "usd"} & set(resolved.budget.limits))
    if probabilistic:
        found.append(f"the {', '.join(probabilistic)} limit is kept up to one step: the next step's time is not known.")
    return found
