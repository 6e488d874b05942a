"""Sizes of low-rank adapters and what they make autograd keep, from the shapes of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_eff.contracts.cost import BlockFacts, KeptInputs, ModelFacts


@dataclass(frozen=True)
class Adapters:
    """Adapters of one rank on the linear layers of the last blocks.

    Attributes:
        rank: r.
        modules: Number of named modules that have one in each block; None for all linear layers.
        top_layers: Blocks, from the last, that have adapters; None for all.
        variant: ``"lora"``, ``"lora_fa"`` (the first matrix frozen) or ``"velora"`` (its input kept compressed).
        velora_groups: Numbers that stand for one token's input of a matrix in ``"velora"``.
        dropout: Whether the adapters' input is dropped out.
    """

    rank: int
    modules: int | None = None
    top_layers: int | None = None
    variant: Literal["lora", "lora_fa", "velora"] = "lora"
    velora_groups: int = 64
    dropout: bool = False

    def sizes(self, model: ModelFacts, *, only_second: bool = False) -> list[int]:
        """Adapter parameters per block, or those of the second matrices alone.

        Close, not exact: facts know a block's entries, not each matrix.
        """
        left_out = 0 if self.top_layers is None else len(model.blocks) - self.top_layers
        return [
            0 if index < left_out else self.rank * self._widths(model, block, only_second=only_second)
            for index, block in enumerate(model.blocks)
        ]

    def _widths(self, model: ModelFacts, block: BlockFacts, *, only_second: bool = False) -> int:
        """Sum of m + n over the adapted matrices of a block, or of m alone; one side of each is the hidden size h."""
        hidden = max(1, model.hidden_size)
        if self.modules is not None:
            return (1 if only_second else 2) * hidden * self.modules
        other_sides = (block.matmul_params + block.cross_matmul_params) // hidden
        count = _num_matrices(model, block)
        if not only_second:
            return count * hidden + other_sides
        # Every matrix reads h but attention's output (its own width) and the feed-forward's last (i wide).
        inputs = (count - (3 if block.cross_width else 2)) * hidden + block.attention_width + block.cross_width
        return count * hidden + other_sides - inputs - model.intermediate_size

    def kept_inputs(self, model: ModelFacts, block: BlockFacts, adapter_params: int) -> KeptInputs:
        """What the adapters of a block make autograd keep, in values per token.

        Queries, keys and values read one state, gate and input another; attention keeps its output itself.
        """
        hidden, inner, norms = model.hidden_size, model.intermediate_size, 3 if block.cross_width else 2
        matrices = _num_matrices(model, block)
        readers = 5 if _is_gated(model, block) else 4  # of a normalised state
        every = readers * hidden + block.attention_width + inner
        states, copies = norms * hidden + inner, (norms + readers - 2) * hidden + inner
        if self.modules is not None:
            matrices = self.modules
            every, states, copies = (min(matrices * hidden, each) for each in (every, states, copies))
        outputs = self.rank * matrices
        if self.variant == "lora_fa":
            # The general count takes the frozen first matrices for matrices of the base, whose outputs would be kept.
            first = adapter_params - self.rank * self._widths(model, block, only_second=True)
            return KeptInputs(inner=outputs - first // max(1, hidden))
        if self.variant == "velora":
            groups = self.velora_groups * matrices
            return KeptInputs(states=groups, copies=groups, each=groups, inner=outputs)
        if self.dropout:  # each matrix keeps its own scaled input, and the mask
            return KeptInputs(states=every, copies=every, each=every, inner=outputs, masks=every)
        return KeptInputs(states=states, copies=copies, each=every, inner=outputs)


def _num_matrices(model: ModelFacts, block: BlockFacts) -> int:
    """Four attention projections, four of cross-attention, and two matrices after it or three when gated."""
    return 4 + (4 if block.cross_width else 0) + (3 if _is_gated(model, block) else 2)


def _is_gated(model: ModelFacts, block: BlockFacts) -> bool:
    without_gated = block.matmul_params - 3 * model.hidden_size * model.intermediate_size
    return without_gated >= 2 * model.hidden_size * block.attention_width
