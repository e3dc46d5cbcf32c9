"""Whether the tensors of a file are those that a model needs, name by name and shape by shape. No torch."""

from collections.abc import Collection, Mapping

Sizes = Mapping[str, tuple[int, ...]]
SHOWN = 5
"""Names of each kind that a message lists."""


def mismatches(found: Sizes, needed: Sizes, *, owner: str, optional: Collection[str] = ()) -> dict[str, list[str]]:
    """What is wrong, and with which tensors; `owner` is what they should be part of."""
    return {
        "missing": sorted(needed.keys() - found.keys() - set(optional)),
        f"not part of {owner}": sorted(found.keys() - needed.keys()),
        "of the wrong shape": sorted(
            f"{name} (expected {list(size)}, found {list(found[name])})"
            for name, size in needed.items()
            if name in found and found[name] != size
        ),
    }


def describe(problems: Mapping[str, list[str]]) -> str:
    """Of those that there are, for a message; empty where there is none."""
    return "; ".join(f"{len(names)} {what}: {_shorten(names)}" for what, names in problems.items() if names)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
