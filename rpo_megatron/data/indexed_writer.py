"""Writes Megatron's indexed datasets (indexed.py has the format): under temporary names until all is there.

megatron-core's own builder wraps values that do not fit the dtype, and keeps every length in a list.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rpo_megatron.data import indexed
from rpo_megatron.data.indexed import DTYPE_OF_CODE, HEADER, MAGIC, PARTIAL, VERSION, FileInfo, map_file

COUNT = np.dtype("<i4")
TEMPORARY = ("bin", "idx", "lengths", "sizes")
"""Suffixes of the files that a writer may have under temporary names."""


@dataclass(frozen=True, kw_only=True)
class WrittenSoFar:
    """How far a file under a temporary name has come: what a later process needs to go on writing it."""

    bytes: int
    sequences: int
    documents: int

    def is_there(self, prefix: str) -> bool:
        """Whether the temporary files of PREFIX hold that much."""
        sizes = {
            "bin": self.bytes,
            "lengths": self.sequences * COUNT.itemsize,
            "sizes": self.documents * COUNT.itemsize,
        }
        paths = {partial(prefix, suffix): size for suffix, size in sizes.items()}
        return all(path.is_file() and path.stat().st_size >= size for path, size in paths.items())


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx under temporary names; only `publish` gives them their own.

    `add` appends a sequence, `end_document` closes a document, `add_documents` does both for many at once; `finish`
    completes the temporary files, `publish` renames them, `abort` deletes them. What stands at PREFIX is untouched
    until `publish`. Lengths are kept in files too, so that memory does not grow with what is written.
    """

    def __init__(self, prefix: str, *, dtype: np.dtype, resume: WrittenSoFar | None = None) -> None:
        """With `resume`, goes on behind what another writer had written when its `sync` returned that."""
        self.prefix = prefix
        self.dtype = dtype
        at = resume or WrittenSoFar(bytes=0, sequences=0, documents=0)
        self._bin = _HashedFile(partial(prefix, "bin"), resume_at=at.bytes)
        self._lengths = _CountFile(partial(prefix, "lengths"), resume_at=at.sequences)
        self._sizes = _CountFile(partial(prefix, "sizes"), resume_at=at.documents)
        self._open_sequences = 0

    def add(self, values: np.ndarray) -> None:
        """Append a sequence. Raises ValueError if a value does not fit the dtype of the file."""
        stored = _cast(values, self.dtype)
        self._bin.write(stored.tobytes())
        self._lengths.write_counts(np.array([stored.size]))
        self._open_sequences += 1

    def end_document(self) -> None:
        """Close a document: the sequences added since the last call."""
        self._sizes.write_counts(np.array([self._open_sequences]))
        self._open_sequences = 0

    def add_documents(self, values: np.ndarray, *, length_S: np.ndarray, num_sequences_D: np.ndarray) -> None:
        """Append whole documents, their sequences end to end in `values`. Raises ValueError as `add`."""
        assert not self._open_sequences, "a document is open"
        assert (values.size, length_S.size) == (length_S.sum(), num_sequences_D.sum())
        self._bin.write(_cast(values, self.dtype).tobytes())
        self._lengths.write_counts(length_S)
        self._sizes.write_counts(num_sequences_D)

    def sync(self) -> WrittenSoFar:
        """Have all that was added reach the disk."""
        num_bytes = self._bin.sync()
        return WrittenSoFar(bytes=num_bytes, sequences=self._lengths.sync(), documents=self._sizes.sync())

    def finish(self) -> dict[str, FileInfo]:
        """Complete both temporary files and sync them to disk; returns {"bin": ..., "idx": ...}."""
        lengths, sizes = self._lengths.finish(), self._sizes.finish()
        idx = _HashedFile(partial(self.prefix, "idx"))
        code = next(code for code, dtype in DTYPE_OF_CODE.items() if dtype == self.dtype)
        idx.write(HEADER.pack(MAGIC, VERSION, code, lengths.size, sizes.size + 1))
        for start in range(0, lengths.size, indexed.BLOCK):
            idx.write(lengths[start : start + indexed.BLOCK].tobytes())
        for offset_B, size_B in _running_sums(lengths, scale=self.dtype.itemsize):
            idx.write((offset_B - size_B).tobytes())
        idx.write(bytes(8))
        for border_B, _ in _running_sums(sizes, scale=1):
            idx.write(border_B.tobytes())
        return {"bin": self._bin.finish(), "idx": idx.finish()}

    def publish(self) -> None:
        """Give the finished files their own names, the index last: without it nothing opens."""
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for suffix in ("bin", "idx"):
            os.replace(partial(self.prefix, suffix), f"{self.prefix}.{suffix}")
        self._lengths.delete()
        self._sizes.delete()

    def close(self) -> None:
        """Leave the temporary files as they are, for another writer to go on with."""
        for file in (self._bin, self._lengths, self._sizes):
            file.close()

    def abort(self) -> None:
        """Delete the temporary files."""
        self.close()
        for suffix in TEMPORARY:
            partial(self.prefix, suffix).unlink(missing_ok=True)


def partial(prefix: str, suffix: str) -> Path:
    """Where PREFIX.suffix is while it is written."""
    return Path(f"{prefix}.{suffix}{PARTIAL}")


class _File:
    """A file that is written from `resume_at` on; what stood behind is cut off."""

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self._path = path
        self._file: BinaryIO = path.open("r+b" if resume_at else "wb", buffering=1 << 20)
        self._file.truncate(resume_at)
        self._file.seek(resume_at)
        self._bytes = resume_at

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._bytes += len(data)

    def sync(self) -> int:
        """Returns the bytes that are on disk now."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._bytes

    def close(self) -> None:
        self._file.close()


class _HashedFile(_File):
    """A file that is hashed while it is written."""

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        super().__init__(path, resume_at=resume_at)
        self._hash = hashlib.sha256()
        if resume_at:
            with path.open("rb") as written:
                while block := written.read(1 << 20):
                    self._hash.update(block)

    def write(self, data: bytes) -> None:
        super().write(data)
        self._hash.update(data)

    def finish(self) -> FileInfo:
        num_bytes = self.sync()
        self.close()
        return FileInfo(bytes=num_bytes, sha256=self._hash.hexdigest())


class _CountFile(_File):
    """Counts of an index as int32, until it is known how many there are."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        super().__init__(path, resume_at=resume_at * COUNT.itemsize)

    def write_counts(self, counts: np.ndarray) -> None:
        self.write(counts.astype(COUNT).tobytes())

    def sync(self) -> int:
        """Returns how many are on disk now."""
        return super().sync() // COUNT.itemsize

    def finish(self) -> np.ndarray:
        """All counts, mapped."""
        count = self.sync()
        self.close()
        return map_file(self._path, COUNT, 0, count)

    def delete(self) -> None:
        self._path.unlink()


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Like `astype`, but an integer that would wrap (or a fraction that would be cut) raises."""
    if dtype.kind == "f":
        return values.astype(dtype)
    if values.dtype.kind not in "iu" and values.size:
        raise ValueError(f"{values.dtype} values cannot be stored as {dtype}")
    limits = np.iinfo(dtype)
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise ValueError(f"values from {values.min()} to {values.max()} do not fit {dtype}")
    return values.astype(dtype)


def _running_sums(count_S: np.ndarray, *, scale: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each block of counts: the sum of all up to and including each one, and each one; both times `scale`."""
    end = 0
    for start in range(0, count_S.size, indexed.BLOCK):
        size_B = count_S[start : start + indexed.BLOCK].astype("<i8") * scale
        end_B = end + np.cumsum(size_B)
        yield end_B, size_B
        end = int(end_B[-1])
