"""Files that are there in full or not at all."""

import json
import os
from pathlib import Path

import pytest

from rpo_megatron import fileio


def die(*_: object) -> None:
    raise OSError("disk full")


def test_write_json(tmp_path: Path) -> None:
    """Escaped or mangled names would not be found again; a missing last newline glues files together in a terminal."""
    path = tmp_path / "x.json"
    fileio.write_json(path, {"größe": [1, 2.5, None]})
    assert json.loads(path.read_bytes()) == {"größe": [1, 2.5, None]}
    assert "größe" in path.read_text(encoding="utf-8")
    assert path.read_bytes().endswith(b"}\n")


def test_replacing_text(tmp_path: Path) -> None:
    """A longer old text must not show behind the new one, and nothing else may stay in the directory."""
    path = tmp_path / "latest"
    for text in ("a longer first text\n", "é\n"):
        fileio.write_text_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dies_in", ["fsync", "replace"])
def test_a_write_that_dies_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    """Writing in place would leave an empty or half-written file after a crash; so would a rename before the data is
    on disk, after a power cut."""
    path = tmp_path / "latest"
    fileio.write_text_atomically(path, "old")
    monkeypatch.setattr(os, dies_in, die)
    with pytest.raises(OSError, match="disk full"):
        fileio.write_text_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_directory_has_its_name_only_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename before the flush leaves, after a power cut, a checkpoint or an adapter that opens and is empty."""
    staging, directory = tmp_path / "x.incomplete", tmp_path / "x"
    staging.mkdir()
    (staging / "state.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(OSError, match="disk full"):
            fileio.put_in_place(staging, directory)
    assert not directory.exists()
    fileio.put_in_place(staging, directory)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_fsync_tree_reaches_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was skipped can be empty after a power cut, in a directory that looks complete."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("1", "a/2", "a/b/3"):
        (tmp_path / name).write_text(name)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    fileio.fsync_tree(tmp_path)
    assert set(flushed) == {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}
