"""Write what README.md shows of the program between its markers: `make readme`.

The table of methods comes from METHODS, and tests/test_readme.py wants it to be current. The benchmarks' figures come
from the files that `make bench` wrote, where there are any; without them, what is there stays.
"""

import sys
from pathlib import Path

from rpo_megatron.objectives.show import markdown

BEGIN, END = "<!-- begin: rpo methods format=markdown -->\n", "<!-- end -->\n"
BEGIN_BENCH = "<!-- begin: bench -->\n"
ROOT = Path(__file__).resolve().parents[1]


def with_table(text: str) -> str:
    """The README's text with the table between its markers replaced by that of the METHODS as they are."""
    return between(text, BEGIN, markdown() + "\n")


def between(text: str, begin: str, content: str) -> str:
    """The text with everything between a marker and the next END replaced; unchanged where it has no such marker."""
    before, found, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}{content}{END}{after}" if found else text


def update(results: Path) -> None:
    """Bring README.md up to date, with the benchmarks' figures of the folder `results` if there are any."""
    path = ROOT / "README.md"
    text = with_table(path.read_text(encoding="utf-8"))
    if any(results.glob("*.json")):
        from tools.bench import report

        if BEGIN_BENCH not in text:
            print(
                f"README.md has no {BEGIN_BENCH.strip()} ... {END.strip()} for the benchmarks' figures", file=sys.stderr
            )
        text = between(text, BEGIN_BENCH, report.markdown(report.read(results)) + "\n")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    update(ROOT / "bench-results")
