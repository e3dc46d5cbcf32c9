"""The launchers as users start them, with the real torchrun or with commands that a test puts in place of it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpo_megatron.config_io import dump
from tests import tiny
from tests.parallel.launch import ROOT, environment

LAUNCH = ROOT / "launch"
STEPS = 100_000
TIMES = ("tokens_per_second", "step_seconds", "memory_gb")
RECORD = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$RECORD-$NODE_RANK"\n'
"""A torchrun that writes its arguments, one on a line, to the file $RECORD-NODE_RANK."""


def shell_environment(*commands: Path, **extra: str) -> dict[str, str]:
    """This Python's torchrun first on the path, but for the folders `commands`; no variables of another launcher."""
    python = Path(sys.executable).parent
    clean = {
        key: value for key, value in environment().items() if not key.startswith(("SLURM", "TORCHELASTIC", "PET_"))
    }
    path = os.pathsep.join([*map(str, commands), str(python), os.environ["PATH"]])
    return {**clean, "PATH": path, "VIRTUAL_ENV": str(python.parent), **extra}


def write_command(folder: Path, name: str, text: str) -> Path:
    """An executable file; gives its folder, for the path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return folder


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without times; a last line that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def write_config(directory: Path) -> str:
    """A tiny run of more steps than a test waits for."""
    file = directory / "run.yaml"
    overrides = (f"train.steps={STEPS}", "optimizer.schedule=cosine", "optimizer.warmup_steps=5", "optimizer.lr=1e-3")
    file.write_text(dump(tiny.run_config(directory, *overrides)))
    return str(file)


def start(command: list[str], log: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """In the background, with all output in `log`. It hears signals that the tests do not, if they run in a shell's
    background or under nohup."""

    def hear() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=hear
        )


def wait_until(condition: Callable[[], bool], *, process: "subprocess.Popen[bytes]", log: Path, timeout: float) -> None:
    """Fails the test with the end of the log if the process ends first, or nothing happens."""
    until = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            kill_all(process)
            raise AssertionError(f"exit code {process.poll()} before it happened\n{log.read_text()[-4000:]}")
        time.sleep(0.1)


def finish(process: "subprocess.Popen[bytes]", log: Path, *, timeout: float) -> tuple[int, str]:
    """Exit code and output."""
    try:
        code = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise AssertionError(f"still running after {timeout} s\n{log.read_text()[-4000:]}") from None
    return code, log.read_text()


def children(pid: int) -> list[int]:
    """Of a process: on Linux, each of its threads has a list."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in lists for word in text.split()]


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """The process, if it still runs, and what it started: torchrun has a process group of its own."""
    found = [process.pid] if process.poll() is None else []
    for pid in found:
        found += children(pid)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
