from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_eff.contracts.selection import Pool
from hf_eff.engines.datastore import (
    FeatureStore,
    check_header,
    model_fingerprint,
    pool_fingerprint,
    tensors_fingerprint,
)
from hf_eff.errors import ManifestError
from hf_eff.testing.tiny import tiny_model

HEADER = {"rows": "abc", "parameters": {"a.weight": [2, 3]}, "projector": "p0"}


def opened(folder, count=6, width=4, dtype="float16", **changes):
    return FeatureStore.open(folder, rows=count, width=width, dtype=dtype, header={**HEADER, **changes})


def vectors(rows, width=4, scale=1.0, seed=0):
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_written_is_read_back(tmp_path, dtype, kept):
    folder = tmp_path / "store" if kept else None
    store, values = opened(folder, dtype=dtype), vectors(3, scale=1e-9)
    store.write(np.array([5, 0, 2]), values)
    if kept:
        store = opened(folder, dtype=dtype)
    assert store.done.tolist() == [True, False, True, False, False, True]
    unit = torch.nn.functional.normalize(values, dim=1, eps=0)
    assert torch.allclose(store.unit_rows(slice(0, 6))[[5, 0, 2]], unit, atol=1e-3 if dtype == "float16" else 1e-7)
    assert np.allclose(store.norms[[5, 0, 2]], values.norm(dim=1), rtol=1e-6)
    assert not store.unit_rows(slice(3, 5)).any()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_half_precision_keeps_directions_at_any_scale(scale):
    store, values = opened(None, 50, width=64), vectors(50, 64, scale)
    store.write(np.arange(50), values)
    exact, found = values.double(), store.unit_rows(slice(None)).double()
    cosine = (exact * found).sum(dim=1) / exact.norm(dim=1) / found.norm(dim=1)
    assert (1 - cosine).max() < 1e-6


def test_a_vector_that_is_not_finite_or_zero_is_marked():
    store, values = opened(None, 3), vectors(3)
    values[0, 1], values[1] = float("nan"), 0.0
    store.write(np.arange(3), values)
    assert np.isnan(store.norms[0])
    assert store.norms[1] == 0
    assert store.done.all()
    assert torch.isfinite(store.unit_rows(slice(None))).all()
    assert not store.unit_rows(slice(0, 2)).any()


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("rows", {"rows": "abd"}),
        ("parameters", {"parameters": {"a.weight": [3, 2]}}),
        ("projector", {"projector": "p1"}),
        ("num_rows", {"count": 7}),
        ("reduction", {"reduction": "sum"}),
    ],
)
def test_another_header_is_refused_by_the_name_of_its_key(tmp_path, key, changes):
    opened(tmp_path / "store")
    with pytest.raises(ManifestError, match=f"another selection: {key} is"):
        opened(tmp_path / "store", **changes)


def test_dtype_and_width_are_part_of_the_header(tmp_path):
    opened(tmp_path / "store")
    with pytest.raises(ManifestError, match='dtype is "float16" there and "float32" now'):
        opened(tmp_path / "store", dtype="float32")
    with pytest.raises(ManifestError, match="width is 4 there and 5 now"):
        opened(tmp_path / "store", width=5)


def test_a_cut_file_and_a_damaged_header_are_refused(tmp_path):
    opened(tmp_path / "store")
    features = tmp_path / "store" / "features.bin"
    features.write_bytes(features.read_bytes()[:-1])
    with pytest.raises(ManifestError, match="has 47 bytes instead of 48"):
        opened(tmp_path / "store")
    (tmp_path / "store" / "header.json").write_text('{"rows": ')
    with pytest.raises(ManifestError, match="is damaged"):
        opened(tmp_path / "store")


def test_a_folder_whose_header_was_never_written_starts_afresh(tmp_path):
    store = opened(tmp_path / "store")
    store.write(np.array([0]), vectors(1))
    (tmp_path / "store" / "header.json").unlink()
    assert not opened(tmp_path / "store", projector="p1").done.any()


def test_the_row_is_on_disk_before_its_flag(tmp_path, monkeypatch):
    """Whatever instant the machine stops at, a row that is flagged is complete."""
    store, seen = opened(tmp_path / "store"), []
    flush = np.memmap.flush

    def spying(array):
        flush(array)
        flags = np.fromfile(tmp_path / "store" / "done.bin", "uint8")
        seen.append((array.filename.stem, int(flags.sum())))

    monkeypatch.setattr(np.memmap, "flush", spying)
    store.write(np.array([1, 4]), vectors(2))
    assert seen == [("features", 0), ("norms", 0), ("done", 2)]


def test_finished_rows_survive_a_kill(tmp_path):
    program = f"""
import os, signal, numpy as np, torch
from pathlib import Path
from hf_eff.engines.datastore import FeatureStore
store = FeatureStore.open(Path({str(tmp_path / "store")!r}), rows=6, width=4, dtype="float16", header={HEADER!r})
store.write(np.array([3, 1]), torch.ones(2, 4))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == -9
    store = opened(tmp_path / "store")
    assert np.flatnonzero(store.done).tolist() == [1, 3]
    assert np.allclose(store.unit_rows(slice(None))[[1, 3]], 0.5)


def test_no_pickle_is_written_or_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    opened(tmp_path / "store").write(np.array([0]), vectors(1))
    for path in (tmp_path / "store").iterdir():
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError)):
            pickle.loads(path.read_bytes())
    (tmp_path / "store" / "header.json").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises((ManifestError, UnicodeDecodeError)):
        opened(tmp_path / "store")


def test_header_of_an_empty_folder(tmp_path):
    assert not check_header(tmp_path / "none", HEADER)
    (tmp_path / "header.json").write_text(json.dumps({**HEADER, "parameters": {"a.weight": [2, 3]}}))
    assert check_header(tmp_path, {**HEADER, "parameters": {"a.weight": (2, 3)}})


def test_fingerprint_of_a_model_follows_its_values():
    base = model_fingerprint(tiny_model())
    assert base == model_fingerprint(tiny_model())
    assert base != model_fingerprint(tiny_model(seed=1))
    assert base != model_fingerprint(tiny_model().to(torch.bfloat16))
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.0001)
    assert base != model_fingerprint(model)


def test_fingerprint_of_tensors_sees_every_byte():
    tensors = {"a": torch.zeros(9000), "b": torch.ones(2, dtype=torch.bfloat16)}
    base = tensors_fingerprint(tensors)
    assert base == tensors_fingerprint(dict(reversed(tensors.items())))
    tensors["a"][7777] = 1e-30
    assert base != tensors_fingerprint(tensors)


def pool(rows):
    count = len(rows)
    return Pool(
        rows=rows,
        index=np.arange(count),
        lengths=np.array([len(row["input_ids"]) for row in rows]),
        loss_lengths=np.ones(count, dtype=np.int64),
        row_hash=["ab" * 16] * count,
    )


def test_fingerprint_of_a_pool_sees_tokenisation_and_order():
    rows = [{"input_ids": [i, i + 1], "labels": [i, i + 1]} for i in range(5)]
    base = pool_fingerprint(pool(rows))
    assert base == pool_fingerprint(pool([dict(row) for row in rows]))
    assert base != pool_fingerprint(pool(rows[::-1]))
    assert base != pool_fingerprint(pool([*rows[:4], {"input_ids": [4, 5], "labels": [-100, 5]}]))
    assert base != pool_fingerprint(pool([*rows[:4], {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]))
