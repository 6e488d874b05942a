import gc
import subprocess
import sys
import weakref

import pytest
import torch

from hf_eff.engines.out_of_memory import can_hold, forget, is_out_of_memory

FAR_TOO_MUCH = 1 << 60


def test_the_cpu_allocator_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)
    assert type(caught.value) is RuntimeError  # torch names no type of its own here
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_only_memory_counts(error, expected):
    assert is_out_of_memory(error) is expected


def fails_holding(kept):
    held = torch.ones(1000, requires_grad=True)
    graph = (held * 2).exp()
    kept.append(weakref.ref(graph))
    raise MemoryError("no room")


def caught_error(kept):
    try:
        try:
            fails_holding(kept)
        except MemoryError as error:
            raise RuntimeError("not enough memory") from error
    except RuntimeError as error:
        return error


def test_forgetting_frees_what_the_frames_hold():
    kept = []
    error = caught_error(kept)
    gc.collect()
    assert kept[0]() is not None
    forget(error)
    assert kept[0]() is None
    assert str(error) == "not enough memory"


def test_what_can_never_be_held():
    assert can_hold([1024, 2048], torch.device("cpu"))
    assert not can_hold([1024, FAR_TOO_MUCH], torch.device("cpu"))


CAPPED = """
import torch
from hf_eff.engines.out_of_memory import can_hold
from hf_eff.hardware.probe import current_bytes, set_memory_cap
MIB = 2**20
cpu = torch.device("cpu")
before = current_bytes()
set_memory_cap(before + 300 * MIB)
assert can_hold([100 * MIB, 100 * MIB], cpu)
assert not can_hold([100 * MIB] * 4, cpu)
assert can_hold([100 * MIB, 100 * MIB], cpu), "what was reserved was not given back"
assert current_bytes() < before + 50 * MIB, "what was only looked at was written"
"""


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="the cap of a CPU process, on Linux")
def test_looking_under_a_cap():
    done = subprocess.run([sys.executable, "-c", CAPPED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
