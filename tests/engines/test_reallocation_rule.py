"""The rule on small worlds whose truth is known, and its bounds on random ones."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.contracts.governor import Decision, DriftReading, Offer, ProbeReading, Telemetry
from hf_eff.engines.damping import DWELL_SHARE, HYSTERESIS
from hf_eff.engines.reallocation_evidence import PATIENCE
from hf_eff.engines.reallocation_rule import ReallocationRule
from hf_eff.numerics.freshness import mean_uplift
from hf_eff.numerics.refresh_law import optimal_age

LOOKS = 120
PRIOR_UPLIFT = mean_uplift([])


@dataclass(frozen=True)
class Config:
    actions: str = "refresh+next_band+widen+memory"


@dataclass
class World:
    """A run with a budget of 1 that a rule watches, probed after each of ``LOOKS`` stretches.

    ``rate`` gives the loss per unit of training from the training done and that done since the rows were chosen.
    """

    rate: Callable[[float, float], float]
    offers: tuple[Offer, ...]
    lifetime: float = 0.2
    noise: float = 0.001
    obeys: bool = True
    drifts: bool = True
    threshold: float = 0.0
    rule: ReallocationRule = field(default_factory=lambda: ReallocationRule(Config()))
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    trained: float = 0.0
    age: float = 0.0
    overhead: float = 0.0
    probes: float = 0.0
    loss: float = 5.0
    phase: int = 0
    read: float | None = None
    step: int = 0
    token_cost: float = 1.0
    carried_out: dict[str, float] = field(default_factory=dict)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    looks: list[Telemetry] = field(default_factory=list)

    def look(self) -> Telemetry:
        """Train one stretch, probe, and show what is seen."""
        self.loss -= self.rate(self.trained, self.age) / LOOKS / self.token_cost
        self.trained += 1 / LOOKS
        self.age += 1 / LOOKS
        self.step += 1
        read = self.loss + self.noise * self.generator.normal()
        delta = None if self.read is None else self.read - read
        self.read = read
        self.probes += 1e-5
        self.overhead += 1e-5
        return Telemetry(
            step=self.step,
            max_steps=LOOKS,
            spent={},
            limits={"flops": 1.0},
            compute=self.trained + self.overhead,
            compute_limit=1.0,
            probe=ProbeReading(read, delta, None if delta is None else 1.5 * self.noise, 64),
            probe_spent=self.probes,
            overhead_spent=self.overhead,
            offers=tuple(offer for offer in self.offers if offer.name not in self.carried_out),
            drift=DriftReading(self.age, math.exp(-self.age / self.lifetime), 64) if self.drifts else None,
            data_phase=self.phase,
        )

    def ask(self, look: Telemetry) -> Decision | None:
        """What the rule says; the rate of going on is the true one."""
        rate = self.rate(self.trained, self.age) / self.token_cost
        self.rule.note_probe(look, rate)
        return self.rule.consider(look, rate, self.threshold, 0.05)

    def run(self, looks: int = LOOKS) -> list[str]:
        """Names of the actions taken."""
        for _ in range(looks):
            look = self.look()
            self.looks.append(look)
            if look.compute >= 1.0:
                break
            decision = self.ask(look)
            if decision is not None:
                self.decisions.append((look.compute, decision))
                self.carry_out(decision)
        return [decision.action for _, decision in self.decisions]

    def carry_out(self, decision: Decision) -> None:
        if not self.obeys:
            return
        name = f"{decision.action}:{decision.target}" if decision.target else decision.action
        offer = next(offer for offer in self.offers if offer.name == name)
        self.overhead += offer.fixed_cost
        if decision.action == "switch_memory":
            self.carried_out[name] = self.trained
            return
        self.phase += 1
        self.age = 0.0


def fading(uplift, lifetime=0.2):
    return lambda trained, age: 1.0 + uplift * math.exp(-age / lifetime)


def refresh(cost, **other):
    return Offer("refresh", fixed_cost=cost, fades=True, **other)


# refresh


def test_the_first_refresh_comes_at_the_age_of_the_prior_and_the_drift():
    world = World(fading(1.0), (refresh(0.02),))
    world.run()
    due = optimal_age(PRIOR_UPLIFT, 0.2, 0.02)
    at = world.decisions[0][0]
    assert due <= at <= due + 2.5 / LOOKS
    assert world.decisions[0][1].action == "refresh"


@pytest.mark.parametrize("uplift", [0.0, 1.0, 4.0])
def test_the_uplift_is_learnt_and_steers_the_period(uplift):
    world = World(fading(uplift), (refresh(0.02),))
    world.run()
    learnt = world.rule.facts(world.looks[-1])["u"]
    assert learnt == pytest.approx(uplift, abs=0.1 + 0.2 * uplift)
    if uplift == 0.0:
        assert len(world.decisions) <= 2
    else:
        ages = np.diff([at for at, _ in world.decisions[1:]]) - 0.02
        assert ages.min() > 0.6 * optimal_age(uplift, 0.2, 0.02)


def test_what_a_refresh_brought_counts_while_it_is_still_watched():
    world = World(fading(4.0), (refresh(0.02),))
    while not world.decisions:
        world.run(1)
    world.run(10)
    assert len(world.decisions) == 1
    assert world.rule.facts(world.looks[-1])["u"] > 2.5


def test_the_lifetime_comes_from_the_drift_readings():
    slow, fast = (
        World(fading(1.0), (refresh(0.004),), lifetime=1.0),
        World(fading(1.0), (refresh(0.004),), lifetime=0.05),
    )
    slow.run()
    fast.run()
    assert slow.rule.facts(slow.looks[-1])["h"] == pytest.approx(1.0, rel=0.2)
    assert fast.rule.facts(fast.looks[-1])["h"] == pytest.approx(0.05, rel=0.2)
    assert fast.decisions[0][0] < slow.decisions[0][0]


def test_a_refresh_that_cannot_pay_is_not_taken():
    assert World(fading(1.0), (refresh(0.13),), lifetime=0.05).run() == []


@pytest.mark.parametrize(("offered_from", "taken"), [(0.90, True), (0.955, False)])
def test_a_refresh_is_not_taken_when_too_little_is_left(offered_from, taken):
    world = World(fading(1.0), (refresh(0.02),))
    found = []
    while world.trained < 0.975:
        look = world.look()
        found.append(world.ask(look if look.compute >= offered_from else replace(look, offers=())))
    # u h (1 - exp(-(R - c) / h)) against (1 + eta) c at either moment.
    first = 1.0 - math.ceil(offered_from * LOOKS) / LOOKS
    assert (PRIOR_UPLIFT * 0.2 * (1.0 - math.exp(-(first - 0.02) / 0.2)) > 1.2 * 0.02) is taken
    assert any(found) is taken


@pytest.mark.parametrize(
    "change",
    [
        {"offers": (refresh(0.01, feasible=False, why_not="the pool is gone"),)},
        {"offers": ()},
        {"phase": "cooldown"},
        {"in_warmup": True},
        {"compute_limit": math.inf},
    ],
)
def test_what_forbids_an_action(change):
    world = World(fading(2.0), (refresh(0.01),))
    free = World(fading(2.0), (refresh(0.01),))
    for _ in range(60):
        assert world.ask(replace(world.look(), **change)) is None
    assert free.run(60)


def test_only_what_the_config_names_is_done():
    world = World(fading(2.0), (refresh(0.01),), rule=ReallocationRule(Config("widen+memory")))
    assert world.run() == []


def test_an_action_worth_less_than_stopping_is_not_taken():
    assert World(fading(1.0), (refresh(0.02),), threshold=5.0).run() == []
    assert World(fading(1.0), (refresh(0.02),), threshold=0.5).run()


def test_nothing_else_happens_until_the_effect_is_known():
    world = World(fading(2.0, 0.03), (refresh(0.0002),), lifetime=0.03)
    world.run()
    gaps = np.diff([at for at, _ in world.decisions])
    assert gaps.min() >= 4 / LOOKS


# rows


def saturating(trained, age):
    return 0.05 + 2.0 * math.exp(-age / 0.05)


def exhausted(trained, age):
    return 0.05 + 2.0 * math.exp(-trained / 0.05)


@pytest.mark.parametrize("action", ["widen", "next_band"])
def test_new_rows_are_tried_when_these_teach_half_as_fast(action):
    world = World(saturating, (Offer(action),), drifts=False)
    world.run()
    at, decision = world.decisions[0]
    assert decision.action == action
    best = max(saturating(step / LOOKS, step / LOOKS) for step in range(4, LOOKS))
    assert saturating(at, at) < 0.5 * best < saturating(at - 2 / LOOKS, at - 2 / LOOKS)
    assert len(world.decisions) > 4


def test_rows_that_brought_nothing_are_given_up():
    world = World(exhausted, (Offer("widen"),), drifts=False)
    assert 1 <= len(world.run()) <= 3


def test_steady_progress_is_left_alone():
    assert World(lambda trained, age: 1.0, (Offer("widen"), Offer("next_band")), drifts=False).run() == []


# memory


@pytest.mark.parametrize(("factor", "taken"), [(0.7, True), (0.86, False), (1.0, False), (1.3, False)])
def test_memory_is_switched_when_it_is_cheaper_by_the_hysteresis(factor, taken):
    offer = Offer("switch_memory", "checkpointing off", cost_factor=factor)
    world = World(lambda trained, age: 1.0, (offer,))
    assert world.run() == (["switch_memory"] if taken else [])
    if taken:
        assert world.decisions[0][1].target == "checkpointing off"


def test_a_switch_that_costs_much_is_not_worth_it_late():
    offer = Offer("switch_memory", "checkpointing off", cost_factor=0.7, fixed_cost=0.04)
    early, late = (World(lambda trained, age: 1.0, (offer,)) for _ in range(2))
    assert early.run() == ["switch_memory"]
    for _ in range(100):
        late.rule.note_probe(late.look(), 1.0)
    assert late.run() == []


@pytest.mark.parametrize("factor", [0.84, 1.0, 1.19])
def test_there_is_no_oscillation_inside_the_band(factor):
    """Two states that each look ``factor`` as dear from the other, whichever way round."""

    class Flip(World):
        def look(self):
            state = len(self.decisions) % 2
            offer = Offer("switch_memory", f"state {1 - state}", cost_factor=factor if state == 0 else 1.0 / factor)
            return replace(super().look(), offers=(offer,))

        def carry_out(self, decision):
            """The offers tell."""

    assert Flip(lambda trained, age: 1.0, ()).run() == []


def test_a_switch_that_does_not_keep_its_promise_is_retired():
    """Each offer promises half the cost and changes nothing."""
    offers = (Offer("switch_memory", "row_chunks 2", cost_factor=0.5),)

    class Liar(World):
        def carry_out(self, decision):
            self.gone = self.step

        def look(self):
            seen = super().look()
            return replace(seen, offers=()) if self.step - getattr(self, "gone", -99) < 20 else seen

    assert len(Liar(lambda trained, age: 1.0, offers).run()) == 2


# stopping


def test_a_due_action_worth_more_than_stopping_blocks_it():
    world = World(exhausted, (Offer("widen"),), drifts=False)
    seen = []
    for _ in range(40):
        look = world.look()
        if world.ask(look):
            break
        seen.append(look)
    assert world.rule.blocks_stop(look, 0.06)
    assert not world.rule.blocks_stop(look, 100.0)
    assert not world.rule.blocks_stop(replace(look, phase="cooldown"), 0.06)
    assert not world.rule.blocks_stop(replace(look, offers=(Offer("widen", feasible=False),)), 0.06)
    assert not World(lambda trained, age: 1.0, ()).rule.blocks_stop(look, 0.0)


def test_the_wait_for_the_dwell_counts_against_an_action():
    first, second = (Offer("switch_memory", name, fixed_cost=0.01, cost_factor=0.5) for name in ("one", "two"))
    world = World(lambda trained, age: 1.0, (first,))
    world.run(30)
    assert world.decisions
    look = replace(world.looks[5], offers=(second,), compute=world.decisions[-1][0])
    wait = world.rule.facts(look)["dwell_left"][second.name]
    assert wait == pytest.approx(0.02)
    stretch = (1.0 - look.compute - wait - 0.01) / 0.5
    worth = (wait + stretch) / (wait + 0.01 + 0.5 * stretch)
    assert world.rule.blocks_stop(look, 0.999 * worth)
    assert not world.rule.blocks_stop(look, 1.001 * worth)


# what the run did not carry out


def test_advice_that_is_not_taken_is_repeated_seldom_and_teaches_nothing():
    world = World(fading(1.0), (refresh(0.01),), obeys=False)
    world.run()
    times = [at for at, _ in world.decisions]
    assert len(times) > 2
    assert np.diff(times).min() >= PATIENCE
    assert world.rule.facts(world.looks[-1])["u"] == pytest.approx(PRIOR_UPLIFT)


def test_an_action_that_waits_for_its_window_still_teaches():
    """Rows change 0.1 of the budget after the decision; until then no row change is feasible."""

    class Slow(World):
        due = math.inf

        def look(self):
            if self.trained >= self.due:
                self.phase, self.age, self.due = self.phase + 1, 0.0, math.inf
            seen = super().look()
            return seen if self.due == math.inf else replace(seen, offers=(refresh(0.01, feasible=False),))

        def carry_out(self, decision):
            self.due = self.trained + 0.1

    world = Slow(fading(4.0), (refresh(0.01),))
    world.run()
    assert world.phase >= 2
    assert world.rule.facts(world.looks[-1])["u"] > 2.5


def test_without_a_known_rate_nothing_is_done_and_the_state_stays_plain():
    world = World(fading(4.0), (refresh(0.01),))
    for _ in range(60):
        look = world.look()
        world.rule.note_probe(look, math.nan)
        assert world.rule.consider(look, math.nan, 0.0, 0.05) is None
    json.dumps(world.rule.state_dict(), allow_nan=False)
    json.dumps(ReallocationRule(Config()).state_dict(), allow_nan=False)


def test_advice_that_is_not_taken_does_not_keep_the_run_alive():
    world = World(exhausted, (Offer("widen"),), drifts=False, obeys=False)
    world.run(60)
    assert world.decisions
    assert not world.rule.blocks_stop(world.looks[-1], 0.051)


# laws


@dataclass(frozen=True)
class Chances:
    """A random world: offers, noise and obedience from one seed."""

    seed: int
    probe_cost: float
    lie: float


def random_tape(chances, rule, check):
    """Play a world in which nearly everything is random; return compute and decision of each action."""
    generator = np.random.default_rng([chances.seed, 7])
    trained = overhead = probes = 0.0
    phase, taken = 0, []
    for step in range(1, 400):
        trained += float(generator.uniform(0.0005, 0.012))
        compute = trained + overhead
        if compute >= 1.0:
            break
        if probes + chances.probe_cost > 0.03 * (compute + 0.2):
            continue
        probes, overhead = probes + chances.probe_cost, overhead + chances.probe_cost
        look = Telemetry(
            step=step,
            max_steps=400,
            spent={},
            limits={},
            compute=trained + overhead,
            compute_limit=1.0,
            probe=ProbeReading(0.0, float(generator.normal(0.0, 0.05)), 0.01, 32),
            probe_spent=probes,
            overhead_spent=overhead,
            data_phase=phase,
            drift=DriftReading(float(generator.uniform(0, 0.3)), float(generator.uniform(-1, 1)), 64),
            offers=(
                refresh(float(generator.choice([0.002, 0.01, 0.03]))),
                Offer("widen", fixed_cost=float(generator.choice([0.0, 0.01, 0.02]))),
                Offer(
                    "switch_memory",
                    f"row_chunks {step}",
                    fixed_cost=float(generator.choice([0.0, 0.01, 0.02])),
                    cost_factor=float(generator.uniform(0.3, 1.6)),
                ),
            ),
        )
        rate = float(generator.normal(1.0, 2.0))
        rule.note_probe(look, rate)
        decision = rule.consider(look, rate, 0.0, 0.05)
        if decision is not None:
            taken.append((look.compute, rate, decision))
            offer = next(each for each in look.offers if each.action == decision.action)
            overhead += offer.fixed_cost
            phase += decision.action != "switch_memory" and generator.random() > chances.lie
        check(trained + overhead, overhead)
    return taken


@settings(max_examples=20, deadline=None)
@given(st.builds(Chances, st.integers(0, 10_000), st.sampled_from([1e-5, 3e-4, 2e-3]), st.sampled_from([0.0, 0.5])))
def test_overhead_and_switching_are_bounded(chances):
    """Probes and reallocations stay under 15 % of the compute plus 3 % of the budget; B / dwell actions at most."""

    def under_the_cap(spent, overhead):
        assert overhead <= 0.15 * spent + 0.03 + 1e-12

    taken = random_tape(chances, ReallocationRule(Config()), under_the_cap)
    times = [0.0, *[at for at, _, _ in taken]]
    assert len(taken) <= 1.0 / DWELL_SHARE
    assert all(later - sooner >= DWELL_SHARE - 1e-12 for sooner, later in itertools.pairwise(times))
    for _, rate, decision in taken:
        if decision.action != "refresh":
            name = f"{decision.action}:{decision.target}" if decision.target else decision.action
            assert decision.details["indices"][name] > (1.0 + HYSTERESIS) * rate


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 100))
def test_resumed_from_json_it_goes_on_alike(seed, cut):
    def world(rule=None):
        made = World(
            fading(1.5),
            (refresh(0.01), Offer("widen"), Offer("switch_memory", "row_chunks 2", cost_factor=0.6)),
            noise=0.01,
            generator=np.random.default_rng(seed),
        )
        return made if rule is None else replace(made, rule=rule)

    whole, halves = world(), world()
    whole.run(LOOKS)
    halves.run(cut)
    resumed = ReallocationRule(Config())
    resumed.load_state_dict(json.loads(json.dumps(halves.rule.state_dict())))
    halves.rule = resumed
    halves.run(LOOKS - cut)
    assert halves.decisions == whole.decisions
    assert json.dumps(halves.rule.state_dict()) == json.dumps(whole.rule.state_dict())


def test_the_record_has_what_an_audit_needs():
    world = World(fading(1.0), (refresh(0.02), Offer("widen", feasible=False, why_not="all rows are in use")))
    world.run()
    details = world.decisions[0][1].details
    assert json.loads(json.dumps(details)) == details
    assert set(details["indices"]) == {"continue", "refresh", "widen"}
    assert details["feasible"] == {"refresh": "", "widen": "all rows are in use"}
    assert details["dwell_left"]["refresh"] == 0.0
    assert details["purse"] >= 0.02
    assert details["h"] == pytest.approx(0.2, rel=0.1)
    assert details["u"] == pytest.approx(PRIOR_UPLIFT)
    assert details["rho"] == pytest.approx(math.exp(-details["age"] / 0.2))
