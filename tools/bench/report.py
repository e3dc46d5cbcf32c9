"""What benchmarks wrote, as the README shows it: a table for each, with the command, the versions and the machine."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bench.common import cell

BENCHMARKS = ("step", "head", "shared_prompt", "growth", "preprocess", "data_path")
"""In the order of the README; each is a module of this package."""
ROOT = Path(__file__).resolve().parents[2]
PLOTS = Path("docs/bench")
"""From the root of the checkout."""
TITLES = {
    "preprocess": "Preprocessing of preference data",
    "data_path": "Planning of a step: groups to ranks and rows",
}
"""Of benchmarks whose files name none."""


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The documents in a folder of results, by name of the benchmark."""
    files = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.exists()}


def markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """A section for each document, and what they were measured on."""
    lines = [line for name, document in documents.items() for line in _section(name, document)]
    made_on = dict.fromkeys(_made_on(document) for document in documents.values() if "machine" in document)
    return "\n".join([*lines, *made_on])


def _section(name: str, document: Mapping[str, Any]) -> Iterator[str]:
    title = document.get("title") or TITLES.get(name, name)
    yield f"**{title}**, `{document.get('command', f'python -m tools.bench.{name}')}`"
    yield ""
    yield from table(document.get("summary") or document["results"])
    yield ""
    if (ROOT / PLOTS / f"{name}.png").exists():
        yield f"![{title}]({PLOTS}/{name}.png)"
        yield ""


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table with the numbers and words of the rows; lists and the like are left out."""
    columns = [key for key, value in rows[0].items() if isinstance(value, str | int | float)]
    yield f"| {' | '.join(columns)} |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield f"| {' | '.join(cell(row[column]) for column in columns)} |"


def _made_on(document: Mapping[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB; {packages}."
