"""Forward passes for their loss alone: no graph, no dropout, no key-value cache, the same random numbers each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def forward_only(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on exit every module's mode is as found.

    A key-value cache would keep two tensors a layer alive for nothing, so it is off as well.
    """
    training = [module for module in model.modules() if module.training]
    cached = [config for config in _configs(model) if getattr(config, "use_cache", False)]
    try:
        for config in cached:
            config.use_cache = False
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config in cached:
            config.use_cache = True


@contextmanager
def fixed_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers of ``device`` and the CPU start from ``seed`` inside; on exit they are as found.

    Few models draw numbers in evaluation mode (diffusion losses do). The loss at two nearby points can be compared
    only if both draw the same.
    """
    accelerated = device.type not in ("cpu", "meta")
    devices = [device.index or 0] if accelerated else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if accelerated else "cuda"):
        torch.default_generator.manual_seed(seed)
        if accelerated:
            torch.get_device_module(device).manual_seed(seed)
        yield


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and its parts, each once."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return list(found.values())
