"""Same seed, same result; stopped and continued equals never stopped."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch

from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import BudgetExceededError
from hf_eff.hardware.probe import device_name
from hf_eff.testing.check import Check, CheckFailedError, expect
from hf_eff.testing.rehearsal import Rehearsal, differing, toy_batches
from hf_eff.testing.selection_scene import make_context, pick
from hf_eff.testing.tapes import CURVES, Tape, answers_of, play, replay
from hf_eff.testing.tasks import json_part, new_governor, same, use
from hf_eff.testing.trial import Trial

SEEDS = range(1, 5)


def check_repeatable(spec: MethodSpec) -> None:
    """The same seed gives the same result to the last bit."""
    expect(same(use(spec), use(spec)), f"two runs of {spec.address} with one seed differ.")


def check_seed(spec: MethodSpec) -> None:
    """Another seed changes the result exactly when the method does not call itself deterministic."""
    first = use(spec)
    unchanged = all(same(first, use(spec, seed)) for seed in SEEDS)
    if spec.traits.deterministic:
        expect(unchanged, f"{spec.address} declares 'deterministic' and depends on the seed.")
    else:
        expect(not unchanged, f"{spec.address} is not declared 'deterministic' and ignores the seed.")


def check_resume_steps(spec: MethodSpec) -> None:
    """Two windows, a checkpoint and two more equal four, in weights, method state and optimizer state."""
    batches = toy_batches(8)
    whole = Rehearsal(spec).run(batches, accumulation=2)
    first = Rehearsal(spec).run(batches[:4], accumulation=2)
    second = Rehearsal(spec).restore(first.snapshot()).run(batches[4:], accumulation=2)
    moved = differing(first.weights(), whole.weights())
    expect(moved, f"{spec.address}: two steps after the checkpoint moved no weight, so resuming proves nothing.")
    wrong = differing(whole.weights(), second.weights())
    expect(not wrong, f"{spec.address}: resumed and uninterrupted weights differ in {wrong[:3]}.")
    expect(
        _flat(whole.snapshot()["optimizer"]) == _flat(second.snapshot()["optimizer"]),
        f"{spec.address}: resumed and uninterrupted optimizer states differ.",
    )
    states = [json.dumps(json_part(run.method.state_dict()), sort_keys=True) for run in (whole, second)]
    expect(states[0] == states[1], f"{spec.address}: resumed and uninterrupted method states differ: {states}.")


def _flat(value: object) -> object:
    """Nested state with tensors as plain lists, so that it compares by value."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _flat(item) for key, item in value.items()}
    return [_flat(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_state_is_json(spec: MethodSpec) -> None:
    """The state is JSON and, for a memory method, tensors under string keys; nothing that needs pickle."""
    if spec.kind == "memory":
        state = Rehearsal(spec).run(toy_batches(2)).method.state_dict()
    else:
        governor = new_governor(spec)
        play(governor, Tape(steps=20))
        state = governor.state_dict()
    try:
        text = json.dumps(json_part(state), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckFailedError(f"the state of {spec.address} is not JSON: {error}.") from error
    expect(json.loads(text) == json_part(state), f"the state of {spec.address} does not survive JSON unchanged.")


def check_resume_tape(spec: MethodSpec) -> None:
    """A governor restored in mid-tape decides as if it had never stopped."""
    for curve in CURVES:
        tape = Tape(curve, limit=110.0)
        whole = play(new_governor(spec), tape)
        for middle in {1, whole.last_step // 2, whole.last_step - 1}:
            before, after = new_governor(spec), new_governor(spec)
            play(before, tape, until=middle)
            after.load_state_dict(json.loads(json.dumps(before.state_dict())))
            equal = replay(after, tape, whole, start=middle) == answers_of(whole, start=middle)
            expect(equal, f"{spec.address} decides otherwise when resumed at step {middle}.")


def check_resume_selection(spec: MethodSpec) -> None:
    """A selection cut short by the budget and started again in its folder chooses the same rows."""
    whole = pick(spec, make_context(spec))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for allowance in _allowances(spec):
            try:
                pick(spec, make_context(spec, folder=folder, spend=_limited(allowance)))
            except BudgetExceededError:
                continue
        again = pick(spec, make_context(spec, folder=folder))
    equal = torch.equal(torch.as_tensor(whole.positions), torch.as_tensor(again.positions))
    expect(equal, f"{spec.address} chooses other rows after an interruption.")
    if whole.scores is not None and again.scores is not None:
        close = torch.allclose(torch.as_tensor(whole.scores), torch.as_tensor(again.scores), equal_nan=True, rtol=1e-6)
        expect(close, f"{spec.address} scores rows differently after an interruption.")


def _allowances(spec: MethodSpec) -> list[int]:
    """Numbers of charges after which to cut the selection: a quarter and a half of all."""
    count = 0

    def tally(_flops: float, _tokens: float) -> None:
        nonlocal count
        count += 1

    pick(spec, make_context(spec, spend=tally))
    return [math.ceil(count / 4), math.ceil(count / 2)]


def _limited(allowance: int) -> object:
    left = allowance

    def spend(_flops: float, _tokens: float) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise BudgetExceededError("the allowance of this test is used up.")

    return spend


def check_resume_training(spec: MethodSpec) -> None:
    """A run of the real trainer, cut in mid-epoch and resumed, equals the uninterrupted one bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(spec, Path(folder), accumulation=2 if spec.traits.grad_accum else 1)
        whole = trial.whole()
        expect(whole.steps > 1, f"{spec.address}: the run ended after {whole.steps} steps, there is nothing to cut.")
        wrong = trial.interrupted(max(1, trial.epoch_steps // 2)).differences(whole)
    expect(not wrong, f"{spec.address}: a resumed run differs from the uninterrupted one in {wrong}.")


def _scores_with_model(spec: MethodSpec) -> bool:
    return spec.traits.needs_model


def _trains_here(spec: MethodSpec) -> bool:
    return not spec.traits.needs_accelerator or device_name() != "cpu"


CHECKS = (
    Check(check_repeatable),
    Check(check_seed),
    Check(check_resume_steps, kinds=("memory",)),
    Check(check_state_is_json, kinds=("memory", "governor")),
    Check(check_resume_tape, kinds=("governor",)),
    Check(check_resume_training, when=_trains_here),
    Check(check_resume_selection, kinds=("selection",), when=_scores_with_model),
)
