"""The shortest real use of a method of any kind, and what it left behind, in a form that can be compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_eff.contracts.governor import Governor
from hf_eff.contracts.spec import MethodSpec
from hf_eff.registry import build
from hf_eff.testing.rehearsal import Rehearsal, differing, toy_batches
from hf_eff.testing.selection_scene import SEED, make_context, pick
from hf_eff.testing.tapes import Tape, play

Result = Mapping[str, torch.Tensor]


def new_governor(spec: MethodSpec) -> Governor:
    """A governor with its toy options."""
    governor: Governor = build(spec, dict(spec.tiny))
    return governor


def _select(spec: MethodSpec, seed: int, folder: Path) -> Result:
    picks = pick(spec, make_context(spec, seed=SEED + seed, folder=folder))
    result = {"positions": torch.as_tensor(picks.positions).clone()}
    for name in ("scores", "weights"):
        if getattr(picks, name) is not None:
            result[name] = torch.nan_to_num(torch.as_tensor(getattr(picks, name)), nan=-1e9)
    return result


def _train(spec: MethodSpec, seed: int, _folder: Path) -> Result:
    return Rehearsal(spec, seed=seed).run(toy_batches(4)).end().weights()


def _govern(spec: MethodSpec, _seed: int, _folder: Path) -> Result:
    recording = play(new_governor(spec), Tape(steps=60))
    probed = [look.step for look in recording.telemetry if look.probe is not None]
    return {"last_step": torch.tensor(recording.last_step), "probes": torch.tensor(probed)}


_USE: Mapping[str, Callable[[MethodSpec, int, Path], Result]] = {
    "selection": _select,
    "memory": _train,
    "governor": _govern,
}


def use(spec: MethodSpec, seed: int = 0, folder: Path | None = None) -> Result:
    """Use a method once on toy material: select, take four steps, or watch a tape."""
    if folder is not None:
        return _USE[spec.kind](spec, seed, folder)
    with tempfile.TemporaryDirectory() as scratch:
        return _USE[spec.kind](spec, seed, Path(scratch))


def same(first: Result, second: Result) -> bool:
    """Whether two results are bit-identical."""
    return not differing(first, second)


def json_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """A method's state without its tensors."""
    return {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
