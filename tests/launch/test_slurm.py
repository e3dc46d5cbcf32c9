"""The batch script's way through a time limit, under a Slurm made of three small commands. Not a real Slurm: what is
tested is what the script does with what Slurm's manual says happens."""

import signal
import time
from pathlib import Path

import pytest

from tests.launch.shell import LAUNCH, finish, shell_environment, start, wait_until, write_command

TORCHRUN = """#!/usr/bin/env bash
# As torchrun with one process, which takes a second to save after SIGTERM and then exits with 75.
bash -c 'trap "sleep 1; echo saved; exit $CODE" TERM; echo started; while :; do sleep 0.1; done' &
wait $!
exit $(($? > 0))
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURMD_NODENAME=node$node "$@" &
  echo $! >>"$TASKS"
done
trap '' USR1
worst=0
for task in $(cat "$TASKS"); do
  code=0
  wait "$task" || code=$?
  worst=$((code > worst ? code : worst))
done
exit "$worst"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>"$CALLS"
kill -USR1 $(cat "$TASKS")
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo node0; echo node1; else echo "scontrol $*" >>"$CALLS"; fi
"""


@pytest.mark.parametrize(
    ("code", "expected", "calls"),
    [
        (75, 75, ["scancel --signal=USR1 77", "scontrol requeue 77"]),
        (0, 0, ["scancel --signal=USR1 77"]),  # the run got done in the meantime
    ],
)
def test_time_limit(code: int, expected: int, calls: list[str], tmp_path: Path) -> None:
    """Catches a job that is requeued (which kills it) before its checkpoint is written, one that is not requeued, and
    one that is although it is done."""
    commands = tmp_path / "bin"
    for name, text in (("torchrun", TORCHRUN), ("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        write_command(commands, name, text)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    files = {"CALLS": str(tmp_path / "calls"), "TASKS": str(tmp_path / "tasks"), "CODE": str(code)}
    log = tmp_path / "log"
    env = shell_environment(commands, **slurm, **files)
    job = start(["bash", str(LAUNCH / "slurm.sbatch"), "train", "run.yaml"], log, **env)
    wait_until(lambda: log.read_text().count("started") == 2, process=job, log=log, timeout=60)
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    got, output = finish(job, log, timeout=60)
    assert output.count("saved") == 2, output
    assert got == expected
    assert (tmp_path / "calls").read_text().splitlines() == calls
