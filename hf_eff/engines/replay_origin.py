"""Where the weights at the start of a zeroth-order run come from: said in its replay log, checked before a replay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_eff.engines.ephemeral import unique_parameters
from hf_eff.engines.replay_header import LogHeader, weights_digest
from hf_eff.engines.replay_log import ReplayLog
from hf_eff.errors import CheckpointError

INITIAL_ADAPTER = "initial_adapter"


def origin_of(model: nn.Module, header: LogHeader, methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Description of a model that is about to be trained.

    Args:
        model: Unwrapped, with its first weights.
        header: Of the run; names what is trained.
        methods: Options of the memory methods that changed the model, by name: they change a base model again.

    Returns:
        JSON-able: the base model's ``model`` (id or folder), ``revision``, ``architecture`` and ``dtype``, each None
        where it is not known; ``methods``; ``frozen``, a digest of samples of what is not trained, or None; and
        ``adapter``, whether the model came with an adapter, whose first weights the run's folder has to keep.
    """
    base: Any = _base_model(model)
    config = getattr(base, "config", None)
    return {
        "model": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": type(base).__name__,
        "dtype": str(getattr(base, "dtype", "torch.float32")).removeprefix("torch."),
        "methods": {name: dict(options) for name, options in methods.items()},
        "frozen": None if _is_sharded(model) else _frozen_digest(model, header),
        "adapter": _has_adapter(model) and not methods,
    }


def require_origin(model: nn.Module, header: LogHeader) -> None:
    """Refuse a model whose frozen weights are not the run's; the trained ones are compared by ``replay``.

    Raises:
        CheckpointError: They differ.
    """
    expected = header.origin.get("frozen")
    if expected is None or _is_sharded(model):
        return
    missing = {name for name, *_ in header.parameters} - set(dict(model.named_parameters(remove_duplicate=False)))
    if not missing and _frozen_digest(model, header) != expected:
        raise CheckpointError(
            "cannot replay the run: the weights that it left frozen are other ones than the model has; load the same "
            f"model, revision and type of weights ({described(header)})."
        )


def described(header: LogHeader) -> str:
    """The base model of a run, for people."""
    origin = header.origin
    named = [f"{key} {origin[key]}" for key in ("model", "revision", "dtype") if origin.get(key)]
    return ", ".join(named) or "of unknown name"


def keep_initial_adapter(model: nn.Module, header: LogHeader, folder: Path) -> None:
    """Save the first weights of an adapter that came with the model, once, where no seed makes them again."""
    owner: Any = model
    if header.origin.get("adapter") and not _is_sharded(model):
        owner.save_pretrained(str(folder / INITIAL_ADAPTER))


def restore_initial_adapter(model: nn.Module, log: ReplayLog, folder: Path) -> None:
    """Put the first weights of an adapter back, if a run kept them."""
    if not log.header.origin.get("adapter") or not (folder / INITIAL_ADAPTER).is_dir():
        return
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    owner: Any = model
    weights = load_peft_weights(str(folder / INITIAL_ADAPTER), device="cpu")
    set_peft_model_state_dict(owner, weights, adapter_name=owner.active_adapter)


def _frozen_digest(model: nn.Module, header: LogHeader) -> str:
    every = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(every[name]) for name, *_ in header.parameters}
    frozen = unique_parameters(model, [name for name, parameter in every.items() if id(parameter) not in trained])
    return weights_digest(frozen.values())


def _has_adapter(model: nn.Module) -> bool:
    return bool(getattr(model, "peft_config", None))


def _base_model(model: Any) -> Any:
    return model.get_base_model() if _has_adapter(model) and hasattr(model, "get_base_model") else model


def _is_sharded(model: nn.Module) -> bool:
    from hf_eff.engines.sharded_weights import is_sharded

    return is_sharded(model)
