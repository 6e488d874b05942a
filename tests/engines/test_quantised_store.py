from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from hf_eff.engines import quantised_store
from hf_eff.engines.datastore import FeatureStore
from hf_eff.engines.quantised_store import STORE_DTYPES, packed_cosines, row_codec
from hf_eff.errors import ManifestError, OptionError
from hf_eff.numerics.quantise import BITS, Quantiser

PACKED = [name for name in STORE_DTYPES if name.startswith("int")]


def vectors(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def opened(folder, rows, width, dtype):
    return FeatureStore.open(folder, rows=rows, width=width, dtype=dtype, header={"rows": "abc"})


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("kept", [True, False])
def test_a_packed_store_gives_back_unit_codes_and_norms(tmp_path, dtype, kept):
    folder, values = (tmp_path / "s" if kept else None), vectors(5, 37) * 10.0 ** torch.arange(-2, 3)[:, None]
    store = opened(folder, 6, 37, dtype)
    store.write(np.array([5, 0, 2, 1, 3]), values)
    if kept:
        store = opened(folder, 6, 37, dtype)
    bits, rule = int(dtype[3]), "absmax" if dtype.endswith("absmax") else "auto"
    codes = Quantiser(bits, rule).codes(torch.nn.functional.normalize(values.double(), dim=1)).float()
    expected = torch.nn.functional.normalize(codes, dim=1)
    assert torch.allclose(store.unit_rows(slice(0, 6))[[5, 0, 2, 1, 3]], expected, atol=1e-6)
    assert np.allclose(store.norms[[5, 0, 2, 1, 3]], values.norm(dim=1), rtol=1e-6)
    assert not store.unit_rows(slice(4, 5)).any()
    queries = vectors(3, 37, seed=1)
    assert torch.allclose(store.products(slice(0, 6), queries), store.unit_rows(slice(0, 6)) @ queries.T, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int1", "int8", "float16"])
def test_rows_that_are_zero_or_not_finite_have_no_vector(dtype):
    store, values = opened(None, 3, 8, dtype), vectors(3, 8)
    values[0], values[1, 2] = 0.0, float("inf")
    store.write(np.arange(3), values)
    assert np.isnan(store.norms[1])
    assert not store.unit_rows(slice(0, 2)).any()
    assert not store.products(slice(0, 2), vectors(2, 8)).any()
    assert store.unit_rows(slice(2, 3)).norm().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_on_disk_are_those_of_the_formula(tmp_path, bits):
    rows, width = 500, 1027
    opened(tmp_path / "s", rows, width, f"int{bits}")
    written = sum(path.stat().st_size for path in (tmp_path / "s").glob("*.bin"))
    formula = rows * math.ceil(width * bits / 8) + 4 * rows
    # One byte more a row says that it is done.
    assert formula <= written <= 1.01 * formula
    assert (tmp_path / "s" / "features.bin").stat().st_size == rows * math.ceil(width * bits / 8)


def test_another_rule_is_another_store(tmp_path):
    opened(tmp_path / "s", 4, 16, "int2")
    with pytest.raises(ManifestError, match='dtype is "int2" there'):
        opened(tmp_path / "s", 4, 16, "int2-absmax")
    # Both have the same files, to the byte.
    assert row_codec("int2", 16).items == row_codec("int2-absmax", 16).items == 4


@pytest.mark.parametrize("bits", BITS)
def test_cosines_from_packed_rows_equal_those_of_unpacked_codes(bits, monkeypatch):
    monkeypatch.setattr(quantised_store, "_TILE_NUMBERS", 7 * 45)
    quantiser = Quantiser(bits)
    codes = quantiser.codes(vectors(50, 45))
    queries = torch.nn.functional.normalize(vectors(4, 45, seed=1), dim=1)
    expected = torch.nn.functional.normalize(codes.float(), dim=1) @ queries.T
    found = packed_cosines(quantiser.pack(codes), quantiser, queries)
    assert np.allclose(found, expected.numpy(), atol=1e-6)
    assert found.dtype == np.float32


def test_signs_give_the_hamming_distance():
    quantiser = Quantiser(1)
    first, second = (quantiser.codes(vectors(20, 64, seed)) for seed in (0, 1))
    hamming = np.unpackbits(quantiser.pack(first)[:, None] ^ quantiser.pack(second)[None], axis=2).sum(axis=2)
    found = packed_cosines(quantiser.pack(first), quantiser, second.float() / 8)
    assert np.allclose(found, 1 - 2 * hamming / 64, atol=1e-6)


def test_memory_is_that_of_a_tile():
    rows, width = 100_000, 1024
    packed = np.random.default_rng(0).integers(0, 256, size=(rows, width // 8), dtype=np.uint8)
    queries = vectors(2, width)
    tracemalloc.start()
    packed_cosines(packed, Quantiser(1), queries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Unpacked, the rows would be 400 MB.
    assert peak < 100e6


def test_unknown_types_are_refused():
    with pytest.raises(OptionError, match=r"one of \['float16', 'float32', 'int8'"):
        row_codec("int3", 8)
