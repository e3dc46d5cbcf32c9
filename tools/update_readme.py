"""Write the table of methods into README.md, where tests/test_readme.py wants it: `make readme`."""

from pathlib import Path

from rpo_megatron.objectives.show import markdown

BEGIN, END = "<!-- begin: rpo methods format=markdown -->\n", "<!-- end -->\n"


def with_table(text: str) -> str:
    """The README's text with the table between its markers replaced by that of the METHODS as they are."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{markdown()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(__file__).resolve().parents[1] / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
