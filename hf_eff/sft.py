"""The trainers over TRL's ``SFTTrainer``. Needs the extra ``sft``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from hf_eff.arguments import BudgetedArguments, options_of
from hf_eff.errors import MissingDependencyError
from hf_eff.selection_stage import ROW_COLUMN
from hf_eff.trainer import BudgetedTrainerMixin

try:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise MissingDependencyError("the SFT trainers need trl; install it with: pip install 'hf_eff[sft]'") from error


@dataclass
class BudgetedSFTConfig(BudgetedArguments, SFTConfig):
    """``SFTConfig`` with the fields of ``BudgetedArguments``."""


class BudgetedSFTTrainer(BudgetedTrainerMixin, SFTTrainer):
    """``SFTTrainer`` with selection, memory methods and a governor, picked by name.

    The whole pool is prepared by TRL, so that scoring sees the very tokens and the very mask that
    training sees; packing comes after selection.
    """

    trainer_kind = "sft"

    def __init__(self, *positional: Any, **named: Any) -> None:
        positional, named = _with_sft_config(positional, named)
        super().__init__(*positional, **named)

    def _prepare_given(self, given: dict[str, Any]) -> None:
        self.selection_stage.finish = self._finish_subset
        if isinstance(given.get("model"), str) and self.memory_stack.changes_model:
            given["model"] = _load(given["model"], given.get("args"))
        super()._prepare_given(given)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any, **named: Any
    ) -> Any:
        """TRL's preparation. Of a pool that will be narrowed, rows stay whole and keep their number."""
        name = named.get("dataset_name", rest[-1] if rest else None)
        if self._resolved is None:
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **named)
        whole = args
        if packing:
            # Truncation drops what packing would keep, so the pool is left at full length.
            whole = copy.copy(args)
            whole.max_length = None
        if name == "train" and self.selection_stage.selects and isinstance(dataset, Dataset):
            self.selection_stage.keep_raw(dataset)
            numbered = dataset.add_column(ROW_COLUMN, list(range(len(dataset))))
            return super()._prepare_dataset(numbered, processing_class, whole, False, *rest, **named)
        if name != "train" and packing and self.selection_stage.needs_reference:
            rows = super()._prepare_dataset(dataset, processing_class, whole, False, *rest, **named)
            self.selection_stage.unpacked_reference[str(name)] = rows
        return super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **named)

    def _finish_subset(self, subset: Any) -> Any:
        """Pack the narrowed pool, if packing is on."""
        args: Any = self.args
        tokenizer: Any = self.processing_class
        return super()._prepare_dataset(subset, tokenizer, args, True, None, "train") if args.packing else subset


class BlockwiseSFTTrainer(BudgetedSFTTrainer):
    """``BudgetedSFTTrainer`` that updates one block of layers at a time (``memory="badam"``)."""

    default_memory = "badam"


class ZOSFTTrainer(BudgetedSFTTrainer):
    """``BudgetedSFTTrainer`` that trains without a backward pass (``memory="mezo"``)."""

    default_memory = "mezo"


def _with_sft_config(positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn other argument classes into ``BudgetedSFTConfig``, which keeps the fields that TRL would refuse."""
    at = 1 if len(positional) > 1 else None
    args = positional[at] if at is not None else named.get("args")
    if isinstance(args, SFTConfig) or not isinstance(args, TrainingArguments):
        return positional, named
    if options_of(args).is_neutral and not isinstance(args, BudgetedArguments):
        return positional, named
    known = {field.name for field in fields(BudgetedSFTConfig) if field.init}
    values = {key: value for key, value in args.to_dict().items() if key in known}
    values["hub_token"] = args.hub_token  # to_dict masks it
    converted = BudgetedSFTConfig(**values)
    if at is None:
        return positional, {**named, "args": converted}
    return (positional[0], converted, *positional[2:]), named


def _load(name: str, args: Any) -> nn.Module:
    """Load a model by name as TRL does, so that a memory method can change it first."""
    from trl.trainer.utils import create_model_from_path

    return create_model_from_path(name, **(getattr(args, "model_init_kwargs", None) or {}))
