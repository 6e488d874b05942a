from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.errors import UnknownMethodError
from hf_eff.registry import get_method, register_method, unregister_method
from hf_eff.report import card
from hf_eff.report.card import END, START, is_current, method_card, render_head, sync_card


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MethodConfig):
    dims: int = knob(512, "Width | of the projection.", low=16, high=8192, unit="dims", paper="d = 8192")
    variant: str = knob("fixed", "Which text to follow.", choices=("paper", "fixed"))
    epsilon: float | None = knob(None, "Step.")


def toy_spec(kind="memory", slot="update", **changes):
    facts = {
        "summary": "A toy.",
        "config": ToyConfig,
        "build": ToyConfig,
        "cost": lambda config, facts: None,
        "paper": Paper(title="Toys at scale", year=2024, arxiv="2401.00001"),
    }
    return MethodSpec(name="toy", kind=kind, slot=slot, **{**facts, **changes})


def test_the_head_states_name_kind_slot_summary_paper_options_and_traits():
    head = render_head(toy_spec(traits=Traits(owns_backward=True, ddp=False)))
    assert head.startswith(START)
    assert head.endswith(END)
    for line in (
        "# toy",
        "A toy.",
        '| Use as | `memory="toy"` |',
        "| Kind, slot | memory, update |",
        "| Paper | [Toys at scale](https://arxiv.org/abs/2401.00001) (2024) |",
        "| `dims` | `512` | d = 8192 | 16 to 8192 dims | Width \\| of the projection. |",
        "| `variant` | `'fixed'` |  | `'paper'`, `'fixed'` | Which text to follow. |",
        "| `epsilon` | `None` |  |  | Step. |",
        "| `ddp` | no |  |",
    ):
        assert line in head.splitlines()
    assert "| `owns_backward` | yes | Replaces the training step" in head


def test_a_baseline_has_no_paper_and_a_method_without_options_says_so():
    head = render_head(toy_spec(paper=None, config=MethodConfig))
    assert "| Paper | none: a baseline for comparison |" in head
    assert "## Options\n\nNone." in head


@pytest.mark.parametrize(
    ("kind", "slot", "shown", "hidden"),
    [
        ("selection", "pool", "needs_model", "owns_optimizer"),
        ("memory", "update", "owns_optimizer", "needs_model"),
        ("governor", "policy", "needs_reference_set", "needs_backward"),
    ],
)
def test_only_the_traits_of_the_kind_are_listed(kind, slot, shown, hidden):
    head = render_head(toy_spec(kind, slot))
    assert f"| `{shown}` |" in head
    assert f"| `{hidden}` |" not in head


def test_every_trait_is_listed_for_some_kind():
    heads = "".join(render_head(toy_spec(k, s)) for k, s in (("selection", "pool"), ("memory", "update")))
    assert all(f"| `{field.name}` |" in heads for field in fields(Traits))


def test_sync_rewrites_the_head_and_keeps_the_body(tmp_path):
    page = tmp_path / "toy.md"
    page.write_text(f"{START}\nold\n{END}\n\n## Pitfalls\n\nKeep me.\n", encoding="utf-8")
    assert not is_current(page, toy_spec())
    assert sync_card(page, toy_spec()) is True
    assert is_current(page, toy_spec())
    assert page.read_text(encoding="utf-8") == render_head(toy_spec()) + "\n\n## Pitfalls\n\nKeep me.\n"
    assert sync_card(page, toy_spec()) is False
    assert [path.name for path in tmp_path.iterdir()] == ["toy.md"]


@pytest.mark.parametrize("text", ["no markers", START, f"{END} {START}", f"{START}{END}{START}{END}"])
def test_a_page_without_one_pair_of_markers_is_refused_and_left_alone(tmp_path, text):
    page = tmp_path / "toy.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        sync_card(page, toy_spec())
    assert page.read_text(encoding="utf-8") == text


def test_the_module_entry_rewrites_checks_and_names_missing_pages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(card, "list_methods", lambda kind: ["toy"])
    monkeypatch.setattr(card, "get_method", lambda kind, name: toy_spec(kind, {"memory": "update"}.get(kind, "pool")))
    monkeypatch.setattr(card, "KINDS", ("selection", "memory"))
    for kind in card.KINDS:
        (tmp_path / kind).mkdir()
    (tmp_path / "memory" / "toy.md").write_text(f"{START}{END}\n", encoding="utf-8")
    assert card.main(["--cards", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().out.split()[::2] == ["missing", "stale"]
    (tmp_path / "selection" / "toy.md").write_text(f"{START}{END}\n", encoding="utf-8")
    assert card.main(["--cards", str(tmp_path)]) == 0
    assert card.main(["--cards", str(tmp_path), "--check"]) == 0
    assert capsys.readouterr().out.split()[::2] == ["rewritten", "rewritten", "current", "current"]


def test_the_card_of_a_registered_method_is_its_head_also_where_it_replaces_a_built_in():
    spec = MethodSpec(
        name="badam", kind="memory", slot="update", summary="Mine.", config=ToyConfig, build=ToyConfig, cost=len
    )
    register_method(spec, replace=True)
    try:
        assert method_card("memory", "badam") == render_head(spec)
    finally:
        unregister_method("memory", "badam")
    assert "Mine." not in method_card("memory", "badam")
    assert render_head(get_method("memory", "badam")) in method_card("memory", "badam")


def test_the_card_of_an_unknown_method_is_refused():
    with pytest.raises(UnknownMethodError, match="Did you mean 'badam'"):
        method_card("memory", "badan")
