"""`rpo VERB --help`, made from config.py."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from rpo_megatron.cli import VERBS
from rpo_megatron.config import RunConfig
from rpo_megatron.knobs import describe


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1e-6
    """How fast,
    in metres per second."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A section."""

    name: str
    """The name."""
    mode: Literal["quick", "slow"] | None = None
    """Mode."""
    inner: Inner = field(default_factory=Inner)
    sizes: list[int] | None = None
    """Sizes."""
    on: bool = True
    """Switch."""
    shape: Literal["round", 3] = "round"
    """Shape."""


def test_description() -> None:
    """Types, defaults and texts, as they would be written in yaml; a section's keys carry its path."""
    assert describe(Example).splitlines() == [
        "  name: str (must be given)",
        "      The name.",
        "  mode: one of quick, slow | null (default null)",
        "      Mode.",
        "  inner.rate: float (default 1e-06)",
        "      How fast, in metres per second.",
        "  sizes: list[int] | null (default null)",
        "      Sizes.",
        "  on: bool (default true)",
        "      Switch.",
        "  shape: one of round, 3 (default round)",
        "      Shape.",
    ]


@pytest.mark.parametrize(
    "config", dict.fromkeys(verb.config for verb in VERBS.values()), ids=lambda config: config.__name__
)
def test_every_knob_is_explained(config: type) -> None:
    """A knob without a sentence in config.py is an empty line in the help."""
    lines = describe(config).splitlines()
    assert all(line.strip() for line in lines)
    entries = [i for i, line in enumerate(lines) if not line.startswith("      ")]
    assert all(lines[i + 1].startswith("      ") for i in entries)


def test_no_python_in_the_help() -> None:
    """`typing.Optional[...]` says nothing to a reader of yaml."""
    text = describe(RunConfig)
    assert "typing" not in text
    assert "None" not in text
    for section in dataclasses.fields(RunConfig):
        assert section.name in text
