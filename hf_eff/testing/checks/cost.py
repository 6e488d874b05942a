"""A cost is a pure forecast: plain numbers, never falling with size, near what is then counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.cost import MEMORY_TERMS, Cost, Facts, HardwareFacts, ModelFacts, PoolFacts, RunFacts
from hf_eff.contracts.spec import MethodConfig, MethodSpec
from hf_eff.engines.facts import model_facts
from hf_eff.errors import EffError
from hf_eff.testing.check import Check, CheckFailedError, expect
from hf_eff.testing.rehearsal import Rehearsal, loss_tokens, toy_batches, toy_model
from hf_eff.testing.selection_scene import make_context, pick, pool_facts_of
from hf_eff.testing.tiny import tiny_config

FACTOR = 2.0
"""Forecast and count may differ by this factor on the toy model, whose fixed costs weigh most."""


def toy_facts(layers: int = 2) -> Facts:
    """Facts of the toy model, pool and run."""
    return Facts(
        model=model_facts(toy_model()) if layers == 2 else _deeper(layers),
        pool=PoolFacts(
            num_rows=100, mean_tokens=24.0, max_tokens=48, num_reference=8, mean_reference_tokens=20.0, columns=()
        ),
        hardware=HardwareFacts(total_bytes=2**33, free_bytes=2**32, cores=2),
        run=RunFacts(batch_size=4, accumulation=2, max_steps=10, length=24, max_grad_norm=0.0),
    )


def _deeper(layers: int) -> ModelFacts:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return model_facts(LlamaForCausalLM(tiny_config(layers, 32)))


def _forecast(spec: MethodSpec, facts: Facts, config: MethodConfig | None = None) -> Cost:
    result: Cost = spec.cost(config or spec.config.from_dict(dict(spec.tiny)), facts)
    return result


def _numbers(cost: Cost) -> dict[str, float]:
    values = {field.name: getattr(cost, field.name) for field in dataclasses.fields(cost) if field.name != "bytes"}
    return {**values, **{f"bytes[{term}]": value for term, value in cost.bytes.items()}}


def _growing(cost: Cost) -> dict[str, float]:
    values = _numbers(cost)
    for term in ("activations", "rest"):
        values.pop(f"bytes[{term}]", None)
    return {**values, "bytes": sum(cost.bytes.values())}


def check_cost_is_plain(spec: MethodSpec) -> None:
    """The forecast is repeatable and made of finite, non-negative plain numbers under known terms."""
    for config in (spec.config(), spec.config.from_dict(dict(spec.tiny))):
        facts = toy_facts()
        first, second = _forecast(spec, facts, config), _forecast(spec, facts, config)
        expect(first == second, f"cost of {spec.address} gave two answers to one question.")
        unknown = set(first.bytes) - set(MEMORY_TERMS)
        expect(not unknown, f"cost of {spec.address} has unknown memory terms {sorted(unknown)}.")
        for name, value in _numbers(first).items():
            plain = type(value) in (int, float) and math.isfinite(value) and value >= 0
            expect(plain, f"cost of {spec.address}: {name} is {value!r}; it must be a finite number, zero or more.")


def _grown(facts: Facts) -> Iterator[tuple[str, Facts]]:
    pool, run = facts.pool, facts.run
    yield "more rows", facts.replace(pool=dataclasses.replace(pool, num_rows=200))
    yield (
        "longer rows",
        facts.replace(
            pool=dataclasses.replace(pool, mean_tokens=48.0, max_tokens=96), run=dataclasses.replace(run, length=48)
        ),
    )
    yield "more targets", facts.replace(pool=dataclasses.replace(pool, num_reference=16))
    yield "more layers", facts.replace(model=toy_facts(layers=4).model)
    yield "larger batches", facts.replace(run=dataclasses.replace(run, batch_size=8))


def check_cost_grows(spec: MethodSpec) -> None:
    """The forecast never falls when pool, rows, target, model or batch grow.

    Activations and the rest are judged by the sum of all terms: the rest is what the peak has beyond the others, and a
    method that trains the last layers keeps less below them in a deeper model.
    """
    before = _growing(_forecast(spec, toy_facts()))
    for change, facts in _grown(toy_facts()):
        after = _growing(_forecast(spec, facts))
        fallen = [name for name, value in before.items() if after.get(name, 0.0) < value * (1 - 1e-9)]
        expect(not fallen, f"cost of {spec.address}: {fallen} fell with {change}.")


def check_cost_of_unknown_size(spec: MethodSpec) -> None:
    """A pool of unknown size gives a forecast or a clear error, not a crash."""
    facts = toy_facts()
    try:
        _forecast(spec, facts.replace(pool=dataclasses.replace(facts.pool, num_rows=None, streaming=True)))
    except EffError as error:
        expect(len(str(error)) > 20, f"the error for a pool of unknown size says only {str(error)!r}.")
    except Exception as error:
        raise CheckFailedError(f"cost of {spec.address} on a pool of unknown size: {error!r}.") from error


def _near(forecast: float, counted: float) -> bool:
    return counted / FACTOR <= forecast <= counted * FACTOR


def check_selection_flops(spec: MethodSpec) -> None:
    """Forecast, charged and counted FLOPs of a toy selection agree within a factor of two."""
    charged: list[float] = []
    context = make_context(spec, spend=lambda flops, _tokens: charged.append(flops))
    facts = Facts(
        model=model_facts(context.by_proxy().model),
        pool=pool_facts_of(context.pool, context.reference),
        run=RunFacts(length=0),
        trained=model_facts(context.model),
    )
    with FlopCounterMode(display=False) as counter:
        pick(spec, context)
    counted, forecast = float(counter.get_total_flops()), _forecast(spec, facts).flops
    expect(_near(forecast, counted), f"{spec.address} forecast {forecast:.3g} FLOPs and ran {counted:.3g}.")
    expect(_near(sum(charged), counted), f"{spec.address} charged {sum(charged):.3g} FLOPs and ran {counted:.3g}.")


def check_step_flops(spec: MethodSpec) -> None:
    """Forecast, stated and counted FLOPs of toy steps agree within a factor of two."""
    windows = [toy_batches(2), toy_batches(4)[2:], toy_batches(6)[4:]]
    run = Rehearsal(spec).begin()
    stated = counted = 0.0
    for window in windows:
        stated += run.method.step_flops(run.facts, run.shapes(window), run.global_step)
        with FlopCounterMode(display=False) as counter:
            run.step(window)
        counted += counter.get_total_flops()
    expect(_near(stated, counted), f"step_flops of {spec.address} says {stated:.3g}, {counted:.3g} ran.")
    shapes = [shape for window in windows for shape in run.shapes(window)]
    length = math.ceil(sum(shape.length for shape in shapes) / len(shapes))
    facts = toy_facts()
    facts = facts.replace(run=dataclasses.replace(facts.run, length=length))
    forecast = _forecast(spec, facts).step_flops * len(windows)
    expect(_near(forecast, counted), f"cost of {spec.address} forecasts {forecast:.3g} FLOPs, {counted:.3g} ran.")


def check_held_bytes(spec: MethodSpec) -> None:
    """Forecast bytes of weights, gradients and optimizer agree with the tensors held, within a factor of two."""
    held = held_bytes(spec)
    forecast = _forecast(spec, toy_facts()).bytes
    for term, counted in held.items():
        stated = forecast.get(term, 0.0)
        small = max(stated, counted) < 4096
        expect(
            small or _near(stated, counted), f"{spec.address}: {term} forecast {stated:.0f} B, held {counted:.0f} B."
        )


def held_bytes(spec: MethodSpec, steps: int = 3) -> dict[str, float]:
    """Largest bytes of weights, gradients and optimizer state seen just before an update."""
    peak = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}

    def look(run: Rehearsal) -> None:
        state = run.optimizer.state if run.optimizer is not None else {}
        parts = {
            "weights": list(run.model.parameters()),
            "gradients": [p.grad for p in run.model.parameters() if p.grad is not None],
            "optimizer": [v for entry in state.values() for v in entry.values() if isinstance(v, torch.Tensor)],
        }
        for term, tensors in parts.items():
            peak[term] = max(peak[term], float(sum(t.numel() * t.element_size() for t in tensors)))

    run = Rehearsal(spec, on_update=look)
    batches = toy_batches(steps)
    expect(loss_tokens(batches) > 0, "the toy batches carry no loss.")
    run.run(batches)
    return peak


def _scores_with_model(spec: MethodSpec) -> bool:
    return spec.traits.needs_model


CHECKS = (
    Check(check_cost_is_plain),
    Check(check_cost_grows),
    Check(check_cost_of_unknown_size),
    Check(check_selection_flops, kinds=("selection",), when=_scores_with_model),
    Check(check_step_flops, kinds=("memory",)),
    Check(check_held_bytes, kinds=("memory",)),
)
