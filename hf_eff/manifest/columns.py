"""Columns of a selection without a Python object a row: content hashes as 16 bytes each, texts as Arrow keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_eff.errors import ManifestError

_CHUNK = 2**20  # rows of one Arrow array, whose texts may not pass 2 GiB
_DIGITS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
_VALUES = np.full(256, 255, dtype=np.uint8)
_VALUES[_DIGITS] = np.arange(16, dtype=np.uint8)


class HashColumn(Sequence[str]):
    """Content hashes of rows. Reads as a sequence of 32 hexadecimal digits each; takes 16 bytes each.

    Args:
        codes: [k, 16] uint8.

    >>> HashColumn.of(["00ff" * 8])[0]
    '00ff00ff00ff00ff00ff00ff00ff00ff'
    """

    def __init__(self, codes: np.ndarray) -> None:
        self.codes = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1, 16)

    @classmethod
    def of(cls, values: Any) -> HashColumn:
        """From texts, an Arrow column of texts, or another column of hashes.

        Raises:
            ManifestError: A value is not 32 hexadecimal digits.
        """
        if isinstance(values, HashColumn):
            return values
        parts = [_decoded(array) for array in _arrays(values)]
        return cls(np.concatenate(parts) if parts else np.empty((0, 16), dtype=np.uint8))

    def __len__(self) -> int:
        """Number of hashes."""
        return len(self.codes)

    def __getitem__(self, place: Any) -> Any:
        """One hash as text; a slice or an array of places gives a column."""
        if isinstance(place, (slice, np.ndarray)):
            return HashColumn(self.codes[place])
        return self.codes[place].tobytes().hex()

    def __eq__(self, other: object) -> bool:
        """Whether the hashes are the same in the same order; lists of text compare too."""
        if isinstance(other, HashColumn):
            return np.array_equal(self.codes, other.codes)
        return list(self) == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def arrow(self) -> pa.ChunkedArray:
        """The hashes as text."""
        starts = range(0, len(self), _CHUNK)
        return pa.chunked_array([_encoded(self.codes[start : start + _CHUNK]) for start in starts], type=pa.string())


class TextColumn(Sequence[str]):
    """Texts in Arrow's memory. Equal texts that follow one another in a dictionary cost four bytes each.

    >>> TextColumn.of(["a", "a"]) == ["a", "a"]
    True
    """

    def __init__(self, values: pa.ChunkedArray) -> None:
        self.values = values

    @classmethod
    def of(cls, values: Any) -> TextColumn:
        """From texts, an Arrow column of texts, or another text column.

        Raises:
            ManifestError: A value is not text.
        """
        if isinstance(values, TextColumn):
            return values
        return cls(pa.chunked_array([array.dictionary_encode() for array in _arrays(values)], type=_DICTIONARY))

    @classmethod
    def repeated(cls, text: str, count: int) -> TextColumn:
        """One text for every row."""
        places = pa.array(np.zeros(count, dtype=np.int32))
        return cls(pa.chunked_array([pa.DictionaryArray.from_arrays(places, [text])], type=_DICTIONARY))

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.values)

    def __getitem__(self, place: Any) -> Any:
        """One text; a slice or an array of places gives a column."""
        if isinstance(place, slice):
            return TextColumn(pa.chunked_array(self.values.take(pa.array(range(*place.indices(len(self)))))))
        if isinstance(place, np.ndarray):
            return TextColumn(self.values.take(pa.array(place)))
        return self.values[place].as_py()

    def __eq__(self, other: object) -> bool:
        """Whether the texts are the same in the same order; lists of text compare too."""
        if isinstance(other, TextColumn):
            return len(self) == len(other) and bool(self.arrow().equals(other.arrow()))
        return list(self) == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def arrow(self) -> pa.ChunkedArray:
        """The texts, one whole text a row."""
        return self.values.cast(pa.string())


_DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def text_lengths(column: pa.ChunkedArray) -> int:
    """Length of the longest text of a column, in bytes; read from its dictionary, so long repeats cost nothing."""
    longest = 0
    for chunk in column.chunks:
        texts = chunk.dictionary if isinstance(chunk, pa.DictionaryArray) else chunk
        longest = max(longest, pc.max(pc.binary_length(texts)).as_py() or 0)
    return longest


def _arrays(values: Any) -> list[pa.Array]:
    """Arrow arrays of texts, none longer than a chunk."""
    if isinstance(values, pa.ChunkedArray):
        column = values
    elif isinstance(values, pa.Array):
        column = pa.chunked_array([values])
    else:
        column = pa.chunked_array(list(_converted(values)), type=pa.string())
    if column.null_count:
        raise ManifestError("a text of the selection is missing; give one for every row or leave the column out.")
    pieces = [chunk.slice(start, _CHUNK) for chunk in column.chunks for start in range(0, len(chunk), _CHUNK)]
    return [piece.cast(pa.string()) for piece in pieces]


def _converted(values: Iterable[Any]) -> Iterable[pa.Array]:
    texts = values if isinstance(values, list) else list(values)
    try:
        for start in range(0, len(texts), _CHUNK):
            yield pa.array(texts[start : start + _CHUNK], type=pa.string())
    except (pa.ArrowException, UnicodeEncodeError, TypeError) as error:
        raise ManifestError(f"row hashes, ids and reasons must be text: {error}.") from None


def _decoded(array: pa.Array) -> np.ndarray:
    """[k, 16] bytes of texts of 32 digits."""
    if not len(array):
        return np.empty((0, 16), dtype=np.uint8)
    lengths = pc.min_max(pc.binary_length(array)).as_py()
    if (lengths["min"], lengths["max"]) != (32, 32):
        raise ManifestError("a row hash must be 32 hexadecimal digits.")
    _, offsets, data = array.buffers()
    start = int(np.frombuffer(offsets, dtype=np.int32)[array.offset])
    text = np.frombuffer(data, dtype=np.uint8)[start : start + 32 * len(array)]
    values = _VALUES[text]
    if (values == 255).any():
        raise ManifestError("a row hash must be 32 hexadecimal digits.")
    pairs = values.reshape(-1, 16, 2)
    return np.asarray(pairs[:, :, 0] << 4 | pairs[:, :, 1], dtype=np.uint8)


def _encoded(codes: np.ndarray) -> pa.Array:
    digits = np.stack([_DIGITS[codes >> 4], _DIGITS[codes & 15]], axis=2)
    offsets = np.arange(len(codes) + 1, dtype=np.int32) * 32
    return pa.StringArray.from_buffers(len(codes), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(digits)))
