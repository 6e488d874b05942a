"""The learning rate lowered at the end of a run: over compute that was kept for it, and never past a limit."""

import math
from random import Random
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from hf_eff.contracts.budget import Budget
from hf_eff.engines.cooldown import Cooldown
from hf_eff.engines.ranks import Ranks
from hf_eff.engines.step_reserve import StepReserve
from hf_eff.hardware.ledger import Ledger
from hf_eff.run import BudgetedRun
from hf_eff.supervisor import governing_currency
from hf_eff.testing.toys import scripted
from hf_eff.testing.trial import Trial, registered


@pytest.fixture(autouse=True)
def scripted_governor():
    with registered(scripted.SPEC):
        yield


class Rates(TrainerCallback):
    """The learning rate of each optimizer step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def trial(folder, script="", *, steps=12, cooldown=0.5, every=1, **arguments):
    knobs = {"script": script, "cooldown": cooldown, "every": every}
    # Rows of one length and no warm-up, so that every step costs the same.
    arguments = {"lr_scheduler_type": "constant", "governor_kwargs": knobs, "max_grad_norm": 0.0, **arguments}
    return Trial(scripted.SPEC, folder, "trainer", 1, steps, arguments)


def run(folder, script="", name="run", **options):
    trainer = trial(folder, script, **options).build(name)
    seen = Rates()
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.rates


def compute_before_each_step(trainer, rates):
    """What was spent before a step is only in the logs; steps cost what they cost, so read the ledger's log."""
    return [entry["eff/flops"] for entry in trainer.state.log_history if "eff/flops" in entry][: len(rates)]


def test_the_rate_is_that_of_the_formula(tmp_path):
    trainer, rates = run(tmp_path, "4 cooldown", steps=12, cooldown=0.5)
    cooldown = trainer.budgeted_run.cooldown
    spent = [0.0, *compute_before_each_step(trainer, rates)]
    assert cooldown.begun_at == 4
    assert rates[:5] == [1e-3] * 5  # the first step of a cooldown has used nothing of it
    assert trainer.budgeted_run.stop.reason == "the learning rate has been lowered to its end"
    assert 5 < len(rates) < 12
    # What was logged after a step includes its probe, and the rate was set before that.
    probe = trainer.budgeted_run.supervisor.probe.cost_flops
    begun = spent[4]
    for step in range(5, len(rates)):
        progress = (spent[step] - probe - begun) / (0.5 * begun)
        assert rates[step] == pytest.approx(1e-3 * (1 - math.sqrt(progress)), rel=1e-9)
    assert trainer.ledger.spent()["flops"] <= cooldown.end + 2 * probe


def test_a_budget_leaves_room_for_it(tmp_path):
    limit = 6.0e8
    trainer, rates = run(tmp_path, steps=40, cooldown=0.5, every=1000, budget=f"{limit:.0f}flop")
    cooldown = trainer.budgeted_run.cooldown
    assert cooldown.begun_at is not None
    assert rates[cooldown.begun_at] == 1e-3 > rates[cooldown.begun_at + 1] > rates[-1]
    assert cooldown.end <= limit
    assert trainer.ledger.spent()["flops"] <= limit
    assert trainer.report["steps"]["done"] == len(rates) < 40
    assert trainer.report["binding"]["stopped_by"] == "flops"
    assert trainer.report["governor"]["learning rate lowered from step"] == cooldown.begun_at


def test_the_planned_steps_end_in_one_too(tmp_path):
    trainer, rates = run(tmp_path, steps=10, cooldown=0.25, every=1000)
    assert trainer.budgeted_run.cooldown.begun_at == 8
    assert rates[:9] == [1e-3] * 9
    assert rates[9] < 1e-3


def test_observing_lowers_nothing(tmp_path):
    trainer, rates = run(tmp_path, "2 cooldown", steps=6, governor_mode="observe")
    assert rates == [1e-3] * 6
    assert trainer.budgeted_run.cooldown is None


def test_resumed_inside_it(tmp_path):
    scene = trial(tmp_path, "3 cooldown", steps=12, cooldown=1.0)
    whole = scene.whole()
    assert 5 < whole.steps < 12
    assert scene.interrupted(5).differences(whole) == []


# The reserve, on a stub


class StubRun(BudgetedRun):
    """The budget gate of a run, with batches that are their own cost."""

    def __init__(self, budget, share, max_steps):
        self.ranks, self.reserve = Ranks(), StepReserve()
        self.ledger = Ledger(
            Budget(budget), energy=SimpleNamespace(start=lambda: None, kwh=lambda: None), memory=NoPeak()
        )
        self.cooldown = Cooldown(share, max_steps) if share else None
        currency = governing_currency(self.ledger.budget)
        amount = self.ledger.budget.share if currency == "share" else lambda spent: spent.get(currency, 0.0)
        self.supervisor = SimpleNamespace(compute=amount)
        self.model = self.stop = None

    def _tokens(self, batches):
        return {"tokens": float(sum(tokens for _, tokens in batches)), "useful_tokens": 0.0, "loss_tokens": 0.0}

    def step_flops(self, shapes, global_step):
        return float(sum(flops for flops, _ in shapes))


class NoPeak:
    def peak(self):
        return 0

    def start(self):
        return self


def random_case(random):
    """A budget in one currency or two, costs of steps, and of probes and refreshes between them."""
    limits = {"flops": random.uniform(5, 500), "tokens": float(random.randint(5, 500))}
    kept = random.choice([["flops"], ["tokens"], ["flops", "tokens"]])
    costs = [(random.uniform(0.5, 40), random.randint(1, 40)) for _ in range(random.randint(1, 6))]
    extra = [random.choice([0.0, random.uniform(0, 30), random.uniform(0, 300)]) for _ in range(4)]
    share = random.choice([0.0, random.uniform(0.01, 1.5)])
    return {name: limits[name] for name in kept}, costs, extra, share, random.choice([0, random.randint(1, 20)])


@pytest.mark.parametrize("chunk", range(10))
def test_ten_thousand_runs_with_probes_refreshes_and_a_cooldown_pass_no_limit(chunk, monkeypatch):
    monkeypatch.setattr("hf_eff.run.batch_shape", lambda batch, model: batch)
    monkeypatch.setattr("hf_eff.run.logger.warning", lambda *args: None)
    cooled = 0
    for number in range(1000):
        random = Random(1000 * chunk + number)
        limits, costs, extra, share, max_steps = random_case(random)
        run = StubRun(limits, share, max_steps)
        for step in range(max_steps or 25):
            need = {"flops": extra[step % 4], "tokens": float(round(extra[step % 4]))}
            if run.ledger.need_fits(run.with_reserve(need)) is None:  # how probes and refreshes ask
                run.ledger.charge("probe" if step % 2 else "select", **need)
            if not run.admit([costs[step % len(costs)]], step):
                break
            assert 0.0 <= run.rate_factor() <= 1.0
        spent = run.ledger.spent()
        assert all(spent[name] <= limit for name, limit in limits.items())
        if run.cooling:
            cooled += 1
            end = {name: run.cooldown.end * (limits[name] if len(limits) == 2 else 1.0) for name in limits}
            assert all(end[name] <= limits[name] * (1 + 1e-9) for name in limits) or run.cooldown.begun_at == 0
    assert cooled > 100


def test_the_reserve_is_a_share_of_what_will_have_been_spent():
    cooldown = Cooldown(0.25)
    need = cooldown.with_reserve({"flops": 10.0}, {"flops": 90.0, "seconds": 8.0, "bytes": 1e9})
    assert need == {"flops": 35.0, "seconds": 2.0}
    cooldown.begin(3, 100.0)
    assert cooldown.with_reserve({"flops": 10.0}, {"flops": 90.0}) == {"flops": 10.0}
    assert cooldown.end == 125.0
    cooldown.advance(4, 116.0)
    assert cooldown.factor == pytest.approx(1 - math.sqrt(16 / 25))
    cooldown.advance(5, 1e9)
    assert cooldown.factor == 0.0
    assert not cooldown.is_over(125.0)
    assert cooldown.is_over(125.1)


def test_steps_end_it_where_they_are_fewer():
    cooldown = Cooldown(0.25, max_steps=10)
    assert [step for step in range(10) if cooldown.is_due(step)] == [8, 9]
    cooldown.begin(8, 100.0, by_steps=True)
    cooldown.advance(9, 160.0)
    assert cooldown.factor == pytest.approx(1 - math.sqrt(0.5))
    assert not cooldown.is_over(160.0)
    again = Cooldown(0.25, max_steps=10)
    again.load_state_dict(cooldown.state_dict())
    assert (again.begun_at, again.end, again.factor) == (8, 125.0, cooldown.factor)
