"""All benchmarks, one after the other, and what the README shows of them: `make bench` and `make bench-full`.

    python -m tools.bench.suite [--short] [--results DIR] [--only NAME ...]

Writes DIR/NAME.json and DIR/NAME.log, then docs/bench/*.png and the tables in README.md from all files in DIR. A
benchmark that fails does not keep the others from running.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tools.bench import plots, report
from tools.bench.report import BENCHMARKS, ROOT
from tools.update_readme import update

OPTIONS = {"preprocess": ["--trl", sys.executable]}
"""Beside the mode: this environment has TRL."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", dest="mode", action="append_const", const="--short", default=[])
    parser.add_argument("--results", type=Path, default=Path("bench-results"))
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    failed = [name for name in given.only if not run(name, given.results, given.mode)]
    plots.draw(report.read(given.results), ROOT / report.PLOTS)
    update(given.results)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {given.results}/NAME.log")


def run(name: str, results: Path, options: list[str]) -> bool:
    """Run one benchmark; its output goes to the terminal and into a file. True if it went well."""
    print(f"\n=== {name}", flush=True)
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        f"tools.bench.{name}",
        str(results / f"{name}.json"),
        *options,
        *OPTIONS.get(name, []),
    ]
    with (
        (results / f"{name}.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    print(f"=== {name}: {time.monotonic() - began:.0f} s", flush=True)
    return process.returncode == 0


if __name__ == "__main__":
    main()
