"""A chat template run once for all conversations of the same roles, where that provably gives the same text.

The template is rendered with messages whose contents are stand-ins. A stand-in can be written out, stripped of white
space around it and joined to other text. Everything else that a template may do with it (compare it, search it, cut it,
measure it, ask whether it is empty, hand it to a filter, a macro or a function) stops the attempt: such a template has
to be rendered for each conversation. If the attempt comes through, no step of it depended on the contents, and the
result is text with gaps, to be filled with the real contents.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce, wraps
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.filters import do_trim
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

GAP = "\ue000{}\ue001"
"""How a stand-in is written out, with the number of its message; `-` before that says that it is stripped. Two
characters that Unicode leaves to private use, so that no template holds them by accident; one that does is refused."""
MARK = re.compile("\ue000(-?)(\\d+)\ue001")
SURE_FILTERS = {"length", "count", "first", "last", "list", "default", "d", "trim", "string"}
"""Filters that look at no message's content: of lists they take or count members; the other four keep a stand-in."""
SURE_TESTS = {"defined", "undefined", "none", "string", "mapping", "boolean", "integer", "number"}
"""Tests that look at the kind of a value alone. Every content is a string, a stand-in too."""


class ContentUsedError(BaseException):
    """A template does more with a content than to write it. Not an Exception: jinja's own tests swallow those."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ContentUsedError


class StandIn(str):
    """Text that is not known."""

    __slots__ = ()

    def __str__(self) -> "StandIn":
        return self

    def __add__(self, other: Any) -> "StandIn":
        return StandIn(str.__add__(self, other)) if isinstance(other, str) else _refuse()

    def __radd__(self, other: Any) -> "StandIn":
        return StandIn(str.__add__(other, self)) if isinstance(other, str) else _refuse()

    def strip(self, characters: Any = None) -> "StandIn":
        """Of one content alone: what a longer text starts and ends with is not known."""
        match = MARK.fullmatch(str.__str__(self))
        if match is None or characters is not None:
            _refuse()
        return StandIn(GAP.format(f"-{match[2]}"))


KEPT = {"__new__", "__init__", "__class__", "__doc__", "__str__", "__add__", "__radd__", "__slots__", "__module__"}
KEPT |= {"__getattribute__", "__init_subclass__", "__subclasshook__", "__setattr__", "__delattr__", "__dir__", "strip"}
for _name in set(dir(str)) - KEPT:
    setattr(StandIn, _name, _refuse)


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """Stops a template where a stand-in would become plain text, or decide what happens."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and _holds([left, right]):
            _refuse()
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        reads_message = isinstance(owner, dict) and __obj.__name__ in ("get", "items", "keys", "values")
        if isinstance(__obj, Macro | LoopContext | BlockReference) or _holds([*args, *kwargs.values()]):
            _refuse()
        if _holds(owner) and not (reads_message or isinstance(owner, StandIn)):
            _refuse()
        return super().call(__context, __obj, *args, **kwargs)

    def guard(self) -> None:
        """Of the filters and tests, which must all be there."""
        self.filters |= {name: _guarded(each) for name, each in self.filters.items() if name not in SURE_FILTERS}
        self.tests |= {name: _guarded(each) for name, each in self.tests.items() if name not in SURE_TESTS}
        self.filters["trim"] = _trim
        self.filters[NOT_CONTENT] = _not_content

    def compiled(self, text: str) -> Template | None:
        """None for a template that joins text in ways that cannot be followed."""
        tree = self.parse(text)
        if GAP[0] in text or any(True for _ in tree.find_all(UNCLEAR)):
            return None
        return self.from_string(_Rewritten().visit(tree))


NOT_CONTENT = "not_content"
"""Our filter that lets anything but stand-ins through."""
UNCLEAR = (nodes.AssignBlock, nodes.FilterBlock, nodes.CallBlock, nodes.EvalContextModifier)


class _Rewritten(NodeTransformer):
    """`a ~ b` as `a|string + b|string`; in `a in b`, `a` through our filter: Python would search a text for it."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        parts = [self._filtered(self.visit(part), "string") for part in node.nodes]
        return reduce(lambda left, right: nodes.Add(left, right, lineno=node.lineno), parts)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if any(operand.op in ("in", "notin") for operand in node.ops):
            node.expr = self._filtered(node.expr, NOT_CONTENT)
        return node

    def _filtered(self, node: nodes.Expr, name: str) -> nodes.Expr:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _trim(value: Any, characters: Any = None) -> str:
    """jinja's own, but a content may not be what is taken off."""
    return do_trim(value, _not_content(characters))


def _not_content(value: Any) -> Any:
    return _refuse() if _holds(value) else value


def _guarded(function: Any) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return _refuse() if _holds([*args, *kwargs.values()]) else function(*args, **kwargs)

    return guarded


def _holds(value: Any) -> bool:
    """Whether there is a stand-in in it."""
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    return any(map(_holds, value)) if isinstance(value, list | tuple) else isinstance(value, StandIn)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A text with gaps."""

    first: str
    rest: list[tuple[bool, int, str]]
    """For each gap: whether its content is stripped, the number of that, the text behind."""

    def filled(self, contents: list[str]) -> str:
        texts = ((contents[i].strip() if stripped else contents[i]) + behind for stripped, i, behind in self.rest)
        return self.first + "".join(texts)


def outline(template: Template, roles: tuple[str, ...], **names: Any) -> Outline | None:
    """What the template makes of messages of these roles, or None if that depends on their contents. `names` are
    further variables."""
    if any(GAP[0] in text for text in (*roles, *names.values()) if isinstance(text, str)):
        return None
    messages = [{"role": role, "content": StandIn(GAP.format(i))} for i, role in enumerate(roles)]
    try:
        text = template.render(messages=messages, **names)
    except (ContentUsedError, TemplateError, TypeError):
        return None
    first, *found = MARK.split(text)
    gaps = zip(found[::3], found[1::3], found[2::3], strict=True)
    return Outline(first=first, rest=[(bool(stripped), int(i), behind) for stripped, i, behind in gaps])
