"""Load a config strictly from defaults < yaml file < `key.path=value`, and dump it so that it loads back the same."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from rpo_megatron.errors import UserError, nearest

C = TypeVar("C")


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML reads `1e-6` as a string (YAML 1.1); a learning rate must be a number."""


class _Yaml12Dumper(yaml.SafeDumper):
    """Quotes the texts that _Yaml12Loader would read as numbers."""


for _class in (_Yaml12Loader, _Yaml12Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def load(cls: type[C], file: str | Path | None, overrides: list[str]) -> C:
    """Build `cls` from defaults < `file` (yaml, optional) < `overrides` (strings `key.path=value`).

    Raises UserError naming the key for an unknown key (with the nearest valid one), a wrong type, a missing mandatory
    value, or text that is not yaml.
    """
    tree: dict[str, Any] = {} if file is None else read_yaml(Path(file))
    for override in overrides:
        _apply(cls, tree, override)
    _check_keys(cls, tree, "")
    try:
        return msgspec.convert(tree, type=cls)
    except msgspec.ValidationError as error:
        raise UserError(_explain(str(error), cls)) from None


def dump(config: Any) -> str:
    """The resolved config as yaml; `load` of it gives the same config back."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True)


def write(config: Any, path: str | Path) -> None:
    Path(path).write_text(dump(config), encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """What a file says, unchecked. Raises UserError when there is no such file, or no mapping in it."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml12Loader)
    except FileNotFoundError:
        raise UserError(f"config file '{path}' does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid yaml: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold `key: value` lines, found a {type(tree).__name__}")
    return tree


def _apply(cls: type, tree: dict[str, Any], override: str) -> None:
    key, _, text = override.partition("=")
    value: Any = text  # what a text knob is set to stays as typed: a directory called 007, a glob like *.jsonl
    if text and (_field_type(cls, key) not in (str, str | None) or text in ("null", "~")):
        try:
            value = yaml.load(text, Loader=_Yaml12Loader)
        except yaml.YAMLError as error:
            raise UserError(f"override '{override}': the value is not valid yaml: {error}") from None
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': '{parent}' is a value, not a section")
        node = child
    node[last] = value


def _field_type(cls: type, key: str) -> Any:
    for part in key.split("."):
        if get_origin(cls) is dict:
            return get_args(cls)[1]
        if not dataclasses.is_dataclass(cls):
            return None
        cls = get_type_hints(cls).get(part, type(None))
    return cls


def _check_keys(cls: type, tree: Any, path: str) -> None:
    if not isinstance(tree, dict):
        raise UserError(f"'{path.rstrip('.')}' is a section of keys, found {tree!r}")
    hints = get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            choices = [f"{path}{name}" for name in hints]
            raise UserError(
                f"unknown key '{path}{key}'{nearest(f'{path}{key}', choices)} (known: {', '.join(choices)})"
            )
        if dataclasses.is_dataclass(hints[key]):
            _check_keys(hints[key], value, f"{path}{key}.")
    for spec in dataclasses.fields(cls):
        mandatory = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if mandatory and spec.name not in tree:
            if dataclasses.is_dataclass(hints[spec.name]):
                _check_keys(hints[spec.name], {}, f"{path}{spec.name}.")
            raise UserError(f"'{path}{spec.name}' must be given (in the yaml file, or as {path}{spec.name}=VALUE)")


def _explain(message: str, cls: type) -> str:
    """msgspec says "Expected `int`, got `str` - at `$.train.steps`"; put the key first, and add the words it knows."""
    text, _, where = message.partition(" - at `$.")
    if not where:
        return message
    key = where.rstrip("`")
    hint = _field_type(cls, key)
    words = [word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]
    choices = f" (one of {', '.join(map(str, words))})" if words else ""
    return f"'{key}': {text[0].lower()}{text[1:]}{choices}"
