"""A stop rule written out plainly, for policies that differ in their threshold only."""

from __future__ import annotations

import math
import statistics

import pytest

from hf_eff.numerics.curves import fit_curves


def literal_stops(looks, law, *, chance=0.3, confirm=0.02):
    """Whether each probe stops the run, at a constant learning rate, without breaks, under a limit that binds.

    ``law(spent, limit, gain, level)`` gives stretch and needed gain; ``gain(stretch)`` is the forecast at the probe and
    ``level`` the smoothed loss, relative to the first probe.
    """
    clock, levels, errors, stops, pending = [], [], [], [], None
    probes = [look for look in looks if look.probe is not None]
    start, limit = probes[0], probes[0].compute_limit
    budget = limit - start.compute
    for look in probes:
        clock.append((look.compute - start.compute - (look.probe_spent - start.probe_spent)) / budget)
        levels.append(levels[-1] - look.probe.paired_delta if levels else 0.0)
        errors += [look.probe.paired_se] if len(levels) > 1 else []
        stops.append(False)
        if len(levels) < 5 or look.compute - start.compute < confirm * limit:
            continue
        weights = [0.95**age for age in reversed(range(len(levels)))]
        curves = fit_curves(clock, levels, weights, noise_sd=statistics.median(errors[-8:]) / math.sqrt(2))
        level = curves.predict(clock[-1])[0]
        stretch, needed = law(look.compute, limit, lambda c, f=curves: f.forecast(clock[-1], c / budget).gain, level)
        seen = curves.forecast(clock[-1], stretch / budget, needed)
        recent = range(len(clock) - min(8, max(3, sum(c >= clock[-1] - 1 / 15 for c in clock))), len(clock))
        slopes = [(levels[j] - levels[i]) / (clock[j] - clock[i]) for i in recent for j in recent if i < j]
        held, pending = pending is not None, look.compute if pending is None else pending
        pending = pending if seen.probability < chance else None
        agreed = held and pending is not None and look.compute - pending >= confirm * limit
        # Two levels in a row above every earlier one, by more than the errors and the best one's luck explain.
        error, least = statistics.median(errors[-8:]), min(levels[:-2])
        chance_of_none = sum(statistics.NormalDist().cdf((least - min(levels[-2:])) / error) for _ in levels[:-2])
        rises = seen.negative > 0.95 or chance_of_none < 0.05
        stops[-1] = rises or (agreed and -statistics.median(slopes) / budget < needed / stretch)
    return stops


@pytest.fixture(scope="session")
def literal():
    return literal_stops


@pytest.fixture(scope="session")
def watched():
    """Every look that a tape gives a policy, and every decision; the run goes on after a stop."""

    def watch(policy, tape):
        from hf_eff.testing import tapes

        class Deaf:
            def next_probe(self, look, cost):
                return policy.next_probe(look, cost)

            def observe(self, look):
                decisions.append(policy.observe(look))
                return tapes.Decision("continue", "the tape goes on")

        decisions = []
        looks = tapes.play(Deaf(), tape).telemetry
        return looks, decisions

    return watch
