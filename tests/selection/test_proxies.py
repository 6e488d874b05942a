"""A proxy scores the pool wherever a method says that it can, and the larger model sees few rows or none."""

from __future__ import annotations

import pytest

from hf_eff.registry import get_method, list_methods
from hf_eff.testing.selection_scene import make_context, pick

SPECS = [spec for name in list_methods("selection") if (spec := get_method("selection", name)).traits.uses_proxy]


def _rows_through(model, run):
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        run()
    finally:
        handle.remove()
    return sum(seen)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_proxy_does_the_work(spec):
    context = make_context(spec)
    small = _rows_through(context.proxy.model, lambda: pick(spec, context))
    large = _rows_through(context.model, lambda: pick(spec, make_context(spec, model=context.model)))
    assert small >= len(context.pool)
    assert large == 0 or spec.name == "staff"
    assert large < small


def test_methods_with_a_model_take_a_proxy():
    without = [
        name
        for name in list_methods("selection")
        if get_method("selection", name).traits.needs_model and not get_method("selection", name).traits.uses_proxy
    ]
    assert without == []
