"""docs/scaling.md says what the planner says."""

import re

from rpo_megatron.cli import VERBS
from rpo_megatron.planning.models import count_parameters, find_model
from tools.scaling_tables import DOCUMENT, MODELS, TABLES, with_tables

TEXT = DOCUMENT.read_text(encoding="utf-8")


def test_tables_are_current() -> None:
    """Catches a formula or an assumption that changed and not the document (`python tools/scaling_tables.py` mends it);
    one that is left out, or empty."""
    assert with_tables(TEXT) == TEXT
    for name in TABLES:
        table = TEXT.split(f"<!-- begin: {name} -->")[1].split("<!-- end")[0]
        assert len(table.strip().splitlines()) > 5
    assert all(title in TEXT for title in MODELS.values())


def test_every_table_has_as_many_cells_in_every_row() -> None:
    """Catches a row that a browser would show shifted."""
    for name in TABLES:
        rows = TEXT.split(f"<!-- begin: {name} -->")[1].split("<!-- end")[0].strip().splitlines()
        assert len({row.count("|") for row in rows}) == 1


def test_text_is_true() -> None:
    """The sizes of checkpoints in the text, the commands, and that nothing reads like a measurement."""
    sizes = {"8B": "112 GB", "70B": "988 GB", "405B": "5.7 TB"}
    for size, shown in sizes.items():
        number = 14 * count_parameters(find_model(f"llama-3.1-{size.lower()}"))
        assert shown == (f"{number / 1e12:.1f} TB" if number >= 1e12 else f"{number / 1e9:.0f} GB")
        assert f"{shown} for {size}" in TEXT
    assert "estimate, not measured" in TEXT
    assert set(re.findall(r"^rpo ([a-z]+)", TEXT, re.MULTILINE)) <= VERBS.keys()
