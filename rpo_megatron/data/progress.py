"""A progress bar with rate and time left, on stderr: redrawn on a terminal, a line every ten seconds elsewhere."""

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts up to a total that is estimated from the share of the input that was read."""

    def __init__(self, *, unit: str, limit: int | None = None, done: int = 0) -> None:
        """`limit` is the most that will be counted, if that is known; `done` were counted by an earlier run."""
        self._limit = limit
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            unit=unit,
            unit_scale=True,
            initial=done,
            file=sys.stderr if on_terminal else _Lines(),
            mininterval=0.2 if on_terminal else 10.0,
            delay=0.0 if on_terminal else 10.0,  # a line of a log that says "0" says nothing
            miniters=1,
            ncols=None if on_terminal else 80,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.n:
            self._bar.delay = 0.0  # the end has its line, however soon it comes
        self._bar.close()

    def advance(self, count: int, *, fraction: float) -> None:
        """`count` more are done; the input is read up to `fraction`, in 0..1."""
        total = (self._bar.n + count) / fraction
        self._bar.total = round(total if self._limit is None else min(total, self._limit))
        self._bar.update(count)


class _Lines:
    """What tqdm redraws over itself becomes lines of a log."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
