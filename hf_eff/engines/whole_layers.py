"""Activation checkpointing switched off in the middle of a run, whoever switched it on."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hf_eff.engines.block_switch import pause_input_gradients

_SWITCH = "gradient_checkpointing"


def keep_layers_whole(model: nn.Module) -> Callable[[], None]:
    """Let every layer keep its activations, and the backward end above the lowest trained parameter.

    Gradients stay what they are: checkpointing computes the same values a second time.

    Returns:
        Switches it on again, as it was.
    """
    on = [module for module in model.modules() if getattr(module, _SWITCH, False)]
    resume = pause_input_gradients(model)
    for module in on:
        setattr(module, _SWITCH, False)

    def restore() -> None:
        for module in on:
            setattr(module, _SWITCH, True)
        resume()

    return restore
