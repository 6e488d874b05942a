"""A memory method trains what it says, learns, keeps its promises about gradients and optimizer, and saves memory."""

from __future__ import annotations

import math

import torch

from hf_eff.contracts.spec import MethodSpec
from hf_eff.testing.check import Check, CheckFailedError, expect
from hf_eff.testing.checks.cost import held_bytes
from hf_eff.testing.rehearsal import Rehearsal, differing, split, token_loss, toy_batches, toy_model

FROZEN = ("model.embed_tokens.weight", "model.norm.weight")
TOLERANCE = 1e-4
"""Relative: two orders of summation in fp32."""
MEBIBYTE = 2**20


def check_exact_start(spec: MethodSpec) -> None:
    """Before the first step the prepared model computes what the given one did."""
    batch = toy_batches(1)[0]
    with torch.no_grad():
        before = token_loss(toy_model().eval(), batch)
        after = token_loss(Rehearsal(spec).begin().model.eval(), batch)
    expect(torch.equal(before, after), f"{spec.address} changes the model before training: {before} became {after}.")


def check_trains_only_candidates(spec: MethodSpec) -> None:
    """After five steps only parameters that were trainable at the start have moved, and some have."""
    run = Rehearsal(spec, frozen=FROZEN)
    before = run.weights()
    run.run(toy_batches(5))
    moved = set(differing(before, run.weights()))
    stray = sorted(moved - run.candidates)
    expect(not stray, f"{spec.address} moved {stray[:3]}, which were frozen when training began.")
    expect(moved, f"{spec.address} moved no weight in five steps.")


def check_no_unused_state(spec: MethodSpec) -> None:
    """No optimizer group holds a parameter that was frozen when training began."""
    run = Rehearsal(spec, frozen=FROZEN).run(toy_batches(1))
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    groups = run.optimizer.param_groups if run.optimizer is not None else []
    held = {names.get(id(parameter)) for group in groups for parameter in group["params"]}
    stray = sorted(name for name in held if name is not None and name not in run.candidates)
    expect(not stray, f"the optimizer of {spec.address} holds the frozen parameters {stray[:3]}.")


def check_learns(spec: MethodSpec) -> None:
    """Forty steps on four rows halve the loss where every weight moves and lower it where some do.

    Rules without Adam's scaling need larger rates, so either of two will do. Without a backward pass it is enough
    that the loss falls at all.
    """
    steps, rates = (40, (1e-2, 1e-1)) if spec.traits.needs_backward else (100, (3e-4,))
    tried = []
    for lr in rates:
        before, after, factor = _losses(spec, steps, lr)
        tried.append(f"from {before:.3f} to {after:.3f} at learning rate {lr}")
        if after <= factor * before:
            return
    raise CheckFailedError(f"{spec.address}: in {steps} steps the loss went {' and '.join(tried)}.")


def _losses(spec: MethodSpec, steps: int, lr: float) -> tuple[float, float, float]:
    """Loss before and after, and the share of it that may be left."""
    batch = toy_batches(1)[0]
    run = Rehearsal(spec, lr=lr)
    start = run.weights()
    with torch.no_grad():
        before = float(token_loss(run.model.eval(), batch))
    run.run([batch] * steps).end()
    with torch.no_grad():
        after = float(token_loss(run.model.eval(), batch))
    everything = len(differing(start, run.weights())) == len(start)
    factor = 0.995 if not spec.traits.needs_backward else 0.5 if everything else 0.95
    return before, after, factor


def check_reports_loss(spec: MethodSpec) -> None:
    """The first step returns the detached loss of the untouched model."""
    batch = toy_batches(1)[0]
    with torch.no_grad():
        expected = float(token_loss(toy_model().eval(), batch))
    reported = Rehearsal(spec).step([batch])
    close = abs(reported - expected) <= 0.01 * expected
    expect(close, f"{spec.address} reports a loss of {reported:.4f} at the first step, the model has {expected:.4f}.")


def check_zero_rate(spec: MethodSpec) -> None:
    """With a learning rate of zero no weight changes by a single bit."""
    run = Rehearsal(spec, lr=0.0)
    before = run.weights()
    run.run(toy_batches(3)).end()
    moved = differing(before, run.weights())
    expect(not moved, f"{spec.address} moved {moved[:3]} at a learning rate of zero.")


def check_follows_schedule(spec: MethodSpec) -> None:
    """The rate in the optimizer's groups at the time of the step is the one that counts."""

    def silence(run: Rehearsal) -> None:
        for group in run.optimizer.param_groups if run.optimizer is not None else []:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0

    run = Rehearsal(spec, on_update=silence)
    if spec.traits.owns_backward and spec.traits.needs_backward:
        silence(run.begin())  # the backward itself updates, before the hook between backward and step is reached
    before = run.weights()
    run.run(toy_batches(2)).end()
    moved = differing(before, run.weights())
    expect(not moved, f"{spec.address} moved {moved[:3]} although the schedule had set the rate to zero.")


def check_accumulation(spec: MethodSpec) -> None:
    """One batch of eight rows and eight batches of one row give the same weights."""
    batch = toy_batches(1, rows=8)[0]
    whole, parts = Rehearsal(spec), Rehearsal(spec)
    start = whole.weights()
    for _ in range(2):
        whole.step([batch])
        parts.step(split(batch, 8))
    first, second = whole.weights(), parts.weights()
    moved = torch.cat([(first[name] - start[name]).flatten() for name in first])
    apart = torch.cat([(first[name] - second[name]).flatten() for name in first])
    ratio = float(apart.norm() / moved.norm().clamp_min(1e-12))
    expect(ratio <= 100 * TOLERANCE, f"{spec.address}: accumulating differs from one batch by {ratio:.1e} of the move.")


def check_no_backward(spec: MethodSpec) -> None:
    """A method that needs no backward makes no gradient and keeps no graph."""

    def look(run: Rehearsal) -> None:
        held = [name for name, parameter in run.model.named_parameters() if parameter.grad is not None]
        expect(not held, f"{spec.address} declares no backward and holds gradients of {held[:3]}.")

    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Rehearsal(spec, on_update=look).run(toy_batches(2))
    expect(not saved, f"{spec.address} declares no backward and saved {len(saved)} activations for one.")


def check_stateless(spec: MethodSpec) -> None:
    """A method that declares a stateless optimizer keeps no tensor in it, and the other way round."""
    held = held_bytes(spec)["optimizer"]
    if spec.traits.stateless_optimizer:
        expect(held < 1024, f"{spec.address} declares a stateless optimizer that holds {held:.0f} bytes.")
    else:
        expect(held >= 1024, f"{spec.address} keeps no optimizer state; declare 'stateless_optimizer'.")


def check_owns_optimizer(spec: MethodSpec) -> None:
    """A method replaces the optimizer exactly when it declares to."""
    run = Rehearsal(spec).begin()
    stock = type(run.optimizer) is torch.optim.AdamW
    if spec.traits.owns_optimizer:
        expect(not stock, f"{spec.address} declares 'owns_optimizer' and trains with the stock one.")
    else:
        expect(stock, f"{spec.address} trains with {type(run.optimizer).__name__}; declare 'owns_optimizer'.")


def check_saves_memory(spec: MethodSpec) -> None:
    """Gradients and optimizer state take no more than those of plain AdamW."""
    held = held_bytes(spec)
    plain = 3.0 * sum(p.numel() * p.element_size() for p in toy_model().parameters())
    used = held["gradients"] + held["optimizer"]
    expect(
        used <= plain + MEBIBYTE / 64, f"{spec.address} holds {used:.0f} B of gradients and state, AdamW {plain:.0f} B."
    )


def check_log_entries(spec: MethodSpec) -> None:
    """What a method adds to the log are finite plain numbers."""
    run = Rehearsal(spec).run(toy_batches(2))
    entries = dict(run.method.log_entries())
    norm = run.method.grad_norm()
    entries.update({} if norm is None else {"grad_norm": norm})
    for name, value in entries.items():
        plain = type(value) in (int, float)
        expect(plain and math.isfinite(value), f"{spec.address} logs {name}={value!r}, which is no finite number.")


def _needs_no_backward(spec: MethodSpec) -> bool:
    return not spec.traits.needs_backward


def _accumulates(spec: MethodSpec) -> bool:
    return spec.traits.grad_accum


_MEMORY = ("memory",)
CHECKS = (
    Check(check_exact_start, kinds=_MEMORY),
    Check(check_trains_only_candidates, kinds=_MEMORY),
    Check(check_no_unused_state, kinds=_MEMORY),
    Check(check_learns, kinds=_MEMORY),
    Check(check_reports_loss, kinds=_MEMORY),
    Check(check_zero_rate, kinds=_MEMORY),
    Check(check_follows_schedule, kinds=_MEMORY),
    Check(check_accumulation, kinds=_MEMORY, when=_accumulates),
    Check(check_no_backward, kinds=_MEMORY, when=_needs_no_backward),
    Check(check_stateless, kinds=_MEMORY),
    Check(check_owns_optimizer, kinds=_MEMORY),
    Check(check_saves_memory, kinds=_MEMORY),
    Check(check_log_entries, kinds=_MEMORY),
)
