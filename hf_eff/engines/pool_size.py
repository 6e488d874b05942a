"""How much of a pool to keep: a share of the rows, a number of rows, or a number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hf_eff.contracts.selection import Pool
from hf_eff.contracts.spec import MethodConfig, knob
from hf_eff.errors import DataError, OptionError


@dataclass(frozen=True, kw_only=True)
class SizedConfig(MethodConfig):
    """Options of a method that keeps part of a pool. At most one is given; none means ``default_fraction``.

    Only rows with at least one loss token count; the others are never chosen.

    Raises:
        OptionError: Two sizes are given, or one lies outside its bounds.
    """

    default_fraction: ClassVar[float] = 0.1

    fraction: float | None = knob(None, "Share of the pool to keep.", low=0.0, high=1.0)
    num_examples: int | None = knob(None, "Rows to keep.", low=1, unit="rows")
    num_tokens: int | None = knob(
        None, "Tokens to keep, prompt included, padding not; never passed.", low=1, unit="tokens"
    )

    def __post_init__(self) -> None:
        """Check that the sizes do not contradict each other."""
        super().__post_init__()
        given = [name for name in ("fraction", "num_examples", "num_tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(
                f"{type(self).__name__} takes one size, got {' and '.join(given)}; leave all but one out."
            )

    @property
    def size(self) -> dict[str, Any]:
        """The size in force, as ``{"kind": ..., "value": ...}``."""
        for name in ("num_examples", "num_tokens", "fraction"):
            if getattr(self, name) is not None:
                return {"kind": name, "value": getattr(self, name)}
        return {"kind": "fraction", "value": self.default_fraction}

    def units(self, pool: Pool) -> np.ndarray:
        """[N] What each row uses up of ``limit``: 1, or its tokens."""
        return np.asarray(pool.lengths, dtype=np.int64) if self.num_tokens else np.ones(len(pool), dtype=np.int64)

    def limit(self, pool: Pool) -> int:
        """Rows (tokens, with ``num_tokens``) that may be kept.

        Raises:
            DataError: No row is valid, the pool has fewer valid rows than asked for, or the share
                of the pool is less than one row.
        """
        valid = int(np.count_nonzero(pool.loss_lengths > 0))
        if not valid:
            raise DataError(f"none of the {len(pool)} rows of the pool has a token that carries loss.")
        if self.num_tokens:
            return self.num_tokens
        if self.num_examples is not None:
            if self.num_examples > valid:
                raise DataError(
                    f"num_examples={self.num_examples} is more than the {valid} valid rows of the pool "
                    f"({len(pool)} rows in all)."
                )
            return self.num_examples
        share = self.size["value"]
        count = int(share * valid + 1e-9)  # 0.29 * 100 is 28.999...
        if not count:
            raise DataError(
                f"fraction={share} of {valid} valid rows is less than one row; raise it or pass num_examples."
            )
        return count

    def take(self, ranked: np.ndarray, pool: Pool) -> np.ndarray:
        """The longest beginning of ``ranked`` that stays within the limit.

        Args:
            ranked: Positions of valid rows, in order of preference.
            pool: Where they point.

        Raises:
            DataError: Not even the first row fits, or ``limit`` refuses the pool.
        """
        used = np.cumsum(self.units(pool)[ranked])
        kept = ranked[: int(np.searchsorted(used, self.limit(pool), side="right"))]
        if not len(ranked):
            raise DataError("no row of the pool has a finite score, so none can be chosen.")
        if not len(kept):
            raise DataError(
                f"num_tokens={self.num_tokens} is less than the {int(self.units(pool)[ranked[0]])} tokens "
                "of the first row chosen; raise it."
            )
        return kept
