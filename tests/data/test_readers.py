"""Rows from every kind of source, and a place for every error."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.data.readers import Source
from rpo_megatron.errors import UserError

ROWS: list[dict[str, Any]] = [{"prompt": f"p{i}", "chosen": "é", "rejected": None} for i in range(5)]
Writer = Callable[..., str]


def rows_of(source: str) -> list[dict[str, Any]]:
    return [row.decode() for row in Source(source)]


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_zst(path: Path, content: bytes) -> None:
    zstandard = pytest.importorskip("zstandard")
    path.write_bytes(zstandard.ZstdCompressor().compress(content))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    """A reader that drops the last line, or the second gzip member, loses data silently."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    content = as_lines(ROWS)
    (tmp_path / "a.jsonl").write_bytes(content.removesuffix(b"\n"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS[:2])) + gzip.compress(as_lines(ROWS[2:])))
    write_zst(tmp_path / "a.jsonl.zst", content)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet"):
        rows = list(Source(str(tmp_path / f"a.{suffix}")))
        assert [row.decode() for row in rows] == ROWS, suffix
        assert [row.where for row in rows] == [f"{tmp_path}/a.{suffix}:{i}" for i in range(1, 6)]
        assert rows[-1].fraction == pytest.approx(1.0)


def test_glob_in_name_order_and_blank_lines(tmp_path: Path) -> None:
    """The order must not be the file system's; a blank line is no row but counts as a line."""
    (tmp_path / "b.jsonl").write_bytes(as_lines(ROWS[2:]))
    (tmp_path / "a.jsonl").write_bytes(b"\n" + as_lines(ROWS[:2]) + b"  \n")
    rows = list(Source(str(tmp_path / "*.jsonl")))
    assert [row.decode() for row in rows] == ROWS
    assert rows[0].where == f"{tmp_path}/a.jsonl:2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "x"', "malformed JSON"),
        (b"\xff\xfe\x00x", "malformed JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"3", "expected a JSON object"),
        (b"[" * 100_000, "malformed JSON"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    """In a million rows, "invalid JSON" without a line number is useless."""
    (tmp_path / "a.jsonl").write_bytes(as_lines(ROWS[:2]) + line + b"\n" + as_lines(ROWS[2:]))
    with pytest.raises(UserError, match=rf"a\.jsonl:3: {message}"):
        rows_of(str(tmp_path / "a.jsonl"))


def test_truncated_compressed_files(tmp_path: Path) -> None:
    """A half-downloaded file must not pass for a shorter one."""
    rows = [{"prompt": f"{i} " * 50} for i in range(2000)]
    packed = gzip.compress(as_lines(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: cannot be decompressed"):
        rows_of(str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "b.jsonl.gz").write_bytes(b"plain text\n")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz:1: cannot be decompressed"):
        rows_of(str(tmp_path / "b.jsonl.gz"))
    write_zst(tmp_path / "a.jsonl.zst", as_lines(rows))
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst:\d+"):
        rows_of(str(path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        rows_of(str(tmp_path / "a.parquet"))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    """Refused when the source is opened, not after the tokenizer ran for an hour."""
    with pytest.raises(UserError, match="does not exist"):
        Source(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="is a directory"):
        Source(str(tmp_path))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"unknown kind of file \(known: \.jsonl"):
        Source(str(tmp_path / "*"))


def test_saved_dataset(tmp_path: Path) -> None:
    """`hf:` with what save_to_disk wrote, with and without splits, and with a directory of data files."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "splits")
    assert rows_of(f"hf:{tmp_path}/plain") == ROWS
    [first, *_] = Source(f"hf:{tmp_path}/splits", split="test")
    assert first.where == f"hf:{tmp_path}/splits[test]:1"
    with pytest.raises(UserError, match="cannot load split 'train'"):
        rows_of(f"hf:{tmp_path}/splits")
