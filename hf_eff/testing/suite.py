"""Which checks bind a method, and running them."""

from __future__ import annotations

from collections.abc import Iterator

from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import OptionError
from hf_eff.testing.check import Check, Verdict, judge
from hf_eff.testing.checks import cost, edges, governor, hygiene, identity, memory, options, selection, state

ALL_CHECKS: tuple[Check, ...] = (
    *identity.CHECKS,
    *options.CHECKS,
    *cost.CHECKS,
    *hygiene.CHECKS,
    *state.CHECKS,
    *edges.CHECKS,
    *selection.CHECKS,
    *memory.CHECKS,
    *governor.CHECKS,
)


def checks_for(spec: MethodSpec) -> list[Check]:
    """Checks that bind a method, chosen by its kind and traits.

    Raises:
        OptionError: ``SPEC.known_failures`` names a check that does not exist or does not apply.
    """
    binding = [check for check in ALL_CHECKS if check.applies_to(spec)]
    names = [check.name for check in binding]
    for name, _ in spec.known_failures:
        if name not in names:
            raise OptionError(
                f"known_failures of {spec.address} names {name!r}, which is no check of it. Checks: {names}."
            )
    return binding


def run_suite(spec: MethodSpec) -> Iterator[Verdict]:
    """Judge a method by all checks that bind it, one after the other.

    Yields:
        The verdicts, as they come.
    """
    for check in checks_for(spec):
        yield judge(check, spec)
