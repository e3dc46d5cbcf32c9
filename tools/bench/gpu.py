"""The driver of gpu.sh: parts, each a list of processes with a time limit, and the table of everything they found.

1. `tests`: pytest, one process for each file of tests/gpu.
2. `kernels`, `steps`, `fp8`: gpu_kernels, gpu_step and gpu_curves, a process for each table. What they measure they
   append to OUT/PART.jsonl at once (gpu_common.py). One that dies or hangs, or whose GPU no longer answers, is started
   again and goes on after what broke it.
3. `report`: one table of all that is in OUT; needs no GPU.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.common import print_table
from tools.bench.gpu_common import Log

ROOT = Path(__file__).parents[2]
RESTARTS = 6


@dataclass(frozen=True, kw_only=True)
class Part:
    minutes: float
    """After which nothing new is begun."""
    commands: tuple[tuple[str, ...], ...]
    """Modules of tools.bench with their arguments."""


PARTS = {
    "kernels": Part(
        minutes=5, commands=(("gpu_kernels", "head"), ("gpu_kernels", "attention"), ("gpu_kernels", "tiles"))
    ),
    "steps": Part(
        minutes=8.5,
        commands=tuple(
            ("gpu_step", "--model", model, "--responses", responses, "--first", first)
            for responses, first in (("4", "99"), ("2", "6"))
            for model in ("8b-slice", "1b")
        ),
    ),
    "fp8": Part(minutes=6, commands=(("gpu_curves",),)),
}
TEST_MINUTES = 6.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"tests, {', '.join(PARTS)}, report; all without any")
    parser.add_argument("--tiny", action="store_true", help="sizes for any machine, only to see it run")
    arguments = parser.parse_args()
    parts = arguments.parts or ["tests", *PARTS, "report"]
    if unknown := set(parts) - {"tests", *PARTS, "report"}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}")
    out = Path(os.environ.get("OUT", "bench-results/gpu"))
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    for part in parts:
        if part == "tests":
            status = run_tests(out)
        elif part in PARTS:
            run_part(PARTS[part], out / f"{part}.jsonl", tiny=arguments.tiny)
    report(out, parts)
    return status


def run_tests(out: Path) -> int:
    """Versions and devices, then the tests. 1 if one of them failed or ran out of time."""
    until, failed = time.time() + 60 * TEST_MINUTES, False
    log = out / "tests.txt"
    _stream([sys.executable, "-m", "rpo_megatron", "doctor"], log, seconds=60)
    for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        seconds = until - time.time()
        if seconds < 20:
            _note(log, f"{file.name}: not begun, the time is over")
            failed = True
            continue
        command = [sys.executable, "-m", "pytest", str(file), "-s", "-q", "-p", "no:cacheprovider"]
        failed |= _stream(command, log, seconds=seconds) != 0
    return int(failed)


def run_part(part: Part, results: Path, *, tiny: bool) -> None:
    until = time.time() + 60 * part.minutes
    log = results.with_suffix(".log")
    for module, *arguments in part.commands:
        for _ in range(RESTARTS):
            before = results.stat().st_size if results.exists() else 0
            seconds = until - time.time()
            if seconds < 20:
                _note(log, f"{module} {' '.join(arguments)}: the time is over")
                break
            options = ["--results", str(results), "--until", f"{until:.0f}", *["--tiny"] * tiny]
            command = [sys.executable, "-m", f"tools.bench.{module}", *arguments, *options]
            # A process that looks at the clock itself gets some grace to end well.
            done = _stream(command, log, seconds=seconds + 45) == 0
            if done or not results.exists() or results.stat().st_size == before:
                break


def report(out: Path, parts: list[str]) -> None:
    """Print everything that is in `out`, the parts that were asked for first."""
    for name in [*[part for part in parts if part in PARTS], *[part for part in PARTS if part not in parts]]:
        rows = Log(out / f"{name}.jsonl").rows()
        for title in dict.fromkeys(row["table"] for row in rows):
            own = [
                {key: value for key, value in row.items() if key != "table"} for row in rows if row["table"] == title
            ]
            columns = dict.fromkeys(key for row in own for key in row if key != "note")
            notes = ["note"] * any("note" in row for row in own)
            print_table(title, [{key: _short(row.get(key, "")) for key in (*columns, *notes)} for row in own])
    if (out / "tests.txt").exists():
        text = (out / "tests.txt").read_text(encoding="utf-8", errors="replace")
        for line in re.findall(
            r"^(?:FAILED .*|ERROR .*|=* ?\d+ (?:passed|failed|skipped).*|.*the time is over.*)$", text, re.M
        ):
            print(line[:160])


def _short(value: Any) -> Any:
    return value[:70] if isinstance(value, str) else value


def _stream(command: list[str], log: Path, *, seconds: float) -> int:
    """The exit status of a command whose output goes to the screen and the log; 124 where it ran out of time."""
    _note(log, "$ " + " ".join(command[1:]))
    with log.open("ab") as file:
        process = subprocess.Popen(
            ["timeout", "-k", "10", str(int(seconds)), *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            file.write(line)
        status = process.wait()
    if status:
        _note(log, f"ended with status {status}")
    return status


def _note(log: Path, text: str) -> None:
    print(text, flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
