"""Asking a run to stop: real processes, real signals."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron import distributed
from rpo_megatron.config import ParallelConfig
from rpo_megatron.model.source import newest_checkpoint, read_state
from rpo_megatron.training.signals import SIGNALS, STOPPED, StopSignals, Vote
from tests.launch.shell import (
    LAUNCH,
    STEPS,
    children,
    finish,
    lines_of,
    shell_environment,
    start,
    wait_until,
    write_config,
)
from tests.parallel import launch


def local(log: Path, *words: str) -> Any:
    return start([str(LAUNCH / "local.sh"), "2", *words], log, **shell_environment())


@pytest.mark.parallel
def test_a_signal_leaves_a_checkpoint_that_goes_on_bit_identically(tmp_path: Path) -> None:
    """Catches a run that dies of the signal, ranks that stop after different steps (which hangs), a checkpoint that is
    not that of its step, and an exit code that a scheduler takes for done."""
    yaml, log, run_dir = write_config(tmp_path), tmp_path / "log", tmp_path / "run"
    process = local(log, "train", yaml)
    wait_until(lambda: len(lines_of(run_dir)) >= 3, process=process, log=log, timeout=120)
    asked_at = len(lines_of(run_dir))
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, log, timeout=60)
    assert code == STOPPED, output[-4000:]
    newest = newest_checkpoint(run_dir)
    assert newest is not None
    stopped = read_state(newest)["step"]
    assert asked_at <= stopped < STEPS
    assert f"stopped by a signal after step {stopped}" in output
    assert [line["step"] for line in lines_of(run_dir)] == list(range(1, stopped + 1))

    until = f"train.stop_at={stopped + 3}"
    for folder in (run_dir, tmp_path / "whole"):
        code, output = finish(local(log, "train", yaml, until, f"run_dir={folder}"), log, timeout=240)
        assert code == 0, output[-4000:]
        assert ("resumed from" in output) == (folder == run_dir)
    resumed = lines_of(run_dir)
    assert len(resumed) == stopped + 3
    assert resumed == lines_of(tmp_path / "whole")


@pytest.mark.parallel
def test_only_one_process_gets_the_signal(tmp_path: Path) -> None:
    """Catches ranks that look at their own signal only: the others would wait for the one that stopped."""
    yaml, log, run_dir = write_config(tmp_path), tmp_path / "log", tmp_path / "run"
    process = local(log, "train", yaml)
    wait_until(lambda: len(lines_of(run_dir)) >= 3, process=process, log=log, timeout=120)
    torchrun = children(process.pid)[0]
    (worker,) = (pid for pid in children(torchrun) if "RANK=1" in _environment(pid))
    os.kill(worker, signal.SIGUSR1)
    code, output = finish(process, log, timeout=60)
    assert "stopped by a signal after step" in output, output[-4000:]
    assert code == 1, "torchrun's: node.sh itself was not asked"
    assert newest_checkpoint(run_dir) is not None


@pytest.mark.parallel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_ctrl_c_ends_everything_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """Catches processes that outlive Ctrl-C or the terminal: bash has background jobs ignore the one, and the other
    goes to the foreground alone."""
    yaml, log, run_dir = write_config(tmp_path), tmp_path / "log", tmp_path / "run"
    process = local(log, "train", yaml)
    wait_until(lambda: len(lines_of(run_dir)) >= 3, process=process, log=log, timeout=120)
    torchrun = children(process.pid)[0]
    workers = children(torchrun)
    process.send_signal(number)
    code, output = finish(process, log, timeout=25)
    assert code not in (0, STOPPED), output[-4000:]
    assert newest_checkpoint(run_dir) is None
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in [torchrun, *workers])


def votes() -> list[bool]:
    """Six rounds, in the third of which rank 1 says yes."""
    groups = distributed.start(ParallelConfig())
    vote = Vote(groups.device)
    return [vote(groups.rank == 1 and turn == 2) for turn in range(6)]


@pytest.mark.parallel
def test_votes_agree(tmp_path: Path) -> None:
    """Catches ranks that disagree about the round, and a verdict that is forgotten or stays."""
    for found in launch.run("tests.launch.test_signals:votes", processes=3, directory=tmp_path):
        assert found == [False, False, False, True, False, False]


def test_handlers_are_put_back() -> None:
    """Catches a process that cannot be ended by SIGTERM once it has trained."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as signals:
        assert not signals.received
        signal.raise_signal(signal.SIGTERM)
        assert signals.received
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")
