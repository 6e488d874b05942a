"""Energy from hardware counters: NVIDIA's management library, the package ``zeus``, or Intel's RAPL files.

Without a counter there is no number, unless the caller brings an estimate, which is then marked as one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

UNAVAILABLE, ESTIMATED = "unavailable", "estimated"
_JOULES_PER_KWH = 3.6e6
_POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")  # whole packages; "intel-rapl:0:1" is a part of one


class EnergyCounter(Protocol):
    """A counter of energy that only grows."""

    def joules(self) -> float:
        """Energy since the counter was made."""
        ...


class EnergyMeter:
    """Energy that the devices of a run have used, in kWh.

    Attributes:
        source: ``"nvml"`` or ``"zeus"`` (the accelerators this process may see), ``"rapl"`` (the CPU packages, all
            processes included), ``"estimated"`` or ``"unavailable"``.
    """

    def __init__(self, powercap: Path = _POWERCAP, *, estimate: EnergyCounter | None = None) -> None:
        """Find a counter.

        Args:
            powercap: Folder with the kernel's ``intel-rapl:N`` entries.
            estimate: What to read where there is no counter, such as an ``EstimatedPower``; None for nothing.
        """
        self.source = UNAVAILABLE
        self._counter: EnergyCounter | None = None
        self._start: float | None = None
        sources: tuple[tuple[str, Callable[[], EnergyCounter | None]], ...] = (
            ("nvml", _nvml_counter),
            ("zeus", _zeus_counter),
            ("rapl", lambda: _rapl_counter(powercap)),
            (ESTIMATED, lambda: estimate),
        )
        for name, find in sources:
            counter = find()
            if counter is not None:
                self.source, self._counter = name, counter
                break

    def start(self) -> None:
        """Count from here."""
        self._start = self._read()

    def kwh(self) -> float | None:
        """Energy since ``start``; None without a counter, before ``start``, or when the counter stopped answering.

        RAPL counters overflow after some tens of minutes under load: call at least that often.
        """
        now = self._read()
        if now is None or self._start is None:
            return None
        return (now - self._start) / _JOULES_PER_KWH

    def _read(self) -> float | None:
        if self._counter is None:
            return None
        try:
            return self._counter.joules()
        except Exception:  # noqa: BLE001 - drivers fail in their own ways, and a meter must not end a run
            self.source, self._counter = UNAVAILABLE, None
            return None


class _Rapl:
    """Sum of the CPU packages' counters, overflow undone."""

    def __init__(self, folders: list[Path]) -> None:
        self._ranges = {folder: int((folder / "max_energy_range_uj").read_text()) for folder in folders}
        self._last = {folder: self._microjoules(folder) for folder in folders}
        self._total = 0

    @staticmethod
    def _microjoules(folder: Path) -> int:
        return int((folder / "energy_uj").read_text())

    def joules(self) -> float:
        """Energy since the counter was made."""
        for folder, last in self._last.items():
            now = self._microjoules(folder)
            self._total += now - last if now >= last else now - last + self._ranges[folder]
            self._last[folder] = now
        return self._total / 1e6


def _rapl_counter(powercap: Path) -> EnergyCounter | None:
    """Counter over all CPU packages; None where the kernel has none or only root may read it."""
    try:
        folders = [folder for folder in sorted(powercap.iterdir()) if _PACKAGE.fullmatch(folder.name)]
        packages = [folder for folder in folders if not (folder / "name").read_text().startswith("psys")]
        return _Rapl(packages) if packages else None
    except (OSError, ValueError):
        return None


class _Nvml:
    """Sum of the total-energy counters of NVIDIA devices (Volta and later)."""

    def __init__(self, library: object, handles: list[object]) -> None:
        self._millijoules: Callable[[object], int] = library.nvmlDeviceGetTotalEnergyConsumption  # type: ignore[attr-defined]
        self._handles = handles
        self._start = self._read()

    def _read(self) -> int:
        return sum(self._millijoules(handle) for handle in self._handles)

    def joules(self) -> float:
        """Energy since the counter was made."""
        return (self._read() - self._start) / 1e3


def _nvml_counter() -> EnergyCounter | None:
    """Counter over the visible NVIDIA devices; None without the package, a driver or a device that counts."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = _visible_handles(pynvml)
        return _Nvml(pynvml, handles) if handles else None
    except (pynvml.NVMLError, OSError, ValueError):
        return None


class _Zeus:
    """Sum of the total-energy counters of the accelerators that ``zeus`` finds: NVIDIA's and AMD's."""

    def __init__(self, devices: Any) -> None:
        self._devices = devices
        self._start = self._read()

    def _read(self) -> int:
        return sum(self._devices.get_total_energy_consumption(index) for index in range(len(self._devices)))

    def joules(self) -> float:
        """Energy since the counter was made."""
        return (self._read() - self._start) / 1e3


def _zeus_counter() -> EnergyCounter | None:
    """Counter over the visible accelerators; None without ``zeus``, a driver or a device that counts.

    CPUs are read from RAPL directly: ``zeus`` would start a process of its own for them.
    """
    try:
        from zeus.device import get_gpus
    except ImportError:
        return None
    try:
        devices = get_gpus()
        counts = [devices.supports_get_total_energy_consumption(index) for index in range(len(devices))]
        return _Zeus(devices) if counts and all(counts) else None
    except Exception:  # noqa: BLE001 - each maker's library fails in its own way, and no counter is no error
        return None


def _visible_handles(pynvml: object) -> list[object]:
    """Handles of the devices in ``CUDA_VISIBLE_DEVICES`` (indices or UUIDs); of all devices without it."""
    by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID  # type: ignore[attr-defined]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [by_index(index) for index in range(pynvml.nvmlDeviceGetCount())]  # type: ignore[attr-defined]
    names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [by_index(int(name)) if name.isdigit() else by_uuid(name) for name in names]
