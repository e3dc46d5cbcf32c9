"""Raw rows, one after the other, from JSON lines, Parquet and Hugging Face `datasets`; memory stays bounded.

A row comes with its place (`file:line`) for messages. A line of JSON comes undecoded: whoever works on it decodes it,
so that this costs the reading process nothing.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from rpo_megatron.errors import UserError

PARQUET_BATCH = 1024
"""Parquet rows that are in memory at a time."""

ROW_BYTES = 1 << 13
"""What a row that is no line of text counts as."""
BUFFER_BYTES = 1 << 17
"""Of a file of text: with Python's own, reading takes three times as long."""


class RawRow(msgspec.Struct, frozen=True, gc=False):
    """Not a dataclass, because a process makes and hands on millions of them."""

    where: str
    """`file:line` (or `file:row`), counted from 1."""
    content: bytes | dict[str, Any]
    """A line of JSON, or the columns of a row."""
    fraction: float
    """Share of the input that is read once this row is, in 0..1 (by bytes for text files)."""

    @property
    def size(self) -> int:
        """Bytes, a guess where the row is no line of text."""
        return len(self.content) if isinstance(self.content, bytes) else ROW_BYTES

    def decode(self) -> dict[str, Any]:
        """Raises UserError for a line that is not one JSON object."""
        tree = self.content
        if isinstance(tree, bytes):
            try:
                tree = _decode(tree)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.where}: malformed JSON: {error}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{self.where}: expected a JSON object {{...}}, found {str(tree)[:80]!r}")
        return tree


def _decode(line: bytes) -> Any:
    """msgspec takes half the time, but refuses NaN and half a surrogate pair, which get better messages later."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return json.loads(line)


class Source:
    """The rows of PrepareConfig.input, once."""

    identity: dict[str, str]
    """What the rows are read from, in words that change when they do."""

    def __init__(self, source: str, *, split: str = "train") -> None:
        """Raises UserError when nothing is there or its kind is unknown."""
        if source.startswith("hf:"):
            dataset = _load_dataset(source, split)
            self.identity = {source: f"{dataset._fingerprint} {len(dataset)}"}
            self._rows: Iterator[RawRow] = _dataset_rows(dataset, f"{source}[{split}]")
        else:
            files = _files(source)
            for file in files:
                _reader_of(file)
            self.identity = {str(file): f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files}
            self._rows = _file_rows(files)

    def __iter__(self) -> Iterator[RawRow]:
        return self._rows


def _dataset_rows(dataset: Any, name: str) -> Iterator[RawRow]:
    for number, row in enumerate(dataset, start=1):
        yield RawRow(where=f"{name}:{number}", content=row, fraction=number / len(dataset))


def _file_rows(files: list[Path]) -> Iterator[RawRow]:
    total = sum(file.stat().st_size for file in files) or 1
    done = 0
    for file in files:
        size = file.stat().st_size
        yield from _reader_of(file)(file, Share(start=done / total, size=size / total))
        done += size


@dataclass(frozen=True, kw_only=True)
class Share:
    """Of the whole input, what one file is: both in 0..1."""

    start: float
    size: float


FileReader = Callable[[Path, Share], Iterator[RawRow]]


def _files(source: str) -> list[Path]:
    if Path(source).is_dir():
        raise UserError(f"input '{source}' is a directory: give '{source}/*.jsonl', or 'hf:{source}' for datasets")
    names = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
    if not names:
        raise UserError(f"input '{source}' does not exist, and matches no file as a glob")
    return [Path(name) for name in names]


def _reader_of(file: Path) -> FileReader:
    for suffix, reader in READERS.items():
        if file.name.endswith(suffix):
            return reader
    raise UserError(f"input {file}: unknown kind of file (known: {', '.join(READERS)}, or hf:NAME)")


def _json_lines(file: Path, share: Share) -> Iterator[RawRow]:
    start, per_byte = share.start, share.size / (file.stat().st_size or 1)
    name, line, done = str(file), 0, 0
    with file.open("rb", buffering=BUFFER_BYTES) as raw:
        opened = _decompressed(file, raw)
        try:
            for line, text in enumerate(opened.lines, start=1):
                done = raw.tell() if opened.is_compressed else done + len(text)
                if not text.isspace():
                    yield RawRow(f"{name}:{line}", text, start + done * per_byte)
        except opened.errors as error:
            what = f"cannot be decompressed any further ({error}); copy the file again"
            raise UserError(f"{file}:{line + 1}: {what}") from None


@dataclass(frozen=True, kw_only=True)
class _Opened:
    lines: Iterable[bytes]
    errors: tuple[type[Exception], ...]
    """What damaged content raises."""
    is_compressed: bool = True
    """Then the lengths of the lines do not say how much of the file is read."""


def _decompressed(file: Path, raw: BinaryIO) -> _Opened:
    if file.name.endswith(".gz"):
        return _Opened(lines=gzip.open(raw), errors=(EOFError, gzip.BadGzipFile, zlib.error))
    if not file.name.endswith(".zst"):
        return _Opened(lines=raw, errors=(), is_compressed=False)
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file}: reading .zst needs the package zstandard: pip install zstandard") from None
    stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return _Opened(lines=io.BufferedReader(stream), errors=(zstandard.ZstdError,))


def _parquet(file: Path, share: Share) -> Iterator[RawRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: reading .parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
        total, number = table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(f"{file}:{number}", row, share.start + number / total * share.size)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {error}") from None


def _load_dataset(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"input '{source}' needs the package datasets: pip install datasets") from None
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"input '{source}': datasets cannot load split '{split}': {error}") from None


READERS: dict[str, FileReader] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".jsonl.zst": _json_lines,
    ".parquet": _parquet,
}
