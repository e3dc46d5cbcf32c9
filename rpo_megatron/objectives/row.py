"""What a row of METHODS is made of. Imports no torch.

A method is a sum of divergences  weight * D[ score || target ]  over the responses that its selection picks, plus
anchors. A row names the letters; each is the function of that name in the file of that kind:

    selection  selections.py   which responses of a group take part: all, a pair, every pair, a mixture
    score      rewards.py      what the policy thinks a response is worth
    target     targets.py      what it should be worth
    distance   distances.py    how far the two are apart, per group
    anchors    anchors.py      terms besides the distances, over the whole group

A letter's keyword-only arguments are the knobs that it reads, or the row's `fixed` values. Terms that no score, target
and distance can express are written out in outside.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

KnobValue = float | str | None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Allowed numbers. The upper end is always excluded, so infinity never passes; NaN is in no interval."""

    low: float
    low_included: bool
    high: float = math.inf
    high_included: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        above = self.low < value or (self.low_included and value == self.low)
        return above and (value < self.high or (self.high_included and value == self.high))

    def __str__(self) -> str:
        left, right = "[" if self.low_included else "(", "]" if self.high_included else ")"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """Allowed words, each with the extra columns that choosing it makes the method read."""

    reads: Mapping[str, frozenset[str]]

    def __contains__(self, value: object) -> bool:
        return value in self.reads

    def __str__(self) -> str:
        return f"one of {', '.join(self.reads)}"


@dataclass(frozen=True, kw_only=True)
class Knob:
    default: KnobValue
    """None: not set, for one of two knobs that say the same thing."""
    allowed: Interval | OneOf
    advice: str
    """Which values to try, and who recommends them."""
    instead_of: str | None = None
    """Another knob that says the same thing: setting both is an error, setting this one unsets the other."""
    only_with: str | None = None
    """The knob that weighs the term which this one belongs to: with weight 0 neither this knob nor what it reads is
    used."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """weight * distance[score || target], by the names of the functions."""

    score: str
    target: str
    distance: str
    weight: float | str = 1.0
    """A number, or the knob that holds it."""
    worst_case: bool = False
    """One distance per reward column of the ensemble, of which the smallest counts."""


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A term over the whole group, whatever the selection: the function of this name in anchors.py."""

    term: str
    weight: float | str = 1.0
    """A number, or the knob that holds it; with weight 0 the term is left out."""


@dataclass(frozen=True, kw_only=True)
class Method:
    formula: str
    """Loss of one group."""
    source: str
    """Paper and equation."""
    normalisation: str
    """What is summed and what is averaged, in words: learning rates depend on it."""
    selection: str
    reads: frozenset[str]
    """What it needs besides the policy's log-probabilities, of: `ref_logp`, `token_kl` (the reference's distributions),
    `reward`, `rewards` (each column of an ensemble), `source`, `length`, `value` (a scalar head in place of
    log-probabilities). A knob may add to them."""
    knobs: Mapping[str, Knob]
    divergences: tuple[Divergence, ...] = ()
    outside: str | None = None
    """Function of outside.py: a loss that is no distance between scores and targets."""
    anchors: tuple[Anchor, ...] = ()
    fixed: Mapping[str, KnobValue] = field(default_factory=dict)
    """Arguments of letters that are constants of this method and no knobs."""
    implicit: str | None = "implicit"
    """Function of rewards.py: what the trained model thinks a response is worth, for statistics and evaluation; None
    for a method without such a notion."""
    kind: Literal["policy", "reward model"] = "policy"
