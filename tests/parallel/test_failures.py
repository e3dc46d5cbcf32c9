"""One rank fails: no hang, one message. One write fails: the checkpoint before it stays in force."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron import cli
from rpo_megatron.config_io import dump
from rpo_megatron.distributed import stop
from rpo_megatron.model.source import newest_checkpoint
from rpo_megatron.training import checkpoint
from tests import tiny
from tests.parallel.launch import ROOT, environment


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("kind", "word"), [("user", "rpo fail: error: file x, line 3: no"), ("bug", "ZeroDivisionError")]
)
def test_one_rank_fails(kind: str, word: str) -> None:
    """Catches ranks that wait for a dead one until a timeout (ten minutes), and a cause buried under their errors."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [sys.executable, *torchrun, "-m", "tests.parallel.one_rank_fails", kind]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert time.monotonic() - began < 90
    assert word in done.stderr
    assert done.stderr.count("Connection closed") == 0, "the other ranks' errors are consequences"
    if kind == "user":
        assert "Root Cause" in done.stderr
        assert word in done.stderr[done.stderr.index("Root Cause") :], "torchrun's last words are ours"


def test_failed_checkpoint_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint that is visible before it is complete, a `latest` that moves too early, half a checkpoint
    that stays: of a step that is written again, of another one, or half deleted."""
    yaml = tmp_path / "run.yaml"
    yaml.write_text(dump(tiny.run_config(tmp_path, "checkpoint.every=1")))
    whole = {"write_json": checkpoint.write_json}

    def disk_full_at_step_2(path: Path, value: Any) -> None:
        if value["step"] == 2:
            raise OSError("no space left on device")
        whole["write_json"](path, value)

    monkeypatch.setattr(checkpoint, "write_json", disk_full_at_step_2)
    assert cli.main(["train", str(yaml)]) == 2
    stop()
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step-00000001"
    monkeypatch.undo()
    for name in ("step-00000002.discarded", "step-00000007.incomplete", "step-00000007.discarded"):
        (newest.parent / f".{name}" / "shards").mkdir(parents=True)
    assert cli.main(["train", str(yaml)]) == 0
    stop()
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step-00000003"
    assert sorted(path.name for path in newest.parent.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_going_back_does_not_remove_what_is_written_next(tmp_path: Path) -> None:
    """Catches a clean-up by step number alone: after `latest` was pointed back, it would remove the checkpoint that it
    has just written in favour of later ones of the abandoned branch."""
    yaml = tmp_path / "run.yaml"
    yaml.write_text(dump(tiny.run_config(tmp_path, "checkpoint.every=1", "checkpoint.keep=3")))
    assert cli.main(["train", str(yaml)]) == 0
    stop()
    folder = tmp_path / "run" / "checkpoints"
    (folder / "latest").write_text("step-00000001\n")
    assert cli.main(["train", str(yaml), "train.stop_at=2", "checkpoint.keep=1"]) == 0
    stop()
    assert newest_checkpoint(tmp_path / "run") == folder / "step-00000002"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000002", "step-00000003"]
