"""`--output-prefix data/train` to `output_prefix=data/train`: for the doors in tools/, which keep old habits working.

Purely mechanical: it knows no option, so an unknown one is reported by the config loader.
"""

from collections.abc import Mapping

HELP = ("-h", "--help")


def flags_to_overrides(argv: list[str], *, aliases: Mapping[str, str] | None = None) -> list[str]:
    """`--a-b c`, `--a-b=c` -> `a_b=c`; a flag without a value -> `a_b=true`. Everything else passes unchanged.

    `aliases` maps a flag's name, without the dashes, to the name it has in the config.
    """
    names = aliases or {}
    overrides = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in HELP or not word.startswith("--"):
            overrides.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not _is_flag(rest[0]) else "true"
        overrides.append(f"{names.get(flag, flag).replace('-', '_')}={value}")
    return overrides


def _is_flag(word: str) -> bool:
    """A negative number is a value."""
    return word in HELP or word.startswith("--")
