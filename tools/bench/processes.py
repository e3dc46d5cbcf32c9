"""A function in processes of its own: several ranks that talk over gloo, or one whose peak memory is to be known."""

import gc
import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.multiprocessing

from rpo_megatron import distributed

T = TypeVar("T")
PRELOAD = ["tools.bench", "tools.bench.ours", "tools.bench.trl_peer"]
"""Imported once, by the process that all others are forked from; what is not installed is passed over."""
MIB = 2**20


def run(function: Callable[..., T], *arguments: Any, ranks: int = 1, num_threads: int) -> list[T]:
    """Results of `function(*arguments)`, by rank. It must be at the top level of a module; if it raises, so does this,
    with the rank's traceback."""
    # Memory that is freed goes back to the system at once, so that the peak is that of living tensors.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(256 * 2**10)
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        given = function, arguments, ranks, num_threads, _free_port(), Path(folder)
        torch.multiprocessing.start_processes(_worker, given, nprocs=ranks, start_method="forkserver")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _worker(
    rank: int, function: Callable[..., T], arguments: Any, ranks: int, num_threads: int, port: int, folder: Path
) -> None:
    torch.set_num_threads(num_threads)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    result = function(*arguments)
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    distributed.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Memory of this process above what it held when this was made (Linux only)."""

    before: float

    @classmethod
    def start(cls) -> "Peak":
        gc.collect()
        return cls(before=_status("VmRSS"))

    def of(self, function: Callable[[], object]) -> float:
        """MiB at the highest point of `function`."""
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        function()
        return _status("VmHWM") - self.before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith(field))
