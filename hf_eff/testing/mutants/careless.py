"""Careless work: a head without summary or sections, and an import of another method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodConfig
from hf_eff.testing.toys import match


@dataclass(frozen=True, kw_only=True)
class CarelessConfig(MethodConfig):
    """No options."""


class Careless:
    """Leaves the work to another method."""

    def __init__(self, config: CarelessConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """What the other method selects."""
        import hf_eff.selection.random as other

        picks: Picks = other.SPEC.build(other.SPEC.config()).select(context)
        return picks


def cost(config: Any, facts: Any) -> Any:
    """The toy's."""
    return match.cost(config, facts)


SPEC = replace(match.SPEC, name="careless", config=CarelessConfig, build=Careless, cost=cost, tiny={})
