"""Look up a method, check the knobs that a user sets against its row, and print the table. Imports no torch."""

import dataclasses
from collections.abc import Mapping

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.errors import UserError, nearest
from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.row import KnobValue, Method, OneOf


def find(name: str) -> Method:
    """The row called `name`; UserError with the nearest name if there is none."""
    if name not in METHODS:
        raise UserError(
            f"objective.method: there is no method '{name}'{nearest(name, METHODS)} (known: {', '.join(METHODS)})"
        )
    return METHODS[name]


def resolve_knobs(config: ObjectiveConfig) -> dict[str, KnobValue]:
    """What the user set, over the row's defaults: a value for every knob of the method and for no other.

    Raises UserError for an unknown method, a knob that is set but that the method does not use (with the other knobs
    as they are), two knobs that say the same thing, or a value that is not allowed.
    """
    method = find(config.method)
    given = {
        name: value for name, value in dataclasses.asdict(config).items() if name != "method" and value is not None
    }
    for name, value in given.items():
        _check(config.method, method, name, value)
    values = {name: given.get(name, knob.default) for name, knob in method.knobs.items()}
    for name in given:
        knob = method.knobs[name]
        if knob.instead_of in given:
            raise UserError(f"objective.{name} and objective.{knob.instead_of} say the same thing: set one of them")
        if knob.instead_of is not None:
            values[knob.instead_of] = None
        if knob.only_with is not None and not values[knob.only_with]:
            raise UserError(f"objective.{name}: not used while objective.{knob.only_with} is 0; remove it, or set that")
    return values


def columns_read(method: Method, *, knobs: Mapping[str, KnobValue]) -> frozenset[str]:
    """What the method reads with these knobs; see Method.reads."""
    columns = set(method.reads)
    for name, knob in method.knobs.items():
        if isinstance(knob.allowed, OneOf) and (knob.only_with is None or knobs[knob.only_with]):
            columns |= knob.allowed.reads[str(knobs[name])]
    return frozenset(columns)


def describe(name: str, *, knobs: Mapping[str, KnobValue]) -> str:
    """A paragraph for the log: formula, source, normalisation and every knob with its value."""
    method = find(name)
    lines = [
        f"{name}: {method.formula}",
        f"  source: {method.source}",
        f"  normalisation: {method.normalisation}",
        f"  reads: {', '.join(sorted(columns_read(method, knobs=knobs))) or 'log-probabilities only'}",
    ]
    lines += [
        f"  {key} = {knobs[key]}  ({knob.allowed}; {knob.advice})"
        for key, knob in method.knobs.items()
        if knobs[key] is not None and (knob.only_with is None or knobs[knob.only_with])
    ]
    return "\n".join(lines)


def _check(name: str, method: Method, key: str, value: KnobValue) -> None:
    if key not in method.knobs:
        raise UserError(
            f"objective.{key}: method '{name}' does not use it; remove it, or override it with objective.{key}=null "
            f"(its knobs: {', '.join(method.knobs)})"
        )
    knob = method.knobs[key]
    if value not in knob.allowed:
        raise UserError(f"objective.{key}: must be {knob.allowed}, found {value!r} (advice: {knob.advice})")
