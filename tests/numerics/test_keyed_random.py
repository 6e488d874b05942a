from __future__ import annotations

import torch

from hf_eff.numerics.keyed_random import content_order, make_key, random_words

MASK = 2**64 - 1


def splitmix64(key, count):
    """The published generator, one word at a time, in Python's integers."""
    state, words = key & MASK, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        words.append(z ^ (z >> 31))
    return words


def test_known_answers_of_splitmix64():
    # First outputs for seed 1234567, as in the generator's reference tests.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [word & MASK for word in random_words(torch.tensor([1234567]), 5)[0].tolist()] == known


def test_words_equal_a_scalar_implementation_for_several_streams():
    keys = [0, -1, make_key(3, 1, 4), 2**62]
    words = random_words(torch.tensor(keys), 40)
    for key, row in zip(keys, words.tolist(), strict=True):
        assert [word & MASK for word in row] == splitmix64(key, 40)


def test_a_longer_stream_begins_with_the_shorter_one():
    keys = torch.tensor([5, 6])
    assert torch.equal(random_words(keys, 9)[:, :4], random_words(keys, 4))


def test_many_words_equal_few():
    keys = torch.tensor([5, 0, -6, 0])[::2]
    many = random_words(keys, 2**15 + 1)
    for row, key in zip(many, keys, strict=True):
        assert torch.equal(row, random_words(key[None], 2**15 + 1)[0])


def test_every_bit_is_fair_and_global_state_is_untouched():
    before = torch.random.get_rng_state()
    words = random_words(torch.tensor([make_key(0)]), 20_000)
    ones = ((words[0, :, None] >> torch.arange(64)) & 1).double().mean(dim=0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5
    assert torch.equal(before, torch.random.get_rng_state())


def test_keys_differ_for_different_parts():
    keys = {make_key(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(keys) == 1000
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_content_order_follows_the_rows_and_the_key():
    rows = [f"{value:032x}" for value in range(50)]
    order = [rows[i] for i in content_order(rows, 1)]
    assert sorted(order) == rows
    assert order == [rows[::-1][i] for i in content_order(rows[::-1], 1)]
    assert order != [rows[i] for i in content_order(rows, 2)]
    assert order != rows
