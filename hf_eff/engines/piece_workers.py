"""Independent pieces of work on tensors, dealt out to threads that each compute alone.

Splitting every small operation among threads, as torch does, makes them wait for each other thousands of times a step,
and the last bits of a matrix product depend on how it was split. Here each piece is one thread's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache

import torch


def run_pieces(pieces: Iterable[Callable[[], object]], device: torch.device) -> None:
    """Call every piece: on the CPU by as many threads as torch uses, elsewhere in order.

    Args:
        pieces: They write to different memory, and none depends on another. Taken one at a time, a few ahead.
        device: Where they compute.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for piece in pieces:
            piece()
        return
    try:
        _deal_out(pieces, _workers(threads), 2 * threads)
    finally:
        # A worker's own setting is also what threads begin with that start later: put it back.
        torch.set_num_threads(threads)


def _deal_out(pieces: Iterable[Callable[[], object]], workers: Executor, ahead: int) -> None:
    running: deque[Future[object]] = deque()
    try:
        for piece in pieces:
            if len(running) == ahead:
                running.popleft().result()
            running.append(workers.submit(piece))
    finally:
        wait(running)  # after an error, too: none may go on writing
    for each in running:
        each.result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, this thread's torch operations are not split, so that their last bits are always the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=4)
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "hf_eff pieces", initializer=torch.set_num_threads, initargs=(1,))
