"""`rpo methods`: the table of methods, and one of them in full; the README's table is made here too. No torch.

rpo methods                      every row: formula, paper, what it reads, knobs
rpo methods dpo                  one row with the papers' recommended ranges
rpo methods format=markdown      the table of the README
"""

from rpo_megatron.config_verbs import MethodsConfig
from rpo_megatron.objectives.catalogue import columns_read, describe, find
from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.row import Knob, Method

ANCHOR = ("nll_weight", "nll_on")
"""Knobs that all preference methods have; the tables leave them out."""


def print_methods(config: MethodsConfig) -> None:
    """Raises UserError for a name that is no method."""
    if config.name is not None:
        print(details(config.name))
    else:
        print(markdown() if config.format == "markdown" else table())


def table() -> str:
    """Every method, four lines each."""
    entries = [_entry(name, method) for name, method in METHODS.items()]
    anchored = [name for name, method in METHODS.items() if set(ANCHOR) <= method.knobs.keys()]
    return "\n".join([*entries, f"\nknobs {', '.join(ANCHOR)} besides: {', '.join(anchored)}"])


def details(name: str) -> str:
    """One method with its default knobs, the off ones too."""
    method = find(name)
    text = describe(name, knobs=_defaults(method))
    lines = [text]
    for key, knob in method.knobs.items():
        if knob.default is None:
            lines.append(f"  {key}: not set ({knob.allowed}; in place of {knob.instead_of})")
        elif knob.only_with is not None and not method.knobs[knob.only_with].default:
            lines.append(f"  {key} = {knob.default}  ({knob.allowed}; used while {knob.only_with} is not 0)")
    return "\n".join(lines)


def markdown() -> str:
    """The same as a Markdown table, for the README."""
    lines = ["| method | loss of one group | source | reads | knobs |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        cells = (f"`{name}`", _escape(method.formula), _escape(method.source), _reads(method), _knobs(method))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _entry(name: str, method: Method) -> str:
    return (
        f"{name}\n    {method.formula}\n    {method.source}\n"
        f"    reads {_reads(method)}; knobs {_knobs(method).replace('`', '')}"
    )


def _reads(method: Method) -> str:
    return ", ".join(sorted(columns_read(method, knobs=_defaults(method)))) or "log-probabilities only"


def _knobs(method: Method) -> str:
    return ", ".join(f"`{key}={_show(knob)}`" for key, knob in method.knobs.items() if key not in ANCHOR) or "none"


def _show(knob: Knob) -> str:
    return "null" if knob.default is None else f"{knob.default:g}" if isinstance(knob.default, float) else knob.default


def _defaults(method: Method) -> dict[str, float | str | None]:
    return {key: knob.default for key, knob in method.knobs.items()}


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
