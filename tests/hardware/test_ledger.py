import contextlib
import json
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.contracts.budget import Budget
from hf_eff.errors import BudgetExceededError, CheckpointError, OptionError
from hf_eff.hardware import ledger as ledger_module
from hf_eff.hardware.energy import EnergyMeter
from hf_eff.hardware.ledger import PURPOSES, Ledger


class Clock:
    """Stands in for ``time``; a test moves it."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Meter:
    """Energy meter that a test sets; ``kwh`` counts from the last ``start``."""

    source = "rapl"

    def __init__(self, reading=0.0):
        self.reading, self._start = reading, None

    def start(self):
        self._start = self.reading

    def kwh(self):
        return None if self.reading is None else self.reading - self._start


class NoMeter:
    source = "unavailable"

    def start(self):
        pass

    def kwh(self):
        return None


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(ledger_module, "time", clock)
    return clock


def ledger_of(budget=None, price=None, energy=None):
    return Ledger(Budget.parse(budget), price, energy=energy or NoMeter())


def test_charges_add_up_by_purpose_and_in_total():
    ledger = ledger_of()
    ledger.charge("train", flops=10, tokens=8, useful_tokens=6, loss_tokens=3, steps=1)
    ledger.charge("train", flops=5)
    ledger.charge("probe", flops=2, tokens=4)
    spent, by_purpose = ledger.spent(), ledger.by_purpose()
    assert (spent["flops"], spent["tokens"], spent["steps"], spent["seconds"]) == (17, 12, 1, 0)
    assert by_purpose["train"] == {
        "flops": 15,
        "tokens": 8,
        "useful_tokens": 6,
        "loss_tokens": 3,
        "steps": 1,
        "seconds": 0,
    }
    assert by_purpose["probe"]["tokens"] == 4
    assert set(by_purpose) == set(PURPOSES)
    assert spent["bytes"] > 0
    assert "kwh" not in spent
    assert "usd" not in spent


def test_impossible_charges_are_refused():
    ledger = ledger_of()
    for charge in ({"flops": -1.0}, {"tokens": float("nan")}, {"steps": float("inf")}):
        with pytest.raises(OptionError, match="not possible"):
            ledger.charge("train", **charge)
    with pytest.raises(OptionError, match="'fun' does not exist"):
        ledger.charge("fun", flops=1)
    with pytest.raises(OptionError, match="'fun' does not exist"), ledger.clock("fun"):
        pass


def test_an_inner_clock_takes_its_time_from_the_outer(clock):
    ledger = ledger_of()
    with ledger.clock("train"):
        clock.now += 3
        with ledger.clock("probe"):
            clock.now += 5
            with ledger.clock("probe"):
                clock.now += 7
        assert ledger.spent()["seconds"] == 15
        clock.now += 11
    clock.now += 1000
    by_purpose = ledger.by_purpose()
    assert by_purpose["train"]["seconds"] == 14
    assert by_purpose["probe"]["seconds"] == 12
    assert ledger.spent()["seconds"] == 26


def test_a_clock_runs_while_it_is_read_and_ends_with_an_error(clock):
    ledger = ledger_of("10s")
    with contextlib.suppress(KeyError), ledger.clock("train"):
        clock.now += 4
        assert ledger.spent()["seconds"] == 4
        assert ledger.share() == 0.4
        clock.now += 1
        raise KeyError
    clock.now += 50
    assert ledger.spent()["seconds"] == 5


def test_money_is_time_at_a_price(clock):
    ledger = ledger_of("4usd", price=2.0)
    with ledger.clock("train"):
        clock.now += 3600
    assert ledger.spent()["usd"] == 2.0
    assert ledger.share() == 0.5
    assert ledger.need_fits({"seconds": 3600}) is None
    assert ledger.need_fits({"seconds": 3601}) == "usd"


def test_energy_is_reported_only_where_it_is_measured():
    meter = Meter(7.0)
    ledger = ledger_of("1kWh", energy=meter)
    meter.reading = 7.25
    assert ledger.spent()["kwh"] == 0.25
    meter.reading = None
    assert "kwh" not in ledger.spent()
    assert ledger.share() == 0.0


def test_need_names_the_limit_it_would_pass():
    ledger = ledger_of("100flop, 10tok")
    ledger.charge("select", flops=60, tokens=4)
    assert ledger.need_fits({"flops": 40, "tokens": 6}) is None
    assert ledger.need_fits({"flops": 41}) == "flops"
    assert ledger.need_fits({"flops": 1, "tokens": 7}) == "tokens"
    assert ledger.need_fits({"bytes": 1e18, "seconds": 1e18}) is None
    assert ledger_of().need_fits({"flops": 1e30}) is None


def test_bytes_are_a_peak_not_a_sum():
    held = ledger_of().spent()["bytes"]
    ledger = ledger_of(f"{held * 2:.0f}B")
    assert ledger.need_fits({"bytes": held}) is None
    assert ledger.need_fits({"bytes": held * 3}) == "bytes"


def test_require_spends_nothing_and_says_what_is_missing():
    ledger = ledger_of("100flop")
    ledger.charge("train", flops=90)
    ledger.require({"flops": 10}, "step 1")
    with pytest.raises(
        BudgetExceededError, match=r"step 1 needs 11 FLOP, but 90 FLOP of the budget's 100 FLOP is spent"
    ):
        ledger.require({"flops": 11}, "step 1")
    assert ledger.spent()["flops"] == 90


AMOUNTS = st.floats(0, 1e18, allow_nan=False)
SHARES = st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.500001, 1.0, 1.000001]) | st.floats(0, 1.5)


@given(
    limits=st.fixed_dictionaries(
        {"flops": st.floats(1e-3, 1e19), "tokens": st.floats(1, 1e7), "steps": st.integers(1, 20)}
    ),
    needs=st.lists(st.tuples(st.sampled_from(PURPOSES), SHARES, SHARES, st.integers(0, 3)), min_size=1, max_size=40),
    resume_at=st.integers(0, 40),
)
def test_a_gated_limit_is_never_passed(limits, needs, resume_at):
    ledger = Ledger(Budget(limits), energy=NoMeter())
    for index, (purpose, flops, tokens, steps) in enumerate(needs):
        if index == resume_at:
            state = json.loads(json.dumps(ledger.state_dict()))
            ledger = Ledger(Budget(limits), energy=NoMeter())
            ledger.load_state_dict(state)
        need = {"flops": flops * limits["flops"], "tokens": tokens * limits["tokens"], "steps": steps}
        try:
            ledger.require(need, "work")
        except BudgetExceededError:
            assert any(ledger.spent()[name] + need[name] > limits[name] for name in limits)
            continue
        ledger.charge(purpose, **need)
        spent = ledger.spent()
        assert all(spent[name] <= limits[name] for name in limits)


@given(st.lists(st.tuples(st.sampled_from(PURPOSES), AMOUNTS, AMOUNTS), max_size=20))
def test_a_resume_is_exact(charges):
    ledger = ledger_of()
    for purpose, flops, tokens in charges:
        ledger.charge(purpose, flops=flops, tokens=tokens)
    state = json.loads(json.dumps(ledger.state_dict()))
    resumed = ledger_of()
    resumed.charge("eval", flops=1)  # what a process spends before it loads is replaced
    resumed.load_state_dict(state)
    assert resumed.by_purpose() == ledger.by_purpose()
    assert {**resumed.spent(), "bytes": 0} == {**ledger.spent(), "bytes": 0}
    assert resumed.spent()["bytes"] >= state["peak_bytes"]


def test_a_resume_continues_time_money_and_energy(clock):
    meter = Meter(1.0)
    first = ledger_of(price=1.0, energy=meter)
    with first.clock("train"):
        clock.now += 3600
        meter.reading = 1.5
        state = json.loads(json.dumps(first.state_dict()))
    clock.now = 5.0  # another machine's clock starts elsewhere
    meter = Meter(40.0)
    second = ledger_of(price=3.0, energy=meter)
    with second.clock("train"):
        clock.now += 10
        second.load_state_dict(state)
        clock.now += 1800
        meter.reading = 40.25
        spent = second.spent()
    assert spent["seconds"] == 5400
    assert spent["usd"] == 1.0 + 1.5
    assert spent["kwh"] == 0.75


def test_energy_of_a_part_is_not_the_energy_of_the_run():
    unmeasured = ledger_of().state_dict()
    assert unmeasured["kwh"] is None
    resumed = ledger_of(energy=Meter(2.0))
    resumed.load_state_dict(unmeasured)
    assert "kwh" not in resumed.spent()


def test_an_incomplete_state_is_refused():
    state = ledger_of().state_dict()
    del state["counts"]["probe"]["flops"]
    with pytest.raises(CheckpointError, match="incomplete"):
        ledger_of().load_state_dict(state)


# -- energy ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_gpu_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def powercap(folder, **domains):
    for name, (label, energy, limit) in domains.items():
        domain = folder / name.replace("_", ":")
        domain.mkdir(parents=True)
        (domain / "name").write_text(f"{label}\n")
        (domain / "energy_uj").write_text(f"{energy}\n")
        (domain / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder


def test_rapl_sums_packages_and_survives_overflow(tmp_path):
    root = powercap(
        tmp_path,
        **{
            "intel-rapl_0": ("package-0", 1_000_000, 10_000_000),
            "intel-rapl_1": ("package-1", 9_000_000, 10_000_000),
            "intel-rapl_0_0": ("core", 0, 10_000_000),
            "intel-rapl_2": ("psys", 0, 10_000_000),
        },
    )
    (tmp_path / "intel-rapl").mkdir()
    meter = EnergyMeter(root)
    assert meter.source == "rapl"
    assert meter.kwh() is None  # not started
    meter.start()
    (root / "intel-rapl:0" / "energy_uj").write_text("4000000\n")
    (root / "intel-rapl:0:0" / "energy_uj").write_text("9000000\n")
    (root / "intel-rapl:2" / "energy_uj").write_text("9000000\n")
    assert meter.kwh() == pytest.approx(3.0 / 3.6e6)
    (root / "intel-rapl:1" / "energy_uj").write_text("500000\n")
    assert meter.kwh() == pytest.approx((3.0 + 1.5) / 3.6e6)
    meter.start()
    assert meter.kwh() == 0.0


def test_no_counter_means_unavailable(tmp_path):
    for root in (tmp_path / "absent", tmp_path):
        meter = EnergyMeter(root)
        meter.start()
        assert (meter.source, meter.kwh()) == ("unavailable", None)


def test_a_counter_that_fails_later_is_given_up(tmp_path):
    root = powercap(tmp_path, **{"intel-rapl_0": ("package-0", 1, 100)})
    meter = EnergyMeter(root)
    meter.start()
    (root / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.kwh() is None
    assert meter.source == "unavailable"


def fake_nvml(readings):
    library = types.ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetCount = lambda: len(readings)
    library.nvmlDeviceGetHandleByIndex = lambda index: index
    library.nvmlDeviceGetHandleByUUID = lambda name: {"GPU-b": 1}[name]
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: readings[handle]
    return library


@pytest.mark.parametrize(("visible", "joules"), [(None, 11.0), ("1", 9.0), ("GPU-b", 9.0), ("0,1", 11.0)])
def test_nvml_counts_visible_devices(monkeypatch, tmp_path, visible, joules):
    readings = [1000, 5000]
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(readings))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = EnergyMeter(tmp_path)
    assert meter.source == "nvml"
    meter.start()
    readings[:] = [3000, 14000]
    assert meter.kwh() == pytest.approx(joules / 3.6e6)


def test_no_driver_or_no_visible_device_falls_through(monkeypatch, tmp_path):
    library = fake_nvml([1])
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert EnergyMeter(tmp_path).source == "unavailable"

    def fail():
        raise library.NVMLError

    library.nvmlInit = fail
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert EnergyMeter(tmp_path).source == "unavailable"
