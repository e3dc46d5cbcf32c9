"""Run a function in several real processes (gloo) and bring its results back.

    results = run("tests.parallel.jobs:some_function", processes=4, directory=tmp_path, argument=...)

Each process calls the function with the keyword arguments and its return value comes back, by rank. A process that
fails fails the test with the end of its output; one that hangs is killed after `timeout` seconds.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """For subprocesses: this checkout on the path, one thread each."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def run(function: str, *, processes: int, directory: Path, timeout: float = 600.0, **arguments: Any) -> list[Any]:
    """Results of `module:function` from every rank."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, directory / "arguments.pt")
    port = free_port()
    workers = []
    for rank in range(processes):
        extra = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        log = (directory / f"rank{rank}.log").open("w")
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.parallel.launch", function, str(directory)],
                env=environment(**{key: str(value) for key, value in extra.items()}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    _wait(workers, directory, timeout)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


def rpo(*words: str, processes: int = 1, timeout: float = 600.0) -> "subprocess.CompletedProcess[str]":
    """The command line as a user runs it: `python -m rpo_megatron ...`, under torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "rpo_megatron", *words]
    return subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )


def _wait(workers: list["subprocess.Popen[bytes]"], directory: Path, timeout: float) -> None:
    try:
        codes = [worker.wait(timeout=timeout) for worker in workers]
    except subprocess.TimeoutExpired:
        codes = [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(code != 0 for code in codes):
        logs = "\n".join(
            f"--- rank {r}\n{(directory / f'rank{r}.log').read_text()[-3000:]}" for r in range(len(workers))
        )
        raise AssertionError(f"exit codes {codes} (None: killed after {timeout} s)\n{logs}")


def _main(function: str, directory: str) -> None:
    from rpo_megatron import cpu, distributed

    cpu.enable()
    torch.set_num_threads(1)
    module, _, name = function.partition(":")
    arguments = torch.load(Path(directory) / "arguments.pt", weights_only=False)
    result = getattr(importlib.import_module(module), name)(**arguments)
    torch.save(result, Path(directory) / f"rank{os.environ['RANK']}.pt")
    distributed.stop()


if __name__ == "__main__":
    _main(*sys.argv[1:])
