"""Budgeted fine-tuning on Hugging Face: which data, which memory strategy, when to stop.

Every public name is resolved on first use, so that ``import hf_eff`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BudgetedTrainer": "hf_eff.trainer",
    "BlockwiseTrainer": "hf_eff.trainer",
    "ZOTrainer": "hf_eff.trainer",
    "BudgetedTrainerMixin": "hf_eff.trainer",
    "BudgetedTrainingArguments": "hf_eff.arguments",
    "BudgetedArguments": "hf_eff.arguments",
    "BudgetedSFTTrainer": "hf_eff.sft",
    "BlockwiseSFTTrainer": "hf_eff.sft",
    "ZOSFTTrainer": "hf_eff.sft",
    "BudgetedSFTConfig": "hf_eff.sft",
    "Objective": "hf_eff.engines.objectives",
    "ClassificationError": "hf_eff.engines.objectives",
    "GenerationObjective": "hf_eff.engines.generation_objective",
    "GovernorCallback": "hf_eff.callback",
    "list_methods": "hf_eff.registry",
    "get_method": "hf_eff.registry",
    "method_card": "hf_eff.registry",
    "register_method": "hf_eff.registry",
    "AutoSelector": "hf_eff.auto",
    "AutoMemoryStrategy": "hf_eff.auto",
    "AutoGovernor": "hf_eff.auto",
    "Selection": "hf_eff.selection",
    "select_dataset": "hf_eff.selection",
    "load_selected": "hf_eff.selection",
    "combine_selections": "hf_eff.manifest.lineage",
    "refresh_selection": "hf_eff.manifest.lineage",
    "SelectionMismatchWarning": "hf_eff.manifest",
    "Recipe": "hf_eff.recipe",
    "list_recipes": "hf_eff.recipe",
    "Budget": "hf_eff.contracts.budget",
    "Plan": "hf_eff.plan",
    "make_plan": "hf_eff.plan",
    "profile_memory": "hf_eff.profile",
    "EffError": "hf_eff.errors",
    "EffWarning": "hf_eff.errors",
    "NoEffectWarning": "hf_eff.errors",
}
__all__ = sorted(_HOME)  # noqa: PLE0605 - computed from the table above


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name, on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'hf_eff' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted({*globals(), *_HOME})
