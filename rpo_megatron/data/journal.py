"""What an interrupted `rpo prepare` leaves for the next one, and the lock that keeps two of them apart.

PREFIX.journal.partial   how far the run that was writing PREFIX had come when it last had everything on disk
PREFIX.lock              held (flock) by the run that is writing PREFIX
"""

import re
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rpo_megatron import fileio
from rpo_megatron.data.collector import CollectorState
from rpo_megatron.data.indexed import PARTIAL
from rpo_megatron.data.indexed_writer import TEMPORARY
from rpo_megatron.data.writer import WriterState
from rpo_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything of the first `rows` rows is in the temporary files."""

    identity: dict[str, str]
    """What the content of the store depends on, by name."""
    rows: int
    writer: WriterState
    collector: CollectorState


class Journal:
    """The last checkpoint of the store that is written to PREFIX."""

    def __init__(self, prefix: str, identity: dict[str, str]) -> None:
        self._prefix = prefix
        self._path = Path(f"{prefix}.journal{PARTIAL}")
        self._new = Path(f"{self._path}.new")
        self._identity = identity

    def load(self) -> Checkpoint | None:
        """The checkpoint to go on from, or None. One that does not serve is deleted with its files; why is printed."""
        if not self._path.is_file():
            self._discard()
            return None
        try:
            checkpoint = msgspec.msgpack.decode(self._path.read_bytes(), type=Checkpoint)
        except msgspec.MsgspecError:
            checkpoint = None
        if checkpoint is None or not checkpoint.writer.is_there(self._prefix):
            why = "its files are damaged"
        elif different := _differences(checkpoint.identity, self._identity):
            why = f"it had another {', '.join(different)}"
        else:
            print(f"{self._prefix}: an earlier run was interrupted; going on behind row {checkpoint.rows:,}")
            return checkpoint
        print(f"{self._prefix}: an earlier run was interrupted, but {why}; starting anew")
        self._discard()
        return None

    def save(self, *, rows: int, writer: WriterState, collector: CollectorState) -> None:
        """What `writer` describes must be on disk."""
        checkpoint = Checkpoint(identity=self._identity, rows=rows, writer=writer, collector=collector)
        self._new.write_bytes(msgspec.msgpack.encode(checkpoint))
        fileio.fsync(self._new)
        self._new.replace(self._path)

    @property
    def exists(self) -> bool:
        return self._path.is_file()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._new.unlink(missing_ok=True)

    def _discard(self) -> None:
        """Delete what a run that was killed left behind."""
        self.remove()
        here = Path(self._prefix)
        suffixes = "|".join(TEMPORARY)
        ours = re.compile(rf"(reward\.|column\.[^.]+\.)?({suffixes}){re.escape(PARTIAL)}")
        for path in here.parent.iterdir():
            if path.name.startswith(f"{here.name}.") and ours.fullmatch(path.name[len(here.name) + 1 :]):
                path.unlink()


def _differences(was: dict[str, str], now: dict[str, str]) -> list[str]:
    return [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]


@contextmanager
def locked(prefix: str) -> Generator[None, None, None]:
    """Raises UserError when another process holds the lock of PREFIX."""
    path = Path(f"{prefix}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(fileio.locked(path))
        except BlockingIOError:
            raise UserError(
                f"another `rpo prepare` writes to this output_prefix ({path} is locked): wait for it, or choose another"
            ) from None
        yield
