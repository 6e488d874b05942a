"""Feature vectors of a pool on disk, filled row by row, that survive a kill and refuse strangers.

A store is a folder of four files, none of them a pickle: ``features.bin`` [N, P] of unit vectors, as
floats or packed in a few bits a number, ``norms.bin`` [N] float32, ``done.bin`` [N] one byte a row,
and ``header.json``, which says what the numbers depend on. Vectors are stored at length one beside their
norm, so that half precision neither overflows nor underflows whatever the scale of the gradients.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_eff.contracts.selection import Pool
from hf_eff.engines.quantised_store import RowCodec, row_codec
from hf_eff.errors import ManifestError
from hf_eff.files import write_json
from hf_eff.numerics.row_hash import row_hashes

# N rows of the pool, D numbers a row, B rows of a batch

FORMAT = "hf_eff.features/1"
_HEADER = "header.json"
_SAMPLE = 4096
"""Entries of each parameter that the fingerprint of a model looks at."""
_SAMPLED_ROWS = 64


class FeatureStore:
    """Unit feature vectors and norms of N rows, in a folder or in memory."""

    def __init__(self, features: np.ndarray, norms: np.ndarray, done: np.ndarray, codec: RowCodec) -> None:
        self._features = features
        self._norms = norms
        self._done = done
        self._codec = codec

    @classmethod
    def open(cls, folder: Path | None, *, rows: int, width: int, dtype: str, header: Mapping[str, Any]) -> FeatureStore:
        """Open a store, or start it where there is none.

        Args:
            folder: Its folder; None keeps it in memory.
            rows: N, at least 1.
            width: D, at least 1.
            dtype: One of ``STORE_DTYPES``: ``"float16"``, ``"float32"``, or a few bits such as ``"int1"``.
            header: What the features depend on; JSON-able. A store with another header is refused.

        Raises:
            ManifestError: The folder holds features of something else, or a file is cut short.
        """
        codec = row_codec(dtype, width)
        shapes = {
            "features": ((rows, codec.items), codec.item),
            "norms": ((rows,), "float32"),
            "done": ((rows,), "uint8"),
        }
        if folder is None:
            features, norms, done = (np.zeros(shape, dtype=kind) for shape, kind in shapes.values())
            return cls(features, norms, done, codec)
        header = {"format": FORMAT, "num_rows": rows, "width": width, "dtype": dtype, **header}
        if not check_header(folder, header):
            for name, (shape, kind) in shapes.items():
                _allocate(folder / f"{name}.bin", math.prod(shape) * np.dtype(kind).itemsize)
            # Last: a folder without a header is an unfinished one and is started afresh.
            write_header(folder, header)
        features, norms, done = (_map(folder / f"{name}.bin", *shapes[name]) for name in shapes)
        return cls(features, norms, done, codec)

    @property
    def done(self) -> np.ndarray:
        """[N] whether a row has been written."""
        return self._done.astype(bool)

    @property
    def norms(self) -> np.ndarray:
        """[N] length of each vector before it was scaled; NaN where it was not finite."""
        return np.array(self._norms)

    def write(self, positions: np.ndarray, features: Tensor) -> None:
        """Store the vectors of some rows; once this returns they survive a crash.

        Args:
            positions: [B] rows.
            features: [B, D]. A vector that is not finite is stored as zero with norm NaN.
        """
        exact = features.detach().double().cpu()
        norms = torch.linalg.vector_norm(exact, dim=1)
        norms = torch.where(torch.isfinite(norms), norms, torch.nan)
        unit = exact / torch.where(norms > 0, norms, 1.0)[:, None]
        unit = torch.where((norms > 0)[:, None], unit, 0.0)
        self._features[positions] = self._codec.encode(unit)
        self._norms[positions] = norms.numpy()
        _flush(self._features, self._norms)
        # Only now, and flushed on its own: a flag never runs ahead of its row.
        self._done[positions] = 1
        _flush(self._done)

    def unit_rows(self, rows: slice) -> Tensor:
        """[rows, D] unit vectors in float32; a row without a finite vector that is not zero is zero."""
        return self._codec.decode(self._features[rows]) * self._present(rows)

    def products(self, rows: slice, queries: Tensor) -> Tensor:
        """[rows, Q] inner products of unit vectors with queries [Q, D], in float32."""
        return self._codec.products(self._features[rows], queries) * self._present(rows)

    def _present(self, rows: slice) -> Tensor:
        """[rows, 1] one, or zero where there is no vector: packed codes may know no zero."""
        return torch.from_numpy((self._norms[rows] > 0).astype(np.float32))[:, None]


def check_header(folder: Path, expected: Mapping[str, Any]) -> bool:
    """Compare the header of a folder of intermediate results with the one wanted.

    Returns:
        False when the folder has no header yet.

    Raises:
        ManifestError: The header is unreadable or differs; the message names the first key.
    """
    path = folder / _HEADER
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(f"{path} is damaged ({error}); remove the folder to start over.") from None
    wanted = json.loads(json.dumps(dict(expected)))
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise ManifestError(
                f"{folder} holds intermediate results of another selection: {key} is {_short(found.get(key))} there "
                f"and {_short(wanted.get(key))} now. Choose another output folder or remove this one."
            )
    return True


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Mark a folder of intermediate results as depending on ``header``."""
    write_json(folder / _HEADER, dict(header))


def model_fingerprint(model: nn.Module) -> str:
    """Digest of the names, shapes, types and a sample of the values of a model's parameters.

    Up to 4,096 evenly spaced entries of each parameter are read: any training step changes it,
    and a model of billions of parameters takes a moment.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, math.ceil(len(flat) / _SAMPLE))]
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def pool_fingerprint(pool: Pool) -> str:
    """Digest of the rows of a pool in their order, and of how they were tokenised.

    Content hashes may be those of the text; lengths of every row and the tokens of a few tell
    another tokenizer, template, truncation or loss mask apart.
    """
    digest = hashlib.sha256("/".join(pool.row_hash or ()).encode())
    for lengths in (pool.lengths, pool.loss_lengths):
        digest.update(np.asarray(lengths, dtype="<i8").tobytes())
    sample = range(0, len(pool), max(1, len(pool) // _SAMPLED_ROWS))
    digest.update("/".join(row_hashes([pool.rows[row] for row in sample])).encode())
    return digest.hexdigest()[:32]


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Digest of every byte of some tensors and of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _allocate(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def _map(path: Path, shape: tuple[int, ...], kind: str) -> np.ndarray:
    size = math.prod(shape) * np.dtype(kind).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != size:
        raise ManifestError(f"{path} has {found} bytes instead of {size}; remove {path.parent} to start over.")
    return np.memmap(path, dtype=kind, mode="r+", shape=shape)


def _flush(*arrays: np.ndarray) -> None:
    for array in arrays:
        if isinstance(array, np.memmap):
            array.flush()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
