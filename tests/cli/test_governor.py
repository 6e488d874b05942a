from __future__ import annotations

import dataclasses
import json
import math

import pytest

from hf_eff import cli
from hf_eff.contracts.governor import Decision, Governor, Offer, ProbeReading
from hf_eff.contracts.spec import MethodConfig, knob
from hf_eff.governor import GovernorLog
from hf_eff.governor.marginal_gain import MarginalGain, MarginalGainConfig
from hf_eff.registry import register_method, unregister_method
from hf_eff.testing.tapes import Tape, falling, play, rising

OPTIONS = {"epsilon": 0.1, "probe_share": 0.1}


class Onwards(Governor):
    """Probes as another governor does and never stops, as in mode observe."""

    def __init__(self, governor):
        self.governor, self.decisions = governor, []

    def next_probe(self, telemetry, probe_cost):
        return self.governor.next_probe(telemetry, probe_cost)

    def observe(self, telemetry):
        self.decisions.append(self.governor.observe(telemetry))
        return Decision("continue", "observe only")


def write(folder, curve=rising, header=None, options=None, edit=None):
    """A run's folder with the log of a governor that only observed; and its probes."""
    options = OPTIONS if options is None else options
    watcher = Onwards(MarginalGain(MarginalGainConfig(**options)))
    looks = play(watcher, Tape(curve, steps=1000, limit=144.0, noise=0.01)).telemetry
    pairs = [(look, each) for look, each in zip(looks, watcher.decisions, strict=True) if look.probe is not None]
    if edit is not None:
        pairs = [edit(index, *pair) for index, pair in enumerate(pairs)]
    log = GovernorLog(folder / "governor.jsonl")
    methods = {"memory:full": {}, "governor:marginal_gain": MarginalGainConfig(**options).to_dict()}
    log.start({"methods": methods} if header is None else header)
    for pair in pairs:
        log.append(*pair)
    log.finish({"steps": 1000})
    return [look for look, _ in pairs]


@pytest.fixture
def called(capsys):
    def call(*words):
        capsys.readouterr()
        code = cli.main(["governor", *map(str, words)])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def replayed(called):
    def call(*words):
        code, out, err = called("replay", *words, "--json")
        assert not err
        return code, json.loads(out)

    return call


def rows(facts):
    return {row["policy"]: row for row in facts["policies"]}


# exactness


@pytest.mark.parametrize("where", ["governor.jsonl", ""])
@pytest.mark.parametrize(
    "options",
    [OPTIONS, {"threshold": "price", "price": 0.005}, {"threshold": "reservation", "strict": True}, {"cooldown": 0.2}],
)
def test_a_log_is_what_its_own_policy_decides(tmp_path, replayed, options, where):
    looks = write(tmp_path, options=options)
    code, facts = replayed(tmp_path / where)
    assert (code, facts["exact"], facts["differences"], facts["looks"]) == (0, True, [], len(looks))
    assert len(facts["policies"]) == 2


def test_the_header_of_a_callback_names_the_governor_too(tmp_path, replayed):
    write(tmp_path, header={"governor": "marginal_gain", "governor_kwargs": OPTIONS})
    assert replayed(tmp_path)[0] == 0
    write(tmp_path, header={"governor": "marginal_gain"})
    assert replayed(tmp_path)[0] == 1  # decided with other options


def test_a_log_that_was_changed_is_told(tmp_path, called, replayed):
    def edit(index, look, decision):
        return look, dataclasses.replace(decision, action="stop") if index == 9 else decision

    looks = write(tmp_path, edit=edit)
    code, facts = replayed(tmp_path)
    assert (code, facts["exact"]) == (1, False)
    assert facts["differences"] == [{"step": looks[9].step, "logged": "stop", "replayed": "continue"}]
    code, out, _ = called("replay", tmp_path)
    assert code == 1
    assert f"step {looks[9].step}: the log says stop, the replay continue" in out


def test_details_count_as_much_as_actions(tmp_path, replayed):
    def edit(index, look, decision):
        details = {**decision.details, "gain": 9.0} if "gain" in decision.details else decision.details
        return look, dataclasses.replace(decision, details=details)

    write(tmp_path, edit=edit)
    assert replayed(tmp_path)[0] == 1


# other policies


def test_patience_stops_where_the_rule_says(tmp_path, replayed):
    looks = write(tmp_path)
    losses = [look.probe.mean for look in looks]
    bad, best, end = 0, math.inf, None
    for index, loss in enumerate(losses):
        bad, best = (0, loss) if loss < best else (bad + 1, best)
        if bad == 2:
            end = index
            break
    code, facts = replayed(tmp_path, "--policy", "patience", "--option", "patience=2")
    row, last = rows(facts)["patience(patience=2)"], looks[-1].compute
    assert (code, facts["exact"]) == (0, None)
    assert (row["action"], row["step"], row["compute"]) == ("stop", looks[end].step, looks[end].compute)
    assert (row["loss"], row["best"]) == (losses[end], min(losses[: end + 1]))
    assert row["best_step"] == looks[losses.index(row["best"])].step
    assert row["saved"] == pytest.approx(1 - looks[end].compute / last)
    assert row["departs_at"] is None


def test_a_price_adds_cost_and_regret(tmp_path, replayed):
    looks = write(tmp_path)
    price = 0.004
    code, facts = replayed(tmp_path, "--policy", "fixed", "--price", price)
    least = min(look.probe.mean + price * look.compute for look in looks)
    assert (code, facts["optimum"]["J"]) == (0, pytest.approx(least))
    row, recorded = rows(facts)["fixed"], rows(facts)["recorded run"]
    assert row["step"] == next(look.step for look in looks if look.step >= 334 or look is looks[-1])
    for each in (row, recorded):
        assert each["J"] == pytest.approx(each["best"] + price * each["compute"])
        assert each["regret"] == pytest.approx(each["J"] - least)
        assert each["regret"] >= 0
    assert recorded["saved"] == 0


def test_several_policies_make_a_table(tmp_path, called):
    write(tmp_path, falling)
    words = ["--policy", "tail", "--option", "epsilon=0.3", "--option", "delta=0.5", "--policy", "budget"]
    code, out, err = called("replay", tmp_path, *words, "--policy", "marginal_gain", "--price", "1e-3")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split()[:3] == ["policy", "ends", "step"]
    assert lines[1].startswith("recorded run")
    assert lines[2].startswith("tail(epsilon=0.3, delta=0.5)")
    assert "stop" in lines[2]
    assert "at its end" in lines[3]
    assert lines[-1].startswith("least J in hindsight:")
    assert max(map(len, lines)) <= 160


def test_a_cooldown_ends_the_main_part(tmp_path, called, replayed):
    write(tmp_path, falling)
    words = ("--policy", "tail", "--option", "epsilon=0.3", "--policy", "tail", "--option", "epsilon=0.3")
    _, facts = replayed(tmp_path, *words, "--option", "cooldown=0.1")
    plain, cooled = facts["policies"][1:]
    assert (plain["action"], cooled["action"]) == ("stop", "cooldown")
    assert abs(cooled["step"] - plain["step"]) < 40
    text = called("replay", tmp_path, *words, "--option", "cooldown=0.1")[1]
    assert text.count("note: ") == text.count(f"lowers the rate from step {cooled['step']} on") == 1


class Hasty(Governor):
    """Reallocates at its third probe and stops at its sixth."""

    def __init__(self, config):
        self.config, self.probes = config, 0

    def observe(self, telemetry):
        self.probes += 1
        if self.probes == 3:
            return Decision("refresh", "out of habit")
        return Decision("stop" if self.probes >= self.config.stop_at else "continue", "a count")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HastyConfig(MethodConfig):
    stop_at: int = knob(6, "Probes before it stops.", low=1)


@pytest.fixture
def hasty():
    register_method(kind="governor", name="hasty", slot="policy", summary="For a test.", config=HastyConfig)(Hasty)
    yield "hasty"
    unregister_method("governor", "hasty")


def test_a_policy_of_others_is_replayed_and_its_departure_told(tmp_path, called, replayed, hasty):
    looks = write(tmp_path)
    _, facts = replayed(tmp_path, "--policy", hasty, "--option", "stop_at=5")
    row = rows(facts)["hasty(stop_at=5)"]
    assert (row["step"], row["departs_at"], row["reason"]) == (looks[4].step, looks[2].step, "a count")
    assert f"would reallocate at step {looks[2].step}" in called("replay", tmp_path, "--policy", hasty)[1]


def test_a_reallocation_that_was_made_is_no_departure(tmp_path, replayed, hasty):
    def edit(index, look, decision):
        look = dataclasses.replace(look, offers=(Offer("refresh"),), data_phase=int(index > 2))
        return look, Decision("refresh", "it pays") if index == 2 else decision

    write(tmp_path, edit=edit)
    assert rows(replayed(tmp_path, "--policy", hasty)[1])["hasty"]["departs_at"] is None


def test_probes_without_a_loss_are_passed_over(tmp_path, replayed):
    def edit(index, look, decision):
        reading = ProbeReading(math.nan, None, None, 0) if index >= 5 else look.probe
        return dataclasses.replace(look, probe=reading), decision

    looks = write(tmp_path, edit=edit)
    _, facts = replayed(tmp_path, "--policy", "budget")
    assert facts["policies"][0]["loss"] == looks[4].probe.mean


# mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "patiense"], "Did you mean 'patience'"),
        (["--policy", "tail", "--option", "epsilom=0.1"], "Did you mean 'epsilon'"),
        (["--policy", "tail", "--option", "epsilon"], "NAME=VALUE"),
        (["--policy", "tail", "--option", "epsilon=2"], "TailConfig.epsilon must be in"),
        (["--option", "epsilon=2"], "--option comes after the --policy"),
        (["--price", "-1"], "--price must be 0 or more"),
        (["--price", "nan"], "--price must be 0 or more"),
        (["--prise", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_words_are_refused(tmp_path, called, words, message):
    write(tmp_path)
    code, out, err = called("replay", tmp_path, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "is no hf_eff.governor_log"),
        ("no json\n", "line 1 of"),
        ('{"kind":"header","format":"other","format_version":1,"run":{}}\n', "is no hf_eff.governor_log"),
        ('{"kind":"header","format":"hf_eff.governor_log","format_version":1,"run":{}}\n', "holds no look"),
        (
            '{"kind":"header","format":"hf_eff.governor_log","format_version":1,"run":{}}\n{"kind":"decision"}\n',
            "not complete",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path, called, text, message):
    path = tmp_path / "governor.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    code, out, err = called("replay", path)
    assert (code, out) == (2, "")
    assert message in err


def test_a_log_without_a_governor_needs_a_policy(tmp_path, called):
    write(tmp_path, header={"resumed_after_step": 5})
    code, _, err = called("replay", tmp_path)
    assert code == 2
    assert "names no governor" in err
    assert called("replay", tmp_path, "--policy", "tail")[0] == 0


@pytest.mark.parametrize("words", [[], ["replai"]])
def test_an_action_is_needed(called, words):
    code, out, err = called(*words)
    assert (code, out) == (2, "")
    assert "hf-eff governor --help" in err
