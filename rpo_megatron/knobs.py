"""`rpo VERB --help`: the knobs of a config class with type, default and the text under each field in config.py."""

import ast
import dataclasses
import inspect
import textwrap
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def describe(config: type, *, prefix: str = "") -> str:
    """One entry per knob, sections first named by their path. Read from the source, so it cannot drift from it."""
    texts = _field_texts(config)
    hints = get_type_hints(config)
    lines: list[str] = []
    for spec in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[spec.name]):
            lines.append(describe(hints[spec.name], prefix=f"{prefix}{spec.name}."))
            continue
        default = "must be given" if _is_mandatory(spec) else f"default {_show(_default(spec))}"
        lines.append(f"  {prefix}{spec.name}: {_type_name(hints[spec.name])} ({default})")
        lines.append(textwrap.fill(texts.get(spec.name, ""), 112, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def is_mandatory(config: type, key: str) -> bool:
    """Whether the knob `key` of a config class has no default."""
    return any(spec.name == key and _is_mandatory(spec) for spec in dataclasses.fields(config))


def _is_mandatory(spec: "dataclasses.Field[Any]") -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _default(spec: "dataclasses.Field[Any]") -> object:
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def _show(value: object) -> str:
    if value in ((), {}):
        return "empty"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(hint: Any) -> str:
    """As it is written in yaml: `one of bf16, fp32`, `float | null`."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(_show, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type_name, get_args(hint)))
    if hint is type(None):
        return "null"
    if get_origin(hint) is tuple:
        return f"list of {_type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"NAME: {_type_name(get_args(hint)[1])}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _field_texts(config: type) -> dict[str, str]:
    """The string that follows each field: Python keeps it only in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            texts[field.target.id] = " ".join(str(after.value.value).split())
    return texts
