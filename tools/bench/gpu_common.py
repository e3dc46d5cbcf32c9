"""What the benchmarks of gpu.sh share: a log of results that outlives the process that found them, and time and memory
on a GPU. On a CPU everything runs too, in sizes of which the figures mean nothing.

A row of a table is looked up in the log before it is measured, so that a process that is started again only measures
what is missing; a row that was begun but not finished is what ended the process before, and is not tried again.
"""

import argparse
import faulthandler
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.bench.common import cell

DEAD = 3
"""Exit status of a process whose GPU no longer answers after an error."""
ROW_SECONDS = 150
"""What a row may take before its process is ended."""


@dataclass(frozen=True)
class Log:
    """A file of rows, one JSON object per line."""

    path: Path | None

    def rows(self) -> list[dict[str, Any]]:
        """The finished ones, and those that ended their process."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for row in self._lines():
            broken = {"note": "ended its process (crash, or out of time)"}
            rows[row["table"], row["name"]] = (
                row if "begun" not in row else {k: row[k] for k in ("table", "name")} | broken
            )
        return list(rows.values())

    def add(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def has(self, table: str, name: str) -> bool:
        return any(row["table"] == table and row["name"] == name for row in self._lines())

    def _lines(self) -> list[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    log: Log
    until: float
    """When to begin nothing more (seconds since the epoch)."""

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless an earlier process has, and print it. Ends the process where the GPU is gone."""
        if self.log.has(self.title, name):
            return
        head = {"table": self.title, "name": name}
        if time.time() > self.until:
            print(f"{name:<44} not begun: the time is over", flush=True)
            return
        self.log.add({**head, "begun": True})
        faulthandler.dump_traceback_later(ROW_SECONDS, exit=True, file=2)
        try:
            found = measure()
        except Exception as error:  # the other rows are measured all the same
            found = {"note": f"{type(error).__name__}: {error}".splitlines()[0][:110]}
        faulthandler.cancel_dump_traceback_later()
        self.log.add({**head, **found})
        print(
            f"{name:<44} " + "  ".join(f"{key} {cell(value)}" for key, value in found.items() if value != ""),
            flush=True,
        )
        clean_up()


def clean_up() -> None:
    """Give the memory of a row back. Ends the process where the GPU no longer answers."""
    gc.collect()
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the GPU is gone: {error}".splitlines()[0], flush=True)
        sys.exit(DEAD)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, help="append what is found to this file of JSON lines")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="begin nothing after (seconds since the epoch)"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes for any machine, only to see it run")


def table(title: str, arguments: argparse.Namespace) -> Table:
    print(f"\n{title}", flush=True)
    return Table(title=title, log=Log(arguments.results), until=arguments.until)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], *, warm_up: int, rounds: int) -> list[float]:
    """Of each round, the GPU's work included."""
    times = []
    for number in range(warm_up + rounds):
        wait()
        began = time.perf_counter()
        run()
        wait()
        if number >= warm_up:
            times.append(time.perf_counter() - began)
    return times


def kernel(run: Callable[[], Any], *, flop: float, rounds: int = 10) -> dict[str, Any]:
    """Median milliseconds, TFLOP/s, and the most memory that a run takes beyond what was there before."""
    for _ in range(3):
        run()
    wait()
    before = 0
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times = _events(run, rounds) if torch.cuda.is_available() else seconds_of(run, warm_up=0, rounds=rounds)
    seconds = statistics.median(times)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20 if torch.cuda.is_available() else float("nan")
    return {"ms": seconds * 1e3, "TFLOP/s": flop / seconds / 1e12, "MiB": memory}


def _events(run: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds on the GPU's own clock."""
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def matmul_ceiling() -> float:
    """FLOP/s of the fastest of a few large bf16 multiplications."""
    best = 0.0
    for size in (4096, 8192) if torch.cuda.is_available() else (256,):
        a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
        best = max(best, 2 * size**3 / min(seconds_of(lambda a=a, b=b: a @ b, warm_up=3, rounds=20)))  # type: ignore[misc]
    return best
