import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_eff.contracts.governor import Telemetry
from hf_eff.errors import OptionError
from hf_eff.governor.fixed import Fixed, FixedConfig
from hf_eff.testing.tapes import Tape, play, rising


@given(st.integers(1, 1000), st.integers(1, 400), st.integers(1, 100))
@example(100, 7, 100)  # 0.07 * 100 is a little above 7
def test_stops_after_the_share_of_the_steps_rounded_up(planned, part, of):
    part = min(part, of)
    exact = math.ceil(Fraction(part, of) * planned)
    for config in (FixedConfig(share=part / of), FixedConfig(epochs=part, of_epochs=of)):
        policy = Fixed(config)
        actions = [policy.observe(look(step, planned)).action for step in (max(1, exact - 1), exact, exact + 1)]
        assert actions[0] == ("stop" if exact == 1 else "continue")
        assert actions[1:] == ["stop", "stop"]


def look(step, planned):
    return Telemetry(step, planned, {}, {}, float(step), math.inf)


@pytest.mark.parametrize(("options", "last"), [({}, 40), ({"share": 0.5}, 60), ({"epochs": 3, "of_epochs": 8}, 45)])
def test_the_loss_does_not_matter(options, last):
    recording = play(Fixed(FixedConfig(**options)), Tape(rising, steps=120))
    assert (recording.last_step, recording.probes, recording.stopped) == (last, 0, True)


def test_where_the_plan_has_no_end_it_never_stops():
    assert Fixed(FixedConfig()).observe(look(10**9, 0)).action == "continue"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2}, "must be given together"),
        ({"of_epochs": 2}, "must be given together"),
        ({"epochs": 4, "of_epochs": 3}, "at most of_epochs=3"),
        ({"share": 1.5}, "share"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        FixedConfig(**options)


def test_every_policy_decides_without_torch():
    code = (
        "import json, sys\n"
        "from hf_eff.registry import get_method, list_methods\n"
        "specs = [get_method('governor', name) for name in list_methods('governor')]\n"
        "[spec.build(spec.config()) for spec in specs]\n"
        "print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == []
