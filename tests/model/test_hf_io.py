"""Reading and writing Hugging Face directories, and the fingerprint of what is in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rpo_megatron.errors import UserError
from rpo_megatron.model.hf_io import HFReader, HFWriter
from rpo_megatron.model.identity import weights_fingerprint

TENSORS = {name: torch.arange(6.0).view(2, 3) + i for i, name in enumerate("abcd")}


def save_sharded(directory: Path) -> None:
    """a, b in the first file, c, d in the second."""
    directory.mkdir()
    files = {"a": 1, "b": 1, "c": 2, "d": 2}
    for number in (1, 2):
        part = {name: TENSORS[name] for name, n in files.items() if n == number}
        save_file(part, directory / f"model-{number:05d}-of-00002.safetensors")
    index = {"weight_map": {name: f"model-{n:05d}-of-00002.safetensors" for name, n in files.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_sharded(tmp_path / "sharded")
    return tmp_path / "sharded"


# ------------------------------------------------------------------------------------------------ reader


def test_reads_slices_across_files(sharded: Path) -> None:
    """Tensors of the second file lost, or a slice taken of the wrong tensor."""
    with HFReader(sharded) as reader:
        assert sorted(reader.tensors) == list("abcd")
        assert (reader.tensors["d"].shape, reader.tensors["d"].dtype) == ((2, 3), "F32")
        assert torch.equal(reader.read("d")[1:2], TENSORS["d"][1:2])
        assert torch.equal(reader.read("a")[:, 1:], TENSORS["a"][:, 1:])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def to_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "1 of 2 files are missing, first 'model-00002-of-00002.safetensors'"),
        (truncate, "truncated: its header announces"),
        (to_pointer, "truncated, or not a safetensors file"),
        (lambda path: path.write_bytes(b""), "truncated, or not a safetensors file"),
        (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"{}}}"), "not a safetensors file"),
        (lambda path: shutil.copy(path.with_name("model-00001-of-00002.safetensors"), path), "'a' is in both"),
    ],
)
def test_damaged_files(sharded: Path, damage: Callable[[Path], object], message: str) -> None:
    """An interrupted download that fails in the middle of loading, with a traceback, or not at all."""
    damage(sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=message):
        HFReader(sharded)


def test_no_weights(sharded: Path, tmp_path: Path) -> None:
    """A directory without safetensors, or an index that is none, reported as a bug of ours."""
    with pytest.raises(UserError, match="neither model"):
        HFReader(tmp_path / "nowhere")
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="not a safetensors index"):
        HFReader(sharded)


# ------------------------------------------------------------------------------------------------ writer


def write_all(directory: Path, *, max_shard_bytes: int) -> None:
    with HFWriter(directory, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)


def test_one_file_when_it_fits(tmp_path: Path) -> None:
    """A needless index, or a lone shard called model-00001-of-00001."""
    write_all(tmp_path / "out", max_shard_bytes=4 * 24)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "model.safetensors"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == TENSORS.keys()


def test_shards_and_index(tmp_path: Path) -> None:
    """A file above the limit, a tensor larger than the limit refused, an index that points elsewhere."""
    write_all(tmp_path / "out", max_shard_bytes=50)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {
        "metadata": {"total_size": 4 * 24},
        "weight_map": {"a": first, "b": first, "c": second, "d": second},
    }
    with HFReader(tmp_path / "out") as reader:
        assert all(torch.equal(reader.read(name)[:], tensor) for name, tensor in TENSORS.items())
    write_all(tmp_path / "small", max_shard_bytes=1)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) == 4


def test_views_are_written_as_their_own_numbers(tmp_path: Path) -> None:
    """Two views of one tensor (gate and up of fc1), which safetensors refuses, or a later in-place change of what was
    added."""
    both = torch.arange(8.0).view(4, 2)
    with HFWriter(tmp_path / "out", max_shard_bytes=10**6) as writer:
        for name, view in zip("gut", (both[:2], both[2:], both.T), strict=True):
            writer.add(name, view)
        expected = both.clone()
        both.zero_()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(torch.cat([written["g"], written["u"]]), expected)
    assert torch.equal(written["t"], expected.T)


def test_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    """Half an export under the final name, or files that a loader opens under another."""

    def interrupted() -> None:
        with HFWriter(tmp_path / "out", max_shard_bytes=24) as writer:
            writer.add("a", TENSORS["a"])
            writer.add("b", TENSORS["b"])
            # What a killed process would leave behind now: one finished file, under a name that nothing loads.
            assert not (tmp_path / "out").exists()
            assert [path.suffix for path in writer.staging.iterdir()] == [".part"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_refused(tmp_path: Path) -> None:
    """An export that overwrites another model."""
    with pytest.raises(UserError, match="exists already"):
        HFWriter(tmp_path, max_shard_bytes=1)


# ------------------------------------------------------------------------------------------------ fingerprint


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_fingerprint_follows_the_weights(sharded: Path, tmp_path: Path) -> None:
    """A reference taken for another one after a single byte changed, or not recognised after it was moved."""
    before = weights_fingerprint(sharded)
    shutil.copytree(sharded, tmp_path / "copy")
    config = json.loads((sharded / "config.json").read_text())
    renamed = {"transformers_version": "4.0", "_name_or_path": "/elsewhere", **dict(reversed(config.items()))}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(renamed, indent=4))
    assert weights_fingerprint(tmp_path / "copy") == before
    flip(tmp_path / "copy" / "model-00002-of-00002.safetensors", -1)
    assert weights_fingerprint(tmp_path / "copy") != before
    flip(tmp_path / "copy" / "model-00002-of-00002.safetensors", -1)
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "rope_theta": 2.0}))
    assert weights_fingerprint(tmp_path / "copy") != before


def test_fingerprint_samples_large_files(tmp_path: Path) -> None:
    """Blocks that miss the ends of a large file, or a large file read whole: 80 MiB of zeros, sampled at 64 places."""
    size = 80 << 20
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")

    def fingerprint(*, changed_at: int | None) -> str:
        with file.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + size)
            if changed_at is not None:
                out.seek(8 + len(header) + changed_at)
                out.write(b"\1")
        return weights_fingerprint(tmp_path)

    untouched = fingerprint(changed_at=None)
    assert fingerprint(changed_at=0) != untouched
    assert fingerprint(changed_at=size - 1) != untouched
    assert fingerprint(changed_at=(1 << 20) + 10) == untouched  # blocks start every 1.25 MiB: this lies in a gap
