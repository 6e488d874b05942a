"""Each check accepts the sound toys and rejects every mutant made for it, with a sentence about the method."""

import dataclasses

import pytest

from hf_eff.errors import OptionError
from hf_eff.testing.check import Check, CheckFailedError, judge
from hf_eff.testing.mutants import MUTANTS
from hf_eff.testing.suite import ALL_CHECKS, checks_for
from hf_eff.testing.toys import half, match, patience

TOYS = (match.SPEC, half.SPEC, patience.SPEC)
BY_NAME = {check.name: check for check in ALL_CHECKS}
BITES = [
    pytest.param(BY_NAME[name], mutant, id=f"{name}-{number}")
    for name, mutants in MUTANTS.items()
    for number, mutant in enumerate(mutants)
]
SOUND = [
    pytest.param(check, toy, id=f"{toy.kind}={toy.name}-{check.name}") for toy in TOYS for check in checks_for(toy)
]


@pytest.mark.parametrize(("check", "mutant"), BITES)
def test_rejects_its_mutant(check, mutant):
    with pytest.raises(CheckFailedError) as caught:
        check.run(mutant)
    assert len(str(caught.value).split()) >= 4


@pytest.mark.parametrize(("check", "toy"), SOUND)
def test_accepts_the_sound_method(check, toy):
    check.run(toy)


def test_every_check_has_a_mutant_and_every_mutant_a_check():
    assert set(MUTANTS) == set(BY_NAME)


def test_names_of_checks_are_unique():
    assert len(BY_NAME) == len(ALL_CHECKS)


def test_a_known_failure_that_passes_turns_red():
    spec = dataclasses.replace(match.SPEC, known_failures=(("check_summary", "no reason any more"),))
    assert judge(BY_NAME["check_summary"], spec).status == "unexpectedly passed"
    assert not judge(BY_NAME["check_summary"], spec).acceptable


def test_a_known_failure_that_fails_is_acceptable():
    spec = dataclasses.replace(match.SPEC, summary="", known_failures=(("check_summary", "still to be written"),))
    verdict = judge(BY_NAME["check_summary"], spec)
    assert (verdict.status, verdict.reason, verdict.acceptable) == ("known failure", "still to be written", True)


def test_a_known_failure_must_name_a_check_that_applies():
    spec = dataclasses.replace(match.SPEC, known_failures=(("check_learns", "wrong kind"),))
    with pytest.raises(OptionError, match="check_learns"):
        list(checks_for(spec))


def test_a_crash_is_a_failure():
    def crash(spec):
        raise RuntimeError("boom")

    verdict = judge(Check(crash), match.SPEC)
    assert (verdict.status, verdict.reason) == ("failed", "RuntimeError: boom")
