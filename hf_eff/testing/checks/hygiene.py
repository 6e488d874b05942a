"""A method leaves the world as it found it: random state, files, network, output, model and pool."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hf_eff.contracts.selection import Pool
from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import EffWarning
from hf_eff.testing.check import Check, expect
from hf_eff.testing.guards import no_network, nothing_printed, random_state_untouched, writes_only_under
from hf_eff.testing.rehearsal import Rehearsal, differing, toy_batches
from hf_eff.testing.selection_scene import make_context, pick
from hf_eff.testing.tasks import use


def check_global_randomness(spec: MethodSpec) -> None:
    """Python's, NumPy's and torch's global generators are as before."""
    use(spec)  # Imports and lazy set-up of the stack may draw once; the method itself may not.
    with random_state_untouched():
        use(spec)


def check_no_network(spec: MethodSpec) -> None:
    """No connection is opened."""
    with no_network():
        use(spec)


def check_writes(spec: MethodSpec) -> None:
    """Files are written only in the folder that was given."""
    use(spec)  # First use may fill caches of the stack.
    with tempfile.TemporaryDirectory() as folder, writes_only_under(Path(folder)):
        use(spec, folder=Path(folder))


def check_silent(spec: MethodSpec) -> None:
    """An ordinary run prints nothing and gives no warning of ours."""
    with warnings.catch_warnings(record=True) as caught, nothing_printed():
        warnings.simplefilter("always")
        use(spec)
    ours = [str(warning.message) for warning in caught if issubclass(warning.category, EffWarning)]
    expect(not ours, f"an ordinary run of {spec.address} warned: {ours[:2]}.")


def _look_at(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=False).items()}


def _hooks(model: nn.Module) -> dict[str, int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    counts = {name: sum(len(getattr(module, kind)) for kind in kinds) for name, module in model.named_modules()}
    on_tensors = sum(len(p._backward_hooks or ()) for p in model.parameters())  # noqa: SLF001 - torch has no reader
    return {**counts, "tensors": on_tensors}


def _flags(model: nn.Module) -> dict[str, bool]:
    modes = {f"mode of {name}": module.training for name, module in model.named_modules()}
    return {**modes, **{f"requires_grad of {name}": p.requires_grad for name, p in model.named_parameters()}}


def check_model_untouched(spec: MethodSpec) -> None:
    """Selecting leaves weights, gradients, flags, mode and hooks of the model as found."""
    for training in (True, False):
        context = make_context(spec)
        model: nn.Module = context.model.train(training)
        frozen, marked = list(model.parameters())[:2]
        frozen.requires_grad_(False)
        marked.grad = torch.ones_like(marked)
        before, hooks, flags = _look_at(model), _hooks(model), _flags(model)
        pick(spec, context)
        changed = differing(before, _look_at(model))
        expect(not changed, f"{spec.address} changed {changed[:3]} of the model it scored with.")
        expect(_hooks(model) == hooks, f"{spec.address} left hooks on the model.")
        expect(_flags(model) == flags, f"{spec.address} left requires_grad or the training mode changed.")
        held = [p.grad for p in model.parameters() if p.grad is not None]
        expect(
            len(held) == 1 and bool((held[0] == 1).all()) and held[0] is marked.grad,
            f"{spec.address} touched gradients that were there or left some behind.",
        )


def _fingerprint(pool: Pool | None) -> object:
    if pool is None:
        return None
    arrays = [np.asarray(part).tobytes() for part in (pool.index, pool.lengths, pool.loss_lengths)]
    rows = [{name: list(value) for name, value in row.items()} for row in pool.rows]
    return arrays, rows, list(pool.sources or ()), list(pool.row_hash or ())


def check_pool_untouched(spec: MethodSpec) -> None:
    """Selecting leaves the rows of pool and target as found."""
    context = make_context(spec)
    before = copy.deepcopy((_fingerprint(context.pool), _fingerprint(context.reference)))
    pick(spec, context)
    after = (_fingerprint(context.pool), _fingerprint(context.reference))
    expect(before == after, f"{spec.address} changed the rows it was given.")


def check_undone_at_end(spec: MethodSpec) -> None:
    """After training, hooks and requires_grad flags are those of the prepared model."""
    run = Rehearsal(spec)
    hooks, flags = _hooks(run.model), {name: p.requires_grad for name, p in run.model.named_parameters()}
    run.run(toy_batches(3)).end()
    expect(_hooks(run.model) == hooks, f"{spec.address} left hooks on the model after train_end.")
    after = {name: p.requires_grad for name, p in run.model.named_parameters()}
    expect(after == flags, f"{spec.address} left requires_grad flags changed after train_end.")


def _scores_with_model(spec: MethodSpec) -> bool:
    return spec.traits.needs_model


CHECKS = (
    Check(check_global_randomness),
    Check(check_no_network),
    Check(check_writes),
    Check(check_silent),
    Check(check_model_untouched, kinds=("selection",), when=_scores_with_model),
    Check(check_pool_untouched, kinds=("selection",)),
    Check(check_undone_at_end, kinds=("memory",)),
)
