"""The scripts themselves: clean, and every launcher ends in the same torchrun line."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rpo_megatron.config_io import dump
from tests import tiny
from tests.launch.shell import LAUNCH, RECORD, shell_environment, write_command
from tests.parallel.launch import ROOT

SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
WORDS = ["train", "run.yaml", "run_dir=runs/a b"]
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURMD_NODENAME=node$node "$@" &
done
wait
"""
"""An srun that runs its command once per node, here."""


def test_shellcheck() -> None:
    """Catches quoting that splits a path with a space, and variables that are misspelt."""
    program = shutil.which("shellcheck", path=shell_environment()["PATH"])
    if program is None:
        pytest.skip("no shellcheck here; the extra `dev` installs it")
    done = subprocess.run([program, *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def torchrun_lines(command: list[str], tmp_path: Path, **extra: str) -> list[list[str]]:
    """Run a launcher with a torchrun that only notes how it was called; its arguments on each node."""
    commands = write_command(tmp_path / "bin", "torchrun", RECORD)
    write_command(commands, "srun", SRUN)
    write_command(commands, "scontrol", "#!/usr/bin/env bash\necho node0\necho node1\n")
    env = shell_environment(commands, RECORD=str(tmp_path / "called"), **extra)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return [path.read_text().splitlines() for path in sorted(tmp_path.glob("called-*"))]


def as_options(line: list[str]) -> dict[str, str]:
    """Options up to the module, which must come last with the words of rpo."""
    end = line.index("-m")
    assert line[end:] == ["-m", "rpo_megatron", *WORDS]
    return dict(zip(line[0:end:2], line[1:end:2], strict=True))


def container(kind: str) -> tuple[list[str], dict[str, str]]:
    """Command line and plain variables of the pods in a yaml file."""
    documents: list[Any] = list(yaml.safe_load_all((LAUNCH / "kubernetes" / f"{kind}.yaml").read_text()))
    spec = documents[-1]["spec"]
    pod = (spec["pytorchReplicaSpecs"]["Worker"] if kind == "pytorchjob" else spec)["template"]["spec"]
    (found,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in found["env"] if "value" in entry}
    return [*found["command"], *WORDS], variables


@pytest.mark.parametrize("launcher", ["node", "slurm", "job", "pytorchjob"])
def test_all_launchers_end_in_the_line_of_local(launcher: str, tmp_path: Path) -> None:
    """Catches a launcher that lost an option, words that are split at a space, and two nodes that would not meet: one
    host, the same id and place, the right number of nodes."""
    (local,) = torchrun_lines([str(LAUNCH / "local.sh"), "2", *WORDS], tmp_path / "local")
    given = {"NODES": "2", "RENDEZVOUS": "node0:29400", "RUN_ID": "a", "NODE_ADDRESS": "10.0.0.1"}
    if launcher == "slurm":
        slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
        lines = torchrun_lines(["bash", str(LAUNCH / "slurm.sbatch"), *WORDS], tmp_path, **slurm)
    else:
        command, variables = ([str(LAUNCH / "node.sh"), *WORDS], given) if launcher == "node" else container(launcher)
        pod = {"MASTER_ADDR": "rpo-master-0", "MASTER_PORT": "23456", "NODE_ADDRESS": "10.0.0.1", **variables}
        for rank in "01":  # what the yaml takes from the pod, or the operator sets
            lines = torchrun_lines(command, tmp_path, **pod, NODE_RANK=rank, RANK=rank)
    first, second = map(as_options, lines)
    expected = as_options(local)
    assert list(first) == [*list(expected)[:-2], "--local-addr", "--log-dir", "--tee"]
    assert first["--nnodes"] == second["--nnodes"] == "2"
    assert expected["--nnodes"] == "1"
    assert expected["--nproc-per-node"] == "2"
    assert first["--nproc-per-node"] == second["--nproc-per-node"] == "gpu"
    for option in ("--rdzv-id", "--rdzv-endpoint", "--rdzv-backend", "--max-restarts", "--tee"):
        assert first[option] == second[option]
    for option in ("--rdzv-backend", "--max-restarts", "--tee"):
        assert first[option] == expected[option]
    host, _, port = first["--rdzv-endpoint"].rpartition(":")
    assert host
    assert int(port) < 32768, "above that Linux gives ports to anyone"
    assert "is_host=1," in first["--rdzv-conf"]
    assert "is_host=0," in second["--rdzv-conf"]
    assert first["--log-dir"].endswith("/node0")
    assert second["--log-dir"].endswith("/node1")


def test_logs_are_under_run_dir(tmp_path: Path) -> None:
    """Catches logs beside the run: the run_dir of the file, the one on the command line, and none to be known."""
    file = tmp_path / "run.yaml"
    file.write_text(dump(tiny.run_config(tmp_path)))
    for words, expected in (
        (["train", str(file)], f"{tmp_path}/run/logs"),
        (["score", str(file), "--with", "value", "run_dir=x y"], "x y/logs"),
        (["train", str(file), "run_dri=x"], "rpo-logs"),
        (["prepare", "input=a"], "rpo-logs"),
    ):
        done = subprocess.run(
            ["python3", str(LAUNCH / "log_dir.py"), *words], env=shell_environment(), capture_output=True, text=True
        )
        assert done.stdout == f"{expected}\n", done.stderr


@pytest.mark.parametrize("script", ["local.sh", "node.sh", "slurm.sbatch"])
def test_no_words_is_a_usage_message(script: str) -> None:
    """Catches `unbound variable` as the first thing a user sees."""
    done = subprocess.run(["bash", str(LAUNCH / script)], env=shell_environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
