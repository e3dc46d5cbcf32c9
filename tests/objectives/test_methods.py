"""The table of methods: that every row fits the letters it names, and that its knobs and columns are what they read."""

import dataclasses
import inspect
import subprocess
import sys
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.errors import UserError
from rpo_megatron.objectives import anchors, distances, outside, rewards, selections, targets
from rpo_megatron.objectives.catalogue import resolve_knobs
from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.row import Method, OneOf

HINTS = get_type_hints(ObjectiveConfig)
KNOBS = [name for name in HINTS if name != "method"]
COLUMNS = {"ref_logp", "token_kl", "reward", "rewards", "source", "length", "value"}


def letters(method: Method) -> list[object]:
    """Every function that the row names."""
    found = [getattr(selections, method.selection)] + [getattr(anchors, anchor.term) for anchor in method.anchors]
    for row in method.divergences:
        found += [getattr(rewards, row.score), getattr(targets, row.target), getattr(distances, row.distance)]
    if method.outside is not None:
        found.append(getattr(outside, method.outside))
    if method.implicit is not None:
        found.append(getattr(rewards, method.implicit))
    return found


def arguments(method: Method) -> set[str]:
    """Keyword-only arguments of the letters, and the knobs that are weights."""
    weights = {row.weight for row in method.divergences} | {row.weight for row in method.anchors}
    return {weight for weight in weights if isinstance(weight, str)} | {
        parameter.name
        for letter in letters(method)
        for parameter in inspect.signature(letter).parameters.values()  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY
    }


@pytest.mark.parametrize("module", ["methods", "catalogue", "show", "row", "shared_knobs"])
def test_table_loads_without_torch(module: str) -> None:
    """`rpo config` and `rpo methods` taking seconds because a torch-free file began to import torch."""
    code = f"import sys, rpo_megatron.objectives.{module}; sys.exit(bool(sys.modules.keys() & {{'torch', 'numpy'}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", METHODS)
def test_knobs_are_those_of_the_letters(name: str) -> None:
    """A row that offers a knob no letter reads, lacks one that a letter needs, or fixes what nothing reads."""
    method = METHODS[name]
    assert set(method.knobs) | set(method.fixed) == arguments(method)
    assert not set(method.knobs) & set(method.fixed)
    assert set(method.knobs) <= set(KNOBS)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_allowed(name: str) -> None:
    """A row that cannot be used as it stands, or whose default is only good until it is written down."""
    knobs = METHODS[name].knobs
    for key, knob in knobs.items():
        assert knob.advice
        if knob.default is None:
            assert knob.instead_of in knobs, f"{key} has no default"
        else:
            assert knob.default in knob.allowed
    anchored = {knob.only_with: 0.5 for knob in knobs.values() if knob.only_with is not None}
    written: dict[str, Any] = {key: knob.default for key, knob in knobs.items() if knob.default is not None} | anchored
    assert resolve_knobs(ObjectiveConfig(method=name, **written)) == {key: None for key in knobs} | written


@pytest.mark.parametrize("name", METHODS)
def test_unused_knobs_are_rejected_by_name(name: str) -> None:
    """A knob that is set, does nothing and says nothing."""
    for key in KNOBS:
        words = [word for word in get_args(get_args(HINTS[key])[0])] or [0.125]
        if key not in METHODS[name].knobs:
            with pytest.raises(UserError, match=rf"objective\.{key}: method '{name}' does not use it"):
                resolve_knobs(ObjectiveConfig(method=name, **{key: words[0]}))


@pytest.mark.parametrize("name", METHODS)
def test_knobs_of_a_switched_off_term_are_rejected(name: str) -> None:
    """A setting of a term whose weight is 0: it would do nothing."""
    for key, knob in METHODS[name].knobs.items():
        if knob.only_with is not None:
            off = ObjectiveConfig(method=name, **{knob.only_with: 0.0, key: knob.default})  # type: ignore[arg-type]
            with pytest.raises(UserError, match=rf"objective\.{key}: not used while objective\.{knob.only_with} is 0"):
                resolve_knobs(off)


@pytest.mark.parametrize("name", METHODS)
def test_rows_say_what_they_are(name: str) -> None:
    """A row without formula, source or normalisation; a column that no batch has; a value that a policy method reads;
    a term that has neither divergence, outside loss nor anchor."""
    method = METHODS[name]
    assert method.formula
    assert method.source
    assert method.normalisation
    words = [knob.allowed for knob in method.knobs.values() if isinstance(knob.allowed, OneOf)]
    assert method.reads.union(*(reads for word in words for reads in word.reads.values())) <= COLUMNS
    assert ("value" in method.reads) == (method.kind == "reward model")
    assert method.divergences or method.outside or method.anchors


def test_config_and_table_know_the_same_knobs() -> None:
    """A word that a row allows and the config rejects, or the other way round; a knob of the config that no method
    reads; a number where the table has words."""
    for key in KNOBS:
        rows = [method.knobs[key].allowed for method in METHODS.values() if key in method.knobs]
        assert rows, f"no method reads objective.{key}"
        kinds = {type(allowed) for allowed in rows}
        assert len(kinds) == 1
        of_config = {word for hint in get_args(HINTS[key]) for word in get_args(hint)}
        of_rows = {word for allowed in rows if isinstance(allowed, OneOf) for word in allowed.reads}
        assert of_rows == of_config
        assert of_config or set(get_args(HINTS[key])) == {float, NoneType}
    assert all(field.default is None for field in dataclasses.fields(ObjectiveConfig) if field.name != "method")
