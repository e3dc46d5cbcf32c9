"""What the README says of the program is what the program says."""

import re
from pathlib import Path

from rpo_megatron.cli import VERBS
from rpo_megatron.objectives.methods import METHODS
from tools.update_readme import BEGIN, with_table

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_table_of_methods_is_current() -> None:
    """Catches a method, knob or default that changed in METHODS and not in the README (`make readme` mends it)."""
    assert README.count(BEGIN) == 1
    assert with_table(README) == README
    assert all(f"| `{name}` |" in README for name in METHODS)


def test_verbs_exist() -> None:
    """Catches a command in the README that the command line does not have."""
    used = set(re.findall(r"^(?:rpo|.* -m rpo_megatron) ([a-z]+)", README, re.MULTILINE))
    assert used
    assert used <= VERBS.keys()
