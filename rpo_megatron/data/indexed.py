"""Megatron's indexed dataset (PREFIX.bin, PREFIX.idx): the format and a validated reader; indexed_writer.py writes it.

The files are byte for byte those of `megatron.core.datasets.indexed_dataset`, which reads ours and whose files we
read. Its own classes do not serve here: the reader notices a truncated .bin late, reads past a sequence into the next
one and dies with a segmentation fault when an array outlives it; the builder wraps values that do not fit the dtype.

    PREFIX.bin   the values of all sequences, end to end
    PREFIX.idx   "MMIDIDX\\0\\0" | u64 version = 1 | u8 dtype code | u64 S sequences | u64 D + 1
                 | i32 length[S] | i64 byte offset[S] | i64 document border[D + 1]: starts with 0, ends with S
    (all little endian; a document is the run of sequences between two borders)

Shapes: S sequences, D documents.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpo_megatron.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
PARTIAL = ".partial"
"""Suffix of a file that is still being written; nothing opens it."""
BLOCK = 1 << 20
"""Index entries that are checked or written at a time."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron picks for a vocabulary: uint16 below 65500 entries, int32 from there on."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size and checksum of a written file."""

    bytes: int
    sha256: str


# ------------------------------------------------------------------------------------------------ reader


class IndexedReader:
    """A read-only indexed dataset, memory-mapped and checked as a whole when it opens.

    Raises UserError, naming the file, when a file is absent, truncated, not of this format or contradicts the other.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        idx, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        header = _read_header(idx)
        self.dtype = header.dtype
        offsets_at = HEADER.size + 4 * header.num_sequences
        borders_at = offsets_at + 8 * header.num_sequences
        _check_idx_size(idx, expected=borders_at + 8 * header.num_borders, num_sequences=header.num_sequences)
        self.length_S = map_file(idx, np.dtype("<i4"), HEADER.size, header.num_sequences)
        self._offset_S = map_file(idx, np.dtype("<i8"), offsets_at, header.num_sequences)
        self.border_D = map_file(idx, np.dtype("<i8"), borders_at, header.num_borders)
        self._lengths, self._offsets, self._borders = _ints(self.length_S), _ints(self._offset_S), _ints(self.border_D)
        self._check_borders(idx)
        self._check_sequences(idx, bin_path)
        self._values = map_file(bin_path, self.dtype, 0, bin_path.stat().st_size // self.dtype.itemsize)

    def __len__(self) -> int:
        return self.length_S.size

    @property
    def num_documents(self) -> int:
        return self.border_D.size - 1

    def get(self, i: int) -> np.ndarray:
        """A copy of sequence i, in the file's dtype. Raises IndexError outside 0 <= i < len(self)."""
        if not 0 <= i < self.length_S.size:
            raise IndexError(f"{self.prefix}: sequence {i} of {len(self)}")
        start = self._offsets[i] // self.dtype.itemsize
        return self._values[start : start + self._lengths[i]].copy()

    def document(self, d: int, *, dtype: np.dtype | None = None) -> list[np.ndarray]:
        """The sequences of document d, as parts of one copy, in `dtype` or that of the file. Raises IndexError outside
        0 <= d < num_documents."""
        sequences = self.document_range(d)
        if not sequences:
            return []
        lengths = self._lengths[sequences.start : sequences.stop].tolist()
        start = self._offsets[sequences.start] // self.dtype.itemsize
        values = self._values[start : start + sum(lengths)].astype(dtype or self.dtype)
        parts = []
        end = 0
        for length in lengths:
            parts.append(values[end : end + length])
            end += length
        return parts

    def document_range(self, d: int) -> range:
        """The sequence indices of document d."""
        if not 0 <= d < self.border_D.size - 1:
            raise IndexError(f"{self.prefix}: document {d} of {self.num_documents}")
        return range(self._borders[d], self._borders[d + 1])

    def _check_borders(self, idx: Path) -> None:
        borders = self.border_D
        sound = borders.size > 0 and borders[0] == 0 and borders[-1] == len(self)
        for start in range(0, borders.size, BLOCK):
            block = borders[start : start + BLOCK + 1]
            sound = sound and bool((block[1:] >= block[:-1]).all())
        if not sound:
            raise _corrupt(idx, "its document borders do not run from 0 to the number of sequences")

    def _check_sequences(self, idx: Path, bin_path: Path) -> None:
        """Sequences must lie end to end from the start of the .bin to its end."""
        end = 0
        for start in range(0, len(self), BLOCK):
            size_B = self.length_S[start : start + BLOCK].astype(np.int64) * self.dtype.itemsize
            if size_B.min() < 0:
                raise _corrupt(idx, "it holds a negative sequence length")
            end_B = end + np.cumsum(size_B)
            if not np.array_equal(self._offset_S[start : start + BLOCK], end_B - size_B):
                raise _corrupt(idx, "its sequence offsets do not follow from its lengths")
            end = int(end_B[-1])
        if not bin_path.is_file():
            raise UserError(f"{bin_path}: does not exist, but {idx} does; copy both files, or write them again")
        found = bin_path.stat().st_size
        if found != end:
            state = "truncated" if found < end else "too long"
            raise _corrupt(bin_path, f"it is {state}: {found} bytes, its index describes {end}")


@dataclass(frozen=True, kw_only=True)
class _Header:
    dtype: np.dtype
    num_sequences: int
    num_borders: int


def _read_header(idx: Path) -> _Header:
    try:
        with idx.open("rb") as file:
            raw = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"{idx}: cannot be read ({error.strerror}); check the path") from None
    if not raw.startswith(MAGIC):
        raise UserError(f"{idx}: not an index of a Megatron indexed dataset (it does not start with {MAGIC!r})")
    if len(raw) < HEADER.size:
        raise _corrupt(idx, f"it is truncated: {len(raw)} bytes, its header alone has {HEADER.size}")
    _, version, code, num_sequences, num_borders = HEADER.unpack(raw)
    if version != VERSION:
        raise UserError(f"{idx}: version {version} of the format; this program reads version {VERSION}")
    if code not in DTYPE_OF_CODE:
        raise _corrupt(idx, f"dtype code {code} is none of {sorted(DTYPE_OF_CODE)}")
    return _Header(dtype=DTYPE_OF_CODE[code], num_sequences=num_sequences, num_borders=num_borders)


def _check_idx_size(idx: Path, *, expected: int, num_sequences: int) -> None:
    found = idx.stat().st_size
    if num_sequences and found == expected + num_sequences:
        raise UserError(f"{idx}: a multimodal index (one mode per sequence); only plain ones are read here")
    if found != expected:
        state = "truncated" if found < expected else "too long"
        raise _corrupt(idx, f"it is {state}: {found} bytes, its header describes {expected}")


def map_file(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, mode="r", dtype=dtype, offset=offset, shape=(count,)).view(np.ndarray)


def _ints(values: np.ndarray) -> memoryview:
    """The same integers; gives one as a Python int in a third of the time that an array takes."""
    raw = values.view("u1").data
    return raw.cast("i") if values.itemsize == 4 else raw.cast("q")


def _corrupt(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}. Copy it again from its source, or write it again")
