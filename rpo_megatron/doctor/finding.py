"""What an examination says: that something is right, or what is not and what to do."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["OK", "note", "problem"]
"""`note`: a run works, but. `problem`: it will not work, or not rightly."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    level: Level
    what: str
    advice: str = ""
    """What to do; empty for OK."""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.what}" + (f"\n         -> {self.advice}" if self.advice else "")


def ok(what: str) -> Finding:
    return Finding(level="OK", what=what)


def note(what: str, advice: str) -> Finding:
    return Finding(level="note", what=what, advice=advice)


def problem(what: str, advice: str) -> Finding:
    return Finding(level="problem", what=what, advice=advice)
