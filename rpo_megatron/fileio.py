"""Files that are there in full or not at all."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which nobody else can then. Deleted at the end; the death of its holder frees it.

    Raises BlockingIOError while another holds it, and another OSError where it cannot be made.
    """
    with _lock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path) -> BinaryIO:
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder deleted it after we had opened it: try the next one


def put_in_place(staging: Path, directory: Path) -> None:
    """Give a complete directory its name, once all of it is on disk: what has the name is whole, whenever power fails.

    `directory`, beside it, must not exist.
    """
    fsync_tree(staging)
    staging.rename(directory)
    fsync(directory.parent)


def fsync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        fsync(path)
    fsync(directory)
