import sys
import time
import types

import pytest

from hf_eff.contracts.budget import Budget
from hf_eff.errors import BudgetExceededError, OptionError
from hf_eff.hardware import estimated_power
from hf_eff.hardware.energy import EnergyMeter
from hf_eff.hardware.estimated_power import EstimatedPower
from hf_eff.hardware.ledger import Ledger


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    for name in ("pynvml", "zeus", "zeus.device"):
        monkeypatch.setitem(sys.modules, name, None)


class Accelerators:
    """Stands in for what ``zeus.device.get_gpus`` returns; ``readings`` are millijoules, None for no counter."""

    def __init__(self, readings):
        self.readings = readings

    def __len__(self):
        return len(self.readings)

    def supports_get_total_energy_consumption(self, index):
        return self.readings[index] is not None

    def get_total_energy_consumption(self, index):
        return self.readings[index]


def install_zeus(monkeypatch, get_gpus):
    library = types.ModuleType("zeus.device")
    library.get_gpus = get_gpus
    package = types.ModuleType("zeus")
    package.device = library
    monkeypatch.setitem(sys.modules, "zeus", package)
    monkeypatch.setitem(sys.modules, "zeus.device", library)


def test_zeus_sums_the_accelerators_it_finds(monkeypatch, tmp_path):
    devices = Accelerators([1000, 5000])
    install_zeus(monkeypatch, lambda: devices)
    meter = EnergyMeter(tmp_path)
    assert meter.source == "zeus"
    meter.start()
    devices.readings = [3000, 14000]
    assert meter.kwh() == pytest.approx(11.0 / 3.6e6)


def no_driver():
    raise RuntimeError("NVML and AMDSMI unavailable")


@pytest.mark.parametrize(
    "get_gpus",
    [no_driver, lambda: Accelerators([]), lambda: Accelerators([4, None])],
    ids=["no driver", "no device", "no counter"],
)
def test_zeus_without_a_device_that_counts_falls_through(monkeypatch, tmp_path, get_gpus):
    install_zeus(monkeypatch, get_gpus)
    assert EnergyMeter(tmp_path).source == "unavailable"


def test_a_driver_that_fails_later_gives_no_number(monkeypatch, tmp_path):
    devices = Accelerators([1000])
    install_zeus(monkeypatch, lambda: devices)
    meter = EnergyMeter(tmp_path, estimate=EstimatedPower(100.0))
    meter.start()
    devices.readings = []
    devices.get_total_energy_consumption = no_driver
    devices.readings = [2000]
    monkeypatch.setattr(Accelerators, "get_total_energy_consumption", lambda self, index: no_driver())
    assert meter.kwh() is None
    assert meter.source == "unavailable"  # and not the estimate: half a run measured and half guessed is neither


def cpu_clock(monkeypatch, cores=4, device="cpu"):
    clock = types.SimpleNamespace(busy=10.0, wall=50.0)
    clock.process_time, clock.perf_counter = (lambda: clock.busy), (lambda: clock.wall)
    monkeypatch.setattr(estimated_power, "time", clock)
    monkeypatch.setattr(estimated_power, "usable_cores", lambda: cores)
    monkeypatch.setattr(estimated_power, "device_name", lambda: device)
    return clock


def test_an_estimate_is_power_times_utilisation_times_time(monkeypatch, tmp_path):
    clock = cpu_clock(monkeypatch)
    meter = EnergyMeter(tmp_path, estimate=EstimatedPower(200.0))
    meter.start()
    clock.busy, clock.wall = 18.0, 60.0  # 8 core-seconds in 10 seconds of 4 cores: utilisation 0.2
    assert meter.source == "estimated"
    assert meter.kwh() == pytest.approx(200.0 * 0.2 * 10.0 / 3.6e6)


def test_an_accelerator_is_taken_to_be_busy(monkeypatch, tmp_path):
    clock = cpu_clock(monkeypatch, device="cuda")
    meter = EnergyMeter(tmp_path, estimate=EstimatedPower(200.0))
    meter.start()
    clock.wall += 10.0
    assert meter.kwh() == pytest.approx(2000.0 / 3.6e6)


def test_a_counter_is_better_than_an_estimate(monkeypatch, tmp_path):
    install_zeus(monkeypatch, lambda: Accelerators([1000]))
    assert EnergyMeter(tmp_path, estimate=EstimatedPower(200.0)).source == "zeus"


def test_an_estimate_runs_on_a_real_clock():
    estimate, end = EstimatedPower(50.0), time.process_time() + 0.05
    while time.process_time() < end:
        pass
    assert 0 < estimate.joules() < 50.0 * 5


@pytest.mark.parametrize("watts", [0.0, -5.0, float("nan"), float("inf")])
def test_no_power_is_refused(watts):
    with pytest.raises(OptionError, match="power_watts"):
        EstimatedPower(watts)


# -- in the ledger ---------------------------------------------------------------------------------------------------


class Meter:
    def __init__(self, source, kwh=0.0):
        self.source, self.reading = source, kwh

    def start(self):
        pass

    def kwh(self):
        return self.reading


def ledger_of(budget, meter):
    return Ledger(Budget.parse(budget), energy=meter)


def test_without_a_wattage_there_is_no_estimate(monkeypatch):
    monkeypatch.setattr("hf_eff.hardware.energy._POWERCAP", None)
    monkeypatch.setattr("hf_eff.hardware.energy._rapl_counter", lambda folder: None)
    assert Ledger().energy_source == "unavailable"
    assert "kwh" not in Ledger().spent()
    ledger = Ledger(power_watts=65.0)
    assert ledger.energy_source == "estimated"
    assert ledger.spent()["kwh"] >= 0.0


def test_a_part_that_was_estimated_stays_marked():
    meter = Meter("estimated", 0.5)
    state = ledger_of(None, meter).state_dict()
    resumed = ledger_of(None, Meter("rapl", 0.25))
    assert resumed.energy_source == "rapl"
    resumed.load_state_dict(state)
    assert resumed.energy_source == "estimated"
    assert resumed.spent()["kwh"] == 0.75
    assert ledger_of(None, Meter("nvml")).energy_source == "nvml"


def test_energy_that_can_no_longer_be_read_counts_as_spent():
    meter = Meter("rapl", 0.1)
    ledger = ledger_of("0.5kWh, 1e9flop", meter)
    assert ledger.need_fits({"flops": 1.0, "kwh": 0.1}) is None
    meter.reading, meter.source = None, "unavailable"
    assert ledger.need_fits({"flops": 1.0}) == "kwh"
    with pytest.raises(BudgetExceededError, match="work needs"):
        ledger.require({"flops": 1.0}, "work")
    assert ledger.energy_source == "unavailable"


@pytest.mark.parametrize(("joules", "expected"), [(1e6, "tokens"), (2e6, "kwh")])
def test_the_scarcer_of_two_currencies_binds(joules, expected):
    ledger = ledger_of("3e6J, 100tok, 1000GiB", Meter("rapl", joules / 3.6e6))
    ledger.charge("train", tokens=50)
    assert ledger.binding() == expected
    shares = ledger.shares()
    assert shares["kwh"] == pytest.approx(joules / 3e6)
    assert shares["tokens"] == 0.5
    assert 0 < shares["bytes"] < 1
    assert ledger.share() == pytest.approx(max(shares["kwh"], 0.5))


def test_no_limit_binds_nothing():
    assert ledger_of(None, Meter("rapl")).binding() is None
    assert ledger_of("8GiB", Meter("rapl")).binding() is None
