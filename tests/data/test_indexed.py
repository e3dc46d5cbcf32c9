"""The indexed format: equal to Megatron's byte for byte, and nothing damaged opens."""

import hashlib
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.indexed import DTYPE_OF_CODE, HEADER, IndexedReader, token_dtype
from rpo_megatron.data.indexed_writer import IndexedWriter
from rpo_megatron.errors import UserError

DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [[7], [], [8, 9, 10, 65535]]]


def write(prefix: Path, documents: list[list[list[int]]], dtype: np.dtype) -> None:
    writer = IndexedWriter(str(prefix), dtype=dtype)
    add(writer, documents)
    writer.finish()
    writer.publish()


def add(writer: IndexedWriter, documents: list[list[list[int]]]) -> None:
    for document in documents:
        for sequence in document:
            writer.add(np.array(sequence, dtype=np.int64 if writer.dtype.kind in "iu" else np.float64))
        writer.end_document()


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    write(tmp_path / "x", DOCUMENTS, np.dtype("<u2"))
    return str(tmp_path / "x")


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "int64"])
def test_same_bytes_as_megatron_and_readable_by_both(tmp_path: Path, dtype: str) -> None:
    """A header field, offset or border that differs from megatron-core's would break exchange either way."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", DOCUMENTS, np.dtype(dtype))

    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    theirs = IndexedDataset(str(tmp_path / "ours"))
    ours = IndexedReader(str(tmp_path / "theirs"))
    assert len(theirs) == len(ours) == 6
    np.testing.assert_array_equal(theirs.document_indices, ours.border_D)
    for i in range(6):
        np.testing.assert_array_equal(np.array(theirs[i]), ours.get(i))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=4), min_size=1, max_size=6))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]]) -> None:
    """Empty sequences and empty documents shift every offset behind them if they are forgotten."""
    prefix = tmp_path_factory.mktemp("roundtrip") / "x"
    write(prefix, documents, np.dtype("<i4"))
    reader = IndexedReader(str(prefix))
    read = [[sequence.tolist() for sequence in reader.document(d)] for d in range(reader.num_documents)]
    assert read == documents


def test_get_is_bounded_and_copies(prefix: str) -> None:
    """Megatron's reader runs into the next sequence, and its arrays die with the dataset."""
    reader = IndexedReader(prefix)
    first = reader.get(0)
    first[0] = 99
    assert reader.get(0).tolist() == [1, 2, 3]
    del reader
    assert first.tolist() == [99, 2, 3]
    for i in (-1, 6):
        with pytest.raises(IndexError):
            IndexedReader(prefix).get(i)
    with pytest.raises(IndexError):
        IndexedReader(prefix).document(3)


@pytest.mark.parametrize("value", [-1, 65536, 2**40])
def test_value_that_does_not_fit_is_refused(tmp_path: Path, value: int) -> None:
    """Megatron stores 70000 as 4464 in a uint16 file."""
    writer = IndexedWriter(str(tmp_path / "x"), dtype=np.dtype("<u2"))
    with pytest.raises(ValueError, match="do not fit uint16"):
        writer.add(np.array([value]))
    with pytest.raises(ValueError, match="float64 values cannot be stored"):
        writer.add(np.array([0.5]))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_token_dtype_follows_megatron() -> None:
    """A boundary off by one makes files of another dtype than Megatron's tools for the same vocabulary."""
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (1, 512, 65499, 65500, 65535, 65536, 152064):
        assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))
    for code, dtype in DTYPE_OF_CODE.items():
        assert np.dtype(DType.dtype_from_code(code)) == dtype


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_truncated_or_extended_bin(prefix: str, cut: int) -> None:
    """A half-copied .bin must be noticed at open, not at step 10000."""
    path = Path(f"{prefix}.bin")
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with pytest.raises(UserError, match=rf"{path}: damaged: it is truncated"):
        IndexedReader(prefix)
    path.write_bytes(content + b"x" * cut)
    with pytest.raises(UserError, match="too long"):
        IndexedReader(prefix)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        IndexedReader(prefix)


def test_every_truncation_of_the_index_is_noticed(prefix: str) -> None:
    """Whatever byte the copy stopped at, and one byte too many."""
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    for size in [*range(len(content)), len(content) + 1]:
        path.write_bytes((content + b"\0")[:size])
        with pytest.raises(UserError, match=str(path)):
            IndexedReader(prefix)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        IndexedReader(prefix)


@pytest.mark.parametrize(
    ("offset", "raw", "message"),
    [
        (0, b"X", "not an index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x09", "dtype code 9"),
        (17, b"\x04", "offsets do not follow"),  # int32 where uint16 was written
        (18, struct.pack("<Q", 2**60), "truncated"),
        (34, struct.pack("<i", -3), "negative"),
        (34, struct.pack("<i", 4), "offsets do not follow"),
        (34 + 4 * 6 + 8, struct.pack("<q", 2), "offsets do not follow"),
        (34 + 12 * 6, struct.pack("<q", 1), "borders"),
        (34 + 12 * 6 + 8, struct.pack("<q", 5), "borders"),
        (34 + 12 * 6 + 24, struct.pack("<q", 7), "borders"),
    ],
)
def test_flipped_index_is_refused(prefix: str, offset: int, raw: bytes, message: str) -> None:
    """Each field of the index on its own: an unchecked one would read wrong tokens silently."""
    assert HEADER.size == 34
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        IndexedReader(prefix)


def test_multimodal_index_is_refused(prefix: str) -> None:
    """Megatron opens a multimodal index as a plain one and drops the modes."""
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes() + b"\0" * 6)
    with pytest.raises(UserError, match="multimodal"):
        IndexedReader(prefix)


def test_nothing_opens_before_publish(tmp_path: Path) -> None:
    """An interrupted writer must leave what stood there before, and nothing else under the final names."""
    write(tmp_path / "x", [[[1]]], np.dtype("<u2"))
    writer = IndexedWriter(str(tmp_path / "x"), dtype=np.dtype("<u2"))
    writer.add(np.array([2, 3]))
    writer.end_document()
    assert IndexedReader(str(tmp_path / "x")).get(0).tolist() == [1]
    writer.finish()
    assert IndexedReader(str(tmp_path / "x")).get(0).tolist() == [1]
    writer.publish()
    assert IndexedReader(str(tmp_path / "x")).get(0).tolist() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index arrays are written and checked in blocks; a block border must not shift offsets or hide damage."""
    import rpo_megatron.data.indexed as indexed

    documents = [[[i, i + 1], [i] * (i % 3)] for i in range(20)]
    write(tmp_path / "whole", documents, np.dtype("<u2"))
    monkeypatch.setattr(indexed, "BLOCK", 7)
    write(tmp_path / "blocks", documents, np.dtype("<u2"))
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "blocks.idx").read_bytes()
    IndexedReader(str(tmp_path / "blocks"))
    content = bytearray((tmp_path / "blocks.idx").read_bytes())
    border_7 = 34 + 12 * 40 + 8 * 7  # the first border of the second block
    content[border_7 : border_7 + 8] = struct.pack("<q", 11)
    (tmp_path / "blocks.idx").write_bytes(content)
    with pytest.raises(UserError, match="borders"):
        IndexedReader(str(tmp_path / "blocks"))


def test_memory_does_not_grow_with_the_index(tmp_path: Path) -> None:
    """A list of lengths takes 36 bytes a sequence, which at ten million groups of five is 1.8 GB. 192,000 groups, in
    batches and (the last ones) one by one; what is left is the blocks of the index that are written at a time."""
    num_groups, batch = 200_000, 10_000
    length_S = np.tile(np.array([2, 1, 1, 1, 1]), batch)
    num_sequences_D = np.full(batch, 5)
    writer = IndexedWriter(str(tmp_path / "x"), dtype=np.dtype("<u2"))
    tracemalloc.start()
    for _ in range(num_groups // batch - 1):
        writer.add_documents(np.ones(6 * batch, dtype=np.uint16), length_S=length_S, num_sequences_D=num_sequences_D)
    for _ in range(2000):
        for length in (2, 1, 1, 1, 1):
            writer.add(np.ones(length, dtype=np.uint16))
        writer.end_document()
    kept, _ = tracemalloc.get_traced_memory()
    writer.finish()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    writer.publish()
    assert kept < 100_000  # not even one byte per group
    assert most < 5 * 8 * (1 << 20)  # a few arrays of a block
    reader = IndexedReader(str(tmp_path / "x"))
    assert (len(reader), reader.num_documents) == (5 * 192_000, 192_000)
    assert [part.size for part in reader.document(191_999)] == [2, 1, 1, 1, 1]


def test_resumed_writer(tmp_path: Path) -> None:
    """What stands behind the place that `sync` returned is cut off, in all three files; checksums cover both parts."""
    write(tmp_path / "whole", DOCUMENTS, np.dtype("<u2"))
    expected = [(tmp_path / f"whole.{suffix}").read_bytes() for suffix in ("bin", "idx")]
    for cut in range(len(DOCUMENTS) + 1):
        first = IndexedWriter(str(tmp_path / "x"), dtype=np.dtype("<u2"))
        add(first, DOCUMENTS[:cut])
        so_far = first.sync()
        add(first, [[[9, 9]], [[9]]])
        first.sync()
        first.close()
        assert so_far.is_there(str(tmp_path / "x"))
        second = IndexedWriter(str(tmp_path / "x"), dtype=np.dtype("<u2"), resume=so_far)
        add(second, DOCUMENTS[cut:])
        files = second.finish()
        second.publish()
        found = [(tmp_path / f"x.{suffix}").read_bytes() for suffix in ("bin", "idx")]
        assert found == expected
        assert files["bin"].sha256 == hashlib.sha256(expected[0]).hexdigest()
        assert not so_far.is_there(str(tmp_path / "x"))
