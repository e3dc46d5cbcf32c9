"""The driver of gpu.sh: one failure must not stop, repeat or hide the rest. What it measures needs a GPU."""

import time
from pathlib import Path
from typing import Any

import pytest

from tools.bench import gpu
from tools.bench.gpu_common import Log, Table


def fails() -> dict[str, Any]:
    raise RuntimeError("no such kernel\nat all")


def test_rows_that_fail_and_rows_that_end_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a row that is measured again after a restart, or one that ends every process that comes to it; a failure
    without its reason; and rows that are begun when the time is over."""
    log = Log(tmp_path / "kernels.jsonl")
    table = Table(title="a table", log=log, until=time.time() + 60)
    table.row("good", lambda: {"ms": 1.5})
    table.row("bad", fails)
    log.add({"table": "a table", "name": "deadly", "begun": True})
    again = Table(title="a table", log=log, until=time.time() + 60)
    for name in ("good", "bad", "deadly"):
        again.row(name, lambda: {"ms": 99.0})
    Table(title="a table", log=log, until=0.0).row("late", lambda: {"ms": 99.0})
    found = {row["name"]: row for row in log.rows()}
    assert found.keys() == {"good", "bad", "deadly"}
    assert found["good"]["ms"] == 1.5
    assert found["bad"]["note"] == "RuntimeError: no such kernel"
    assert "ended its process" in found["deadly"]["note"]
    (tmp_path / "tests.txt").write_text("..s\nFAILED tests/gpu/test_x.py::test_y - no\n1 failed, 2 passed in 3.2s\n")
    capsys.readouterr()
    gpu.report(tmp_path, ["report"])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[3:6]] == ["good", "bad", "deadly"]
    assert "FAILED tests/gpu/test_x.py::test_y" in printed
    assert "1 failed, 2 passed" in printed


def test_a_process_that_ends_early_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a restart for ever, none at all, or one of a process that ended well."""
    results, calls = tmp_path / "part.jsonl", []

    def process(command: list[str], log: Path, *, seconds: float) -> int:
        calls.append(command[2])
        if len(calls) <= 2:
            Log(results).add({"table": "t", "name": f"{len(calls)}"})
        return 0 if len(calls) in (3, 4) else 3

    monkeypatch.setattr(gpu, "_stream", process)
    part = gpu.Part(minutes=1, commands=(("one",), ("two",), ("three",)))
    gpu.run_part(part, results, tiny=False)
    assert calls == [f"tools.bench.{name}" for name in ("one", "one", "one", "two", "three")]
