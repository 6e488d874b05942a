"""Pieces on threads: all of them run, errors arrive, and torch's settings stay as they were."""

import threading

import pytest
import torch

from hf_eff.engines.piece_workers import run_pieces

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_piece_runs_on_one_thread_of_torch(threads):
    found = [0] * 7

    def piece(index):
        return lambda: found.__setitem__(index, torch.get_num_threads())

    run_pieces([piece(index) for index in range(7)], CPU)
    assert found == [1] * 7


def test_settings_stay_for_this_thread_and_for_new_ones(threads):
    run_pieces([lambda: None] * 4, CPU)
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (torch.get_num_threads(), seen) == (threads, [threads])


def test_an_error_in_a_piece_arrives(threads):
    def fails():
        raise ValueError("in a piece")

    with pytest.raises(ValueError, match="in a piece"):
        run_pieces([lambda: None, fails], CPU)
    assert torch.get_num_threads() == threads
