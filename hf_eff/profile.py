"""How much memory each method would need, term by term, before anything is loaded or spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import MEMORY_TERMS, Facts, PoolFacts, RunFacts
from hf_eff.errors import OptionError, PlanError
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan
from hf_eff.units import format_bytes

_COLUMNS = (*MEMORY_TERMS, "total")


@dataclass(frozen=True)
class MemoryTable:
    """Predicted peak bytes of several memory methods.

    Attributes:
        architecture: Class of the model.
        params: Its parameters.
        batch_size: Rows of a micro-batch.
        max_length: Tokens of a row.
        rows: One mapping a method: ``memory`` (its name), bytes by term, ``total``, and ``binding`` (the largest
            term); or ``memory`` and ``refused`` (why it cannot run on this model).
    """

    architecture: str
    params: int
    batch_size: int
    max_length: int
    rows: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy of the attributes."""
        shape = {"batch_size": self.batch_size, "max_length": self.max_length}
        return {"architecture": self.architecture, "params": self.params, **shape, "rows": [*map(dict, self.rows)]}

    def __str__(self) -> str:
        """The table as aligned text, one line a method."""
        head = (
            f"{self.architecture}, {self.params / 1e6:,.1f}M parameters, {self.batch_size} x {self.max_length} tokens"
        )
        width = max([len("memory"), *(len(row["memory"]) for row in self.rows)])
        names = f"{'memory':<{width}}" + "".join(f"{name:>13}" for name in _COLUMNS) + "  binding"
        return "\n".join([head, names, *(_line(row, width) for row in self.rows)])


def profile_memory(
    model_or_config: Any,
    memory: Sequence[str] = ("full", "lora", "badam", "mezo"),
    batch_size: int = 2,
    max_length: int = 512,
    *,
    bf16: bool = False,
    activation_checkpointing: bool = False,
) -> MemoryTable:
    """Predict the peak memory of training a model with each of several methods.

    Args:
        model_or_config: A model, or a transformers configuration, of which only the shapes are read.
        memory: Names of memory methods; ``+`` composes.
        batch_size: Rows of a micro-batch on one device.
        max_length: Tokens of a row, after padding and truncation.
        bf16: Whether the trainer runs with ``bf16=True`` (autocast).
        activation_checkpointing: Whether every block is checkpointed.

    Raises:
        UnknownMethodError: A name is not registered.
        OptionError: A size is below one, or the configuration describes no model.
    """
    from torch import nn

    from hf_eff.engines.facts import model_facts, model_facts_from_config

    if min(batch_size, max_length) < 1:
        raise OptionError(f"batch_size={batch_size} and max_length={max_length} must both be at least 1.")
    is_model = isinstance(model_or_config, nn.Module)
    model = model_facts(model_or_config) if is_model else model_facts_from_config(model_or_config)
    run = RunFacts(
        batch_size=batch_size,
        length=max_length,
        bf16=bf16,
        compute_bytes=2.0 if bf16 else 4.0,
        checkpointing=activation_checkpointing,
    )
    facts = Facts(model=model, pool=PoolFacts(num_rows=None, mean_tokens=max_length, max_tokens=max_length), run=run)
    names = [memory] if isinstance(memory, str) else memory
    rows = tuple(_row(name, facts) for name in names)
    return MemoryTable(model.architecture, model.params, batch_size, max_length, rows)


def _row(name: str, facts: Facts) -> dict[str, Any]:
    try:
        terms = make_plan(EffOptions(memory=name), facts).bytes
    except PlanError as refusal:
        return {"memory": name, "refused": str(refusal)}
    binding = max(terms, key=lambda term: terms[term])
    return {"memory": name, **terms, "total": float(sum(terms.values())), "binding": binding}


def _line(row: dict[str, Any], width: int) -> str:
    if "refused" in row:
        return f"{row['memory']:<{width}}  {row['refused']}"
    amounts = "".join(f"{format_bytes(row[name]):>13}" for name in _COLUMNS)
    return f"{row['memory']:<{width}}{amounts}  {row['binding']}"
