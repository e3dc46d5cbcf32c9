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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from rpo_megatron.errors import UserError

PARQUET_BATCH = 1024
"""Parquet rows that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class RawRow:
    where: str
    """`file:line` (or `file:row`), counted from 1."""
    content: bytes | dict[str, Any]
    """A line of JSON, or the columns of a row."""
    fraction: float
    """Share of the input that is read once this row is, in 0..1 (by bytes for text files)."""

    def decode(self) -> dict[str, Any]:
        """Raises UserError for a line that is not one JSON object."""
        if isinstance(self.content, dict):
            return self.content
        try:
            tree = json.loads(self.content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where}: malformed JSON: {error}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{self.where}: expected a JSON object {{...}}, found {str(tree)[:80]!r}")
        return tree


class Source:
    """The rows of PrepareConfig.input, once."""

    def __init__(self, source: str, *, split: str = "train") -> None:
        """Raises UserError when nothing is there or its kind is unknown."""
        if source.startswith("hf:"):
            self._rows: Iterator[RawRow] = self._from_datasets(source, split)
        else:
            files = _files(source)
            for file in files:
                _reader_of(file)
            self._rows = self._from_files(files)

    def __iter__(self) -> Iterator[RawRow]:
        return self._rows

    def _from_files(self, files: list[Path]) -> Iterator[RawRow]:
        total = sum(file.stat().st_size for file in files) or 1
        done = 0
        for file in files:
            size = file.stat().st_size
            for row in _reader_of(file)(file):
                yield replace(row, fraction=(done + row.fraction * size) / total)
            done += size

    def _from_datasets(self, source: str, split: str) -> Iterator[RawRow]:
        dataset = _load_dataset(source, split)
        for number, row in enumerate(dataset, start=1):
            yield RawRow(where=f"{source}[{split}]:{number}", content=row, fraction=number / len(dataset))


FileReader = Callable[[Path], Iterator[RawRow]]
"""Yields rows whose fraction is that of the one file."""


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


def _json_lines(file: Path) -> Iterator[RawRow]:
    size = file.stat().st_size or 1
    line = 0
    with file.open("rb") as raw:
        opened = _decompressed(file, raw)
        try:
            for line, text in enumerate(opened.lines, start=1):
                if not text.isspace():
                    yield RawRow(where=f"{file}:{line}", content=text, fraction=raw.tell() / size)
        except opened.errors as error:
            what = f"cannot be decompressed any further ({error}); copy the file again"
            raise UserError(f"{file}:{line + 1}: {what}") from None


@dataclass(frozen=True, kw_only=True)
class _Opened:
    lines: Iterable[bytes]
    errors: tuple[type[Exception], ...]
    """What damaged content raises."""


def _decompressed(file: Path, raw: BinaryIO) -> _Opened:
    if file.name.endswith(".gz"):
        return _Opened(lines=gzip.open(raw), errors=(EOFError, gzip.BadGzipFile, zlib.error))
    if not file.name.endswith(".zst"):
        return _Opened(lines=raw, errors=())
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file}: reading .zst needs the package zstandard: pip install zstandard") from None
    stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return _Opened(lines=io.BufferedReader(stream), errors=(zstandard.ZstdError,))


def _parquet(file: Path) -> Iterator[RawRow]:
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
                yield RawRow(where=f"{file}:{number}", content=row, fraction=number / total)
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
