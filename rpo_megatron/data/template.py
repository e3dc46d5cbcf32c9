"""Chat templates: the Jinja dialect of Hugging Face tokenizers, rendered without transformers.

One implementation for a tokenizer's own template, a template file and a sentencepiece model, which knows none.
`strftime_now` is left undefined on purpose: a prompt with today's date would make the same data another store
tomorrow. Templates that ask whether it exists fall back to a fixed date.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rpo_megatron.data.layouts import Messages
from rpo_megatron.data.manifest import NO_TEMPLATE, TemplateInfo
from rpo_megatron.data.symbolic import GuardedEnvironment, Outline, outline
from rpo_megatron.data.tokenizer import Tokenizer
from rpo_megatron.errors import UserError

MOST_OUTLINES = 1024
"""Of sequences of roles; conversations of others are rendered each."""


class ChatTemplate:
    """Renders {role, content} messages to one text."""

    def __init__(self, text: str, *, source: str, special_names: dict[str, str]) -> None:
        self.info = TemplateInfo(source=source, fingerprint=hashlib.sha256(text.encode()).hexdigest())
        self._special_names = special_names
        try:
            self._template = _environment(ImmutableSandboxedEnvironment).from_string(text)
        except TemplateError as error:
            raise UserError(f"chat template ({source}): not valid Jinja: {error}") from None
        guarded = _environment(GuardedEnvironment)
        guarded.guard()
        self._guarded = guarded.compiled(text)
        self._outlines: dict[tuple[bool, tuple[str, ...]], Outline | None] = {}

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Messages have role and content, and nothing else. Raises UserError with the template's own words when it
        refuses them."""
        shape = add_generation_prompt, tuple([message["role"] for message in messages])
        contents = [message["content"] for message in messages]
        known = self._outlines.get(shape)
        if known is not None:
            return known.filled(contents)
        text = self._render(messages, add_generation_prompt=add_generation_prompt)
        if self._guarded is not None and shape not in self._outlines and len(self._outlines) < MOST_OUTLINES:
            names = {"add_generation_prompt": add_generation_prompt, **self._special_names}
            found = outline(self._guarded, shape[1], **names)
            self._outlines[shape] = found if found is not None and found.filled(contents) == text else None
        return text

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_names
            )
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"the chat template ({self.info.source}) refuses these messages: {error}; change the data, or give "
                "chat_template=FILE"
            ) from None


def load_template(choice: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """What PrepareConfig.chat_template chooses: None stands for plain text."""
    if choice == "none":
        return None
    if choice != "auto":
        path = Path(choice)
        if not path.is_file():
            raise UserError(f"chat_template '{choice}': no such file (give auto, none, or the path of a Jinja file)")
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"chat_template '{choice}': not a text in UTF-8 ({error}); save it as one") from None
        return ChatTemplate(text, source=choice, special_names=tokenizer.special_names)
    if tokenizer.chat_template is None:
        return None
    return ChatTemplate(tokenizer.chat_template, source="tokenizer", special_names=tokenizer.special_names)


def template_info(template: ChatTemplate | None) -> TemplateInfo:
    return NO_TEMPLATE if template is None else template.info


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for loss masks; the text is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


Kind = TypeVar("Kind", bound=Environment)


def _environment(kind: type[Kind]) -> Kind:
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML, which is not wanted here."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
