import pytest

from hf_eff.errors import OptionError, PlanError, UnknownMethodError
from hf_eff.options import EffOptions, resolve_options, with_default_memory


def names(resolved):
    return [chosen.spec.name for chosen in resolved.methods]


def test_defaults_are_neutral_and_a_budget_brings_its_governor():
    assert EffOptions().is_neutral
    assert names(resolve_options(EffOptions())) == ["all", "full", "none"]
    assert names(resolve_options(EffOptions(budget="2h"))) == ["all", "full", "budget"]
    assert not EffOptions(budget="2h").is_neutral


def test_wrong_names_get_a_suggestion():
    with pytest.raises(UnknownMethodError, match=r"memory='badm' is not registered\. Did you mean 'badam'\?"):
        resolve_options(EffOptions(memory="badm"))


def test_two_methods_of_one_slot_are_both_named():
    with pytest.raises(PlanError, match=r"memory='badam\+mezo': 'badam' and 'mezo' both fill the slot 'update'"):
        resolve_options(EffOptions(memory="badam+mezo"))


def test_options_of_a_composition_go_flat_or_nested():
    flat = resolve_options(EffOptions(memory="lora+mezo", memory_kwargs={"r": 4, "eps": 1e-2}))
    nested = resolve_options(EffOptions(memory="lora+mezo", memory_kwargs={"lora": {"r": 4}, "mezo": {"eps": "1e-2"}}))
    assert [chosen.config for chosen in flat.memory] == [chosen.config for chosen in nested.memory]
    with pytest.raises(OptionError, match=r"'rank' is no option of \['lora', 'mezo'\]"):
        resolve_options(EffOptions(memory="lora+mezo", memory_kwargs={"rank": 4}))


def test_json_text_is_read_and_its_errors_named():
    resolved = resolve_options(EffOptions(selection="random", selection_kwargs='{"fraction": 0.5}'))
    assert resolved.selection[0].config.fraction == 0.5
    with pytest.raises(OptionError, match=r"selection_kwargs='{' is not JSON"):
        resolve_options(EffOptions(selection_kwargs="{"))
    with pytest.raises(OptionError, match=r"has no option 'fractoin'. Did you mean 'fraction'"):
        resolve_options(EffOptions(selection="random", selection_kwargs={"fractoin": 0.5}))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"governor_mode": "maybe"}, "governor_mode must be one of"),
        ({"budget": "2 parsecs"}, "is not an amount with a unit"),
        ({"budget": "4usd"}, "needs price_per_hour"),
        ({"power_watts": 0.0}, "positive number of watts"),
        ({"governor": "budget"}, "governor='budget' needs budget="),
        ({"selection_kwargs": [1]}, "must be a mapping"),
    ],
)
def test_malformed_fields_are_one_sentence(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        resolve_options(EffOptions(**options))


def test_a_trainers_default_completes_what_is_given():
    def completed(memory, default):
        return with_default_memory(EffOptions(memory=memory), default).memory

    assert completed("full", "badam") == "badam"
    assert completed("lora", "mezo") == "lora+mezo"
    assert completed("mezo", "badam") == "mezo"
    assert completed("lora+badam", "mezo") == "lora+badam"
    assert completed("full", "full") == "full"
