"""Declaring a method: options that validate and convert themselves, SPECs that refuse contradictions."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from hf_eff.contracts.spec import KINDS, SLOTS, MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class SampleConfig(MethodConfig):
    count: int = knob(4, "How many.", low=1, high=10)
    rate: float = knob(0.5, "How fast.", low=0.0, high=1.0)
    limit: int | None = knob(None, "An upper bound.", low=1)
    name: str = knob("a", "Which one.", choices=("a", "b"))
    on: bool = knob(True, "Whether.")
    targets: tuple[str, ...] = knob(("q", "v"), "Which modules.")
    scales: tuple[float, ...] | None = knob(None, "Which scales.")
    either: int | str = knob("auto", "A number or a word.")
    word: Literal["x", "y"] = knob("x", "One of two.", choices=("x", "y"))


def make(**options):
    return SampleConfig.from_dict(options)


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("rate", "1e-3", 1e-3),
        ("rate", 1, 1.0),
        ("rate", "0.25", 0.25),
        ("count", "3", 3),
        ("count", 3.0, 3),
        ("count", "3e0", 3),
        ("limit", None, None),
        ("limit", "7", 7),
        ("on", "false", False),
        ("on", "True", True),
        ("targets", ["k"], ("k",)),
        ("targets", "k, o", ("k", "o")),
        ("scales", ["1e-3", 2], (1e-3, 2.0)),
        ("scales", None, None),
        ("either", 3, 3),
        ("either", "auto", "auto"),
        ("word", "y", "y"),
    ],
)
def test_converts(option, given, expected):
    value = getattr(make(**{option: given}), option)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("rate", "fast"),
        ("rate", float("nan")),
        ("rate", True),
        ("rate", 1.5),
        ("rate", -0.1),
        ("rate", float("inf")),
        ("count", 2.5),
        ("count", "1.25"),
        ("count", True),
        ("count", 0),
        ("count", 11),
        ("count", None),
        ("limit", 0),
        ("limit", "many"),
        ("name", "c"),
        ("name", 3),
        ("on", 1),
        ("on", "yes"),
        ("targets", 3),
        ("scales", ["a"]),
        ("word", "z"),
    ],
)
def test_refuses_and_names_the_option(option, given):
    with pytest.raises(OptionError, match=f"SampleConfig.{option} must be"):
        make(**{option: given})


def test_large_whole_numbers_stay_exact():
    @dataclass(frozen=True, kw_only=True)
    class SeedConfig(MethodConfig):
        seed: int = knob(0, "Seed.", low=0)

    assert SeedConfig.from_dict({"seed": 2**63 - 1}).seed == 2**63 - 1


def test_message_tells_bounds_and_value():
    with pytest.raises(OptionError, match=r"SampleConfig\.rate must be in \[0\.0, 1\.0\], got 1\.5\."):
        make(rate=1.5)


def test_unknown_option_draws_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'count'"):
        make(cuont=3)


def test_unknown_option_lists_all():
    with pytest.raises(OptionError, match=r"Options: \['count', 'either'"):
        make(zzz=3)


def test_round_trip():
    config = make(count=3, scales=[1, 2], limit=4)
    assert SampleConfig.from_dict(config.to_dict()) == config


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().count = 3
    with pytest.raises(TypeError):
        SampleConfig(3)


def test_from_dict_leaves_its_argument_alone():
    options = {"targets": ["k"]}
    SampleConfig.from_dict(options)
    assert options == {"targets": ["k"]}


def test_none_means_defaults():
    assert SampleConfig.from_dict(None) == SampleConfig()


@pytest.mark.parametrize("mutable", [[], {}, set()])
def test_knob_refuses_mutable_defaults(mutable):
    with pytest.raises(TypeError, match="mutable"):
        knob(mutable, "A list.")


def spec(**changes):
    fields = {"name": "sample", "kind": "memory", "slot": "update", "summary": "A sample.", "config": SampleConfig}
    return MethodSpec(**{**fields, "build": object, "cost": lambda config, facts: None, **changes})


def test_spec_address():
    assert spec().address == "memory='sample'"


@pytest.mark.parametrize("changes", [{"kind": "memmory"}, {"slot": "pool"}, {"kind": "governor"}])
def test_spec_refuses_contradictions(changes):
    with pytest.raises(OptionError, match="must be one of"):
        spec(**changes)


def test_every_kind_has_slots():
    assert set(SLOTS) == set(KINDS)


def test_traits_are_flags():
    assert all(field.type == "bool" for field in dataclasses.fields(Traits))


def test_paper_link():
    assert Paper(title="t", year=2024, arxiv="2404.02827").link == "https://arxiv.org/abs/2404.02827"
    assert Paper(title="t", year=2024, url="https://example.org").link == "https://example.org"
    assert Paper(title="t", year=2024).link == ""
