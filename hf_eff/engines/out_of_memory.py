"""Memory that ran out: how it shows, how to let go of what the failed attempt held, and how to look before a leap."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

import torch

from hf_eff.hardware.probe import release_unused

# torch has an error type for accelerators only. On a CPU the allocator, oneDNN and C++ each use their own words.
_CPU_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "could not create a memory object",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_WORDS)


def forget(error: BaseException | None) -> None:
    """Let go of every tensor that an error's frames hold, and give the memory back.

    The frames of a failed forward hold its whole graph for as long as the error lives.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    release_unused()


def can_hold(sizes: Iterable[int], device: torch.device) -> bool:
    """Whether tensors of these many bytes fit beside what is held now. They are reserved, not written, and given back.

    On a CPU without a cap the system promises memory it may not have, so that the answer is always yes.
    """
    held: list[torch.Tensor] = []
    try:
        held.extend(torch.empty(size, dtype=torch.uint8, device=device) for size in sizes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        held.clear()
        release_unused()
    return True
