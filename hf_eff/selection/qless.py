"""qless: LESS on gradient features of 8, 4, 2 or 1 bits a number.

Idea
    Features and scores of ``less``, with each stored number rounded to b bits:

        four, eight bits   q = round(L g / max|g|), L = 2^(b-1) - 1
        two bits           q = sign(g) where |g| > 0.7 mean|g|, else 0
        one bit            q = sign(g)

    scaled to length one again when they are compared. Projected gradients are close to Gaussian, and
    the sign of a Gaussian keeps angles: two rows at cosine c come out at (2 / pi) arcsin(c).

Cost      N pool rows, V target rows, E checkpoints, A adapter parameters, D numbers of a feature
    flops  those of less
    disk   E*(N*(ceil(b*D/8) + 5) + V*(4*D + 5)) bytes of features, 12*E*A of checkpoints
    peak   that of less: packed rows are decoded a tile at a time

Use when
    As ``less``, where the features of a large pool, or of many checkpoints, do not fit on the disk.

Avoid when
    The features are small: at 16 bits ``less`` has nothing to lose.

Differs
    The official code shares one absmax among all rows and checkpoints; here each row has its own.
    At two bits its rule leaves almost only zeros; ``quantiser="absmax"`` runs it. Target features stay in
    float32 unless ``quantise_target`` is set. The rest as under ``less``.

Paper
    QLESS: A Quantized Approach for Data Valuation and Selection in Large Language Model Fine-Tuning
    (2025), arXiv:2502.01703
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gradient_method import TINY_TRACE, GroupedGradientConfig, picks_by_group, trace_cost, trace_pool
from hf_eff.numerics.quantise import BITS, RULES


@dataclass(frozen=True, kw_only=True)
class QlessConfig(GroupedGradientConfig):
    """Options of ``selection="qless"``."""

    group_reduce: str = knob("mean", "How groups make one score.", choices=("max", "mean"), paper="mean")
    bits: int = knob(4, "Bits of a stored number.", choices=BITS, paper="8 to 1", unit="bits")
    quantiser: str = knob("auto", "Rule: the one that suits the bits, or absmax at any.", choices=RULES, paper="absmax")
    quantise_target: bool = knob(False, "Round the target's features too.", paper="yes")
    checkpoint_weights: str = knob(
        "mean_rate",
        "What a checkpoint counts by: mean rate of its epoch, rate of its last step, or equally.",
        choices=("mean_rate", "last_rate", "equal"),
        paper="last_rate",
    )

    @property
    def stored_as(self) -> str:
        """Name of the type of a packed feature."""
        return f"int{self.bits}" + ("-absmax" if self.quantiser == "absmax" else "")


class Qless:
    """Ranks the pool as LESS does, by features of a few bits."""

    def __init__(self, config: QlessConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, best first.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: There is no target or no valid row, or gradients are not finite.
            ManifestError: ``context.store_dir`` holds features of other rows, options or another model.
        """
        config = self.config
        traced = trace_pool(
            context,
            config,
            "qless",
            store_dtype=config.stored_as,
            target_dtype=config.stored_as if config.quantise_target else "float32",
            checkpoint_weights=config.checkpoint_weights,
        )
        traced.notes.update(bits=config.bits, quantiser=config.quantiser)
        return picks_by_group(traced, config)


def cost(config: QlessConfig, facts: Facts) -> Cost:
    """Closed form of the module's head."""
    return trace_cost(config, facts, bits=config.bits, target_bits=config.bits if config.quantise_target else 32)


SPEC = MethodSpec(
    name="qless",
    kind="selection",
    slot="pool",
    summary="LESS on gradient features of 8, 4, 2 or 1 bits a number.",
    config=QlessConfig,
    build=Qless,
    cost=cost,
    paper=Paper(
        title="QLESS: A Quantized Approach for Data Valuation and Selection in Large Language Model Fine-Tuning",
        year=2025,
        arxiv="2502.01703",
    ),
    traits=Traits(deterministic=False, needs_model=True, uses_proxy=True, needs_reference_set=True),
    tiny={"fraction": 0.25, "bits": 1, **TINY_TRACE},
    requires={"peft": "peft"},
)
