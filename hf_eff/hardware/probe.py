"""What the machine has: devices, memory now and at its peak, a cap on memory.

The only place that asks ``torch.cuda`` and the operating system; everything also answers on a CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import weakref
from pathlib import Path

import psutil
import torch

from hf_eff.contracts.cost import HardwareFacts
from hf_eff.errors import OptionError

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.01


def device_name() -> str:
    """Type of the device a run uses: ``"cuda"``, another accelerator's name, or ``"cpu"``."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def hardware_facts(world_size: int = 1, backend: str = "none") -> HardwareFacts:
    """Devices, memory and cores of this machine.

    Args:
        world_size: Processes of the run.
        backend: How they share the model: ``"none"``, ``"ddp"``, ``"fsdp2"``, ``"fsdp1"`` or ``"deepspeed"``.

    Returns:
        Facts without ``flops_per_second``: a rate is measured on the run itself or left unknown.
    """
    from hf_eff.hardware.energy import EnergyMeter

    device = device_name()
    free, total = _device_memory(device)
    return HardwareFacts(
        device=device,
        total_bytes=total,
        free_bytes=free,
        cores=usable_cores(),
        world_size=world_size,
        backend=backend,
        energy_source=EnergyMeter().source,
    )


def usable_cores() -> int:
    """CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def current_bytes() -> int:
    """Memory in use now: allocated on the accelerator, or resident in this process on a CPU."""
    if device_name() == "cuda":
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def release_unused() -> None:
    """Give freed memory back, so that the next reading shows what is in use."""
    if device_name() == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; musl has none
        if trim is not None:
            trim(0)


class PeakMemory:
    """Highest memory in use since ``start``: allocated on the accelerator, or resident on a CPU.

    The system keeps one high-water mark for the process. Every open window reads it before any window resets it, so
    windows may overlap and nest. Where the mark cannot be reset a thread samples instead and may miss short peaks.
    """

    def __init__(self) -> None:
        self._highest = 0

    def start(self) -> PeakMemory:
        """Open the window, or begin it anew."""
        _note(_high_water_mark())
        if _mark_resets():
            _reset_high_water_mark()
        self._highest = current_bytes()
        _open_windows.add(self)
        if not _mark_resets():
            _start_sampling()
        return self

    def peak(self) -> int:
        """Bytes at the highest point so far; 0 before ``start``."""
        if self in _open_windows:
            _note(_high_water_mark())
        return self._highest

    def raise_to(self, peak_bytes: int) -> None:
        """Count an earlier peak in, such as that of the part of a run before a resume."""
        self._highest = max(self._highest, peak_bytes)

    def stop(self) -> None:
        """Close the window; ``peak`` keeps its value."""
        self.peak()
        _open_windows.discard(self)


def set_memory_cap(limit_bytes: float | None) -> None:
    """Make allocations beyond a limit fail, as if the device were that small; None lifts the cap.

    On an accelerator the limit is for this process's allocator. On Linux without one it is for the resident memory
    of the process: the operating system then refuses new private memory, and torch raises its out-of-memory error.

    Raises:
        OptionError: The process already holds more than the limit, or the system has no such cap.
    """
    if device_name() == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if limit_bytes is None else min(1.0, limit_bytes / total))
        return
    if sys.platform != "linux":
        raise OptionError("A memory cap needs Linux or a CUDA device; leave the byte limit out of the budget.")
    _cap_process(limit_bytes)


def _cap_process(limit_bytes: float | None) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if limit_bytes is None:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        return
    resident = psutil.Process().memory_info().rss
    if resident >= limit_bytes:
        raise OptionError(f"A cap of {limit_bytes:.0f} bytes is below the {resident} bytes this process already holds.")
    # The limit is on reserved private memory, part of which is not resident: allow growth, not a total.
    reserved = _status_bytes("VmData") or resident
    resource.setrlimit(resource.RLIMIT_DATA, (int(reserved + limit_bytes - resident), hard))


def _device_memory(device: str) -> tuple[int, int]:
    """Free and total bytes of the device."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free, total
    memory = psutil.virtual_memory()
    total = min(memory.total, _container_limit() or memory.total)
    return min(memory.available, total), total


def _container_limit() -> int | None:
    """Memory limit of the control group, which ``psutil`` does not see; None without one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


# -- the high-water mark --------------------------------------------------------------------------------------------

_open_windows: weakref.WeakSet[PeakMemory] = weakref.WeakSet()
_sampler: list[threading.Thread] = []


def _note(amount: int) -> None:
    for window in list(_open_windows):
        window.raise_to(amount)


@functools.cache
def _mark_resets() -> bool:
    """Whether the high-water mark can be set back to the memory in use."""
    if device_name() == "cuda":
        return True
    try:
        _reset_high_water_mark()
    except OSError:
        return False
    return _status_bytes("VmHWM") > 0


def _high_water_mark() -> int:
    if device_name() == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM") if _mark_resets() else current_bytes()


def _reset_high_water_mark() -> None:
    if device_name() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _CLEAR_REFS.write_text("5", encoding="ascii")  # 5: set VmHWM to the resident size


def _status_bytes(field: str) -> int:
    """A size from the kernel's description of this process; 0 where there is none."""
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith(f"{field}:")), "")
    return int(line.split()[1]) * 1024 if line else 0


def _start_sampling() -> None:
    """Read resident memory in a thread until the last window closes."""
    if any(thread.is_alive() for thread in _sampler):
        return

    def sample() -> None:
        pause = threading.Event()
        while len(_open_windows):
            _note(current_bytes())
            pause.wait(_SAMPLE_SECONDS)

    _sampler[:] = [threading.Thread(target=sample, name="hf_eff-peak-memory", daemon=True)]
    _sampler[0].start()
