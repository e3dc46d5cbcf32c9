"""One row of preference data, in the layouts that people have, to one RawGroup.

Recognised by themselves (`|` separates alternatives):

    prompt, responses: [{text, reward}]
    prompt, responses: [text], rewards: [number]
    prompt, chosen, rejected (chosen_reward | score_chosen, rejected_reward | score_rejected)
    chosen, rejected: full transcripts of one conversation, e.g. "\\n\\nHuman: ... \\n\\nAssistant: ..."
    any of these with messages [{role, content}] for the prompt, and for a response its assistant message, alone or
    behind the whole conversation

Everything else is mapped by ColumnsConfig; its `extra` are further numbers per response. Pairs without rewards get 1
for chosen and 0 for rejected (as in NeMo-Aligner), which the manifest records as reward source `preference`.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import msgspec

from rpo_megatron.config_verbs import ColumnsConfig
from rpo_megatron.data.manifest import COLUMN_NAME, REWARD, RewardSource
from rpo_megatron.errors import UserError, nearest

Messages = list[dict[str, str]]

FLOAT32_MAX = 3.4028234663852886e38
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
DEFAULTS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "responses": ("responses",),
    "text": ("text",),
    "reward": ("reward",),
    "rewards": ("rewards",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "chosen_reward": ("chosen_reward", "score_chosen"),
    "rejected_reward": ("rejected_reward", "score_rejected"),
}
"""Field of ColumnsConfig -> names that are looked for when it is not set."""
PROMPT_LIKE = ("question", "instruction", "query", "input", "context", "problem")
"""A pair with such a column is not a full transcript; its prompt column has to be named."""


class RawGroup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A prompt and its responses as text."""

    where: str
    """`file:line`, for messages."""
    prompt: str | Messages
    responses: list[str]
    rewards: list[float] | None
    """One finite number per response, or None when any is missing."""
    reward_source: RewardSource | None
    transcript: bool = False
    """The prompt was cut off full transcripts: it is laid out as a conversation already."""
    columns: dict[str, list[float]] = {}
    """Further numbers by name, one finite number per response each."""


def check_columns(columns: ColumnsConfig) -> None:
    """Raises UserError when the mapping describes two layouts at once."""
    given = {spec.name for spec in fields(columns) if getattr(columns, spec.name)}
    listed = sorted(given & {"responses", "text", "reward", "rewards"})
    paired = sorted(given & {"chosen", "rejected", "chosen_reward", "rejected_reward"})
    if listed and paired:
        raise UserError(f"columns.{listed[0]} and columns.{paired[0]} belong to different layouts: give one of them")
    if {"reward", "rewards"} <= given:
        raise UserError("columns.reward (in each response) and columns.rewards (a list) exclude each other")
    for name in columns.extra:
        if not COLUMN_NAME.fullmatch(name) or name == REWARD:
            raise UserError(f"columns.extra.{name}: a name has letters, digits, _ and - only, and is not '{REWARD}'")


def parse_row(row: dict[str, Any], *, where: str, columns: ColumnsConfig) -> RawGroup:
    """Raises UserError, with `where` and the column, for an unknown layout, a missing column, a wrong type or a reward
    that is not a finite number."""
    reader = _Row(row, where=where, columns=columns)
    mapped_pair = columns.chosen is not None or columns.rejected is not None
    if reader.has("responses") and not mapped_pair:
        return _parse_list(reader)
    if reader.has("chosen") and reader.has("rejected"):
        return _parse_pair(reader)
    raise UserError(
        f"{where}: no known layout in columns {', '.join(map(str, row))}. Known: "
        "prompt + responses [{text, reward}]; prompt + responses + rewards; prompt + chosen + rejected; "
        "chosen + rejected as full transcripts. Map other names, e.g. columns.prompt=question "
        "columns.chosen=answer_1 columns.rejected=answer_2"
    )


class _Row:
    """Access to the columns of a row by their role, with errors that name place and column."""

    def __init__(self, tree: dict[str, Any], *, where: str, columns: ColumnsConfig) -> None:
        self.where = where
        self._tree = tree
        self._columns = columns

    def name(self, role: str) -> str:
        """The column's name as messages should call it."""
        given = getattr(self._columns, role)
        return given or next((name for name in DEFAULTS[role] if name in self._tree), DEFAULTS[role][0])

    def is_mapped(self, role: str) -> bool:
        return getattr(self._columns, role) is not None

    def has(self, role: str) -> bool:
        return self.is_mapped(role) or self.get(role) is not None

    def has_column(self, name: str) -> bool:
        return name in self._tree

    def get(self, role: str, tree: dict[str, Any] | None = None) -> Any:
        """The value of a column, None when it is null. A column that was mapped must exist; others are None then."""
        tree = self._tree if tree is None else tree
        given = getattr(self._columns, role)
        if given is not None:
            return self.dig(given, tree, role=role)
        for name in DEFAULTS[role]:
            value = tree.get(name)
            if value is not None:
                return value
        return None

    def dig(self, path: str, tree: dict[str, Any], *, role: str) -> Any:
        """The value at a dotted path, which must exist; `role` is the field of ColumnsConfig that names it."""
        value: Any = tree
        for part in [path] if path in tree else path.split("."):
            if not isinstance(value, dict) or part not in value:
                hint = nearest(path, map(str, tree))
                raise self.error(path, f"missing (columns.{role} names it){hint}; found {', '.join(map(str, tree))}")
            value = value[part]
        return value

    def extra_of_list(self, items: list[Any], *, name: str) -> dict[str, list[float]]:
        """columns.extra of a list of responses: a key of each object or, where responses are not objects or lack it, a
        list of the row, one number per response. `name` is the column of the responses."""
        columns = {}
        for key, path in self._columns.extra.items():
            role, first = f"extra.{key}", path if path in self._tree else path.split(".")[0]
            in_objects = all(isinstance(item, dict) for item in items) and first not in self._tree
            if in_objects:
                values = [self.dig(path, item, role=role) for item in items]
                where = [f"{name}[{i}].{path}" for i in range(len(items))]
            else:
                values = self.dig(path, self._tree, role=role)
                if not isinstance(values, list) or len(values) != len(items):
                    raise self.error(path, f"expected {len(items)} numbers, one per response; found {values!r:.80}")
                where = [f"{path}[{i}]" for i in range(len(items))]
            columns[key] = _numbers(self, values, where)
        return columns

    def extra_of_pair(self) -> dict[str, list[float]]:
        """columns.extra of a pair: the column with `chosen_` and with `rejected_` in front."""
        columns = {}
        for key, path in self._columns.extra.items():
            where = [f"chosen_{path}", f"rejected_{path}"]
            columns[key] = _numbers(self, [self.dig(name, self._tree, role=f"extra.{key}") for name in where], where)
        return columns

    def error(self, column: str, what: str) -> UserError:
        return UserError(f"{self.where}: column '{column}': {what}")


# ------------------------------------------------------------------------------------------------ layouts


def _parse_list(row: _Row) -> RawGroup:
    """prompt + responses (+ rewards)."""
    name = row.name("responses")
    items = row.get("responses")
    if not isinstance(items, list) or not items:
        raise row.error(name, f"expected a list of responses, found {_kind(items)}")
    texts: list[Any] = []
    rewards: list[Any] = []
    for i, item in enumerate(items):
        is_object = isinstance(item, dict)
        texts.append(row.get("text", item) if is_object else item)
        rewards.append(row.get("reward", item) if is_object else None)
        if texts[-1] is None:
            raise row.error(f"{name}[{i}]", f"no '{row.name('text')}' in it; name the key with columns.text")
    listed = row.get("rewards")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != len(items):
            raise row.error(row.name("rewards"), f"expected {len(items)} rewards, one per response; found {listed!r}")
        rewards = listed

    def reward_column(i: int) -> str:
        return f"{name}[{i}].{row.name('reward')}" if listed is None else f"{row.name('rewards')}[{i}]"

    prompt = _prompt(row)
    if prompt is None and isinstance(texts[0], str):
        raise row.error(row.name("prompt"), "missing; name the prompt's column with columns.prompt")
    extra = row.extra_of_list(items, name=name)
    rewards_K = _rewards(row, rewards, reward_column)
    return _group(row, prompt, texts, columns=[name] * len(texts), rewards=rewards_K, extra=extra)


def _parse_pair(row: _Row) -> RawGroup:
    """chosen + rejected, with a prompt or as full transcripts."""
    columns = [row.name("chosen"), row.name("rejected")]
    texts = [row.get("chosen"), row.get("rejected")]
    roles = ["chosen_reward", "rejected_reward"]
    has_columns = any(map(row.has, roles))
    values = list(map(row.get, roles)) if has_columns else [1.0, 0.0]
    rewards = _rewards(row, values, lambda i: row.name(roles[i]))
    source: RewardSource = "given" if has_columns else "preference"
    extra = row.extra_of_pair()
    prompt = _prompt(row)
    if prompt is None and all(isinstance(text, str) for text in texts):
        prompt = _transcript_prompt(row, texts)
        texts = [text[len(prompt) :] for text in texts]
        return _group(row, prompt, texts, columns=columns, rewards=rewards, extra=extra, source=source, transcript=True)
    return _group(row, prompt, texts, columns=columns, rewards=rewards, extra=extra, source=source)


def _group(
    row: _Row,
    prompt: str | Messages | None,
    texts: list[Any],
    *,
    columns: list[str],
    rewards: list[float] | None,
    extra: dict[str, list[float]],
    source: RewardSource = "given",
    transcript: bool = False,
) -> RawGroup:
    if isinstance(texts[0], list):
        conversations = [_messages(row, column, text) for column, text in zip(columns, texts, strict=True)]
        prompt, texts = _split_conversations(row, prompt, conversations)
    for column, text in zip(columns, texts, strict=True):
        if not isinstance(text, str):
            raise row.error(column, f"expected text (or, in all responses, messages), found {_kind(text)}")
    assert prompt is not None
    return RawGroup(
        where=row.where,
        prompt=prompt,
        responses=texts,
        rewards=rewards,
        reward_source=None if rewards is None else source,
        transcript=transcript,
        columns=extra,
    )


# ------------------------------------------------------------------------------------------------ parts of a row


def _prompt(row: _Row) -> str | Messages | None:
    value = row.get("prompt")
    if value is None and row.is_mapped("prompt"):
        raise row.error(row.name("prompt"), "is null")
    if value is None or isinstance(value, str):
        return value
    return _messages(row, row.name("prompt"), value)


def _messages(row: _Row, column: str, value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise row.error(column, f"expected text or a list of {{role, content}} messages, found {_kind(value)}")
    for message in value:
        strings = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not strings:
            raise row.error(column, f"expected messages {{role: text, content: text}}, found {message!r:.120}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _split_conversations(
    row: _Row, prompt: str | Messages | None, conversations: list[Messages]
) -> tuple[str | Messages, list[str]]:
    """The messages that all conversations start with are the prompt; one assistant message must remain of each."""
    shortest = min(map(len, conversations))
    first = conversations[0]
    lead = 0
    while lead < shortest - 1 and all(conversation[lead] == first[lead] for conversation in conversations):
        lead += 1
    for conversation in conversations:
        if len(conversation) != lead + 1 or conversation[lead]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in conversation[lead:])
            raise UserError(
                f"{row.where}: the responses must differ in one last assistant message; behind the {lead} messages "
                f"that they share, one has: {roles}"
            )
    responses = [conversation[lead]["content"] for conversation in conversations]
    if lead == 0:
        if prompt is None:
            raise row.error(row.name("prompt"), "missing, and the conversations share no first message")
        return prompt, responses
    shared = first[:lead]
    agrees = prompt is None or prompt == shared or (isinstance(prompt, str) and prompt.strip() in _contents(shared))
    if not agrees:
        raise row.error(row.name("prompt"), "contradicts the messages that the responses share; leave one of them out")
    return shared, responses


def _contents(messages: Messages) -> list[str]:
    return [message["content"].strip() for message in messages]


def _transcript_prompt(row: _Row, texts: list[str]) -> str:
    """What two full transcripts share, up to and including its last "Assistant:"; without one, up to the last line
    break, or else up to the last space, which stays with the response (tokenizers glue it to the next word)."""
    for name in PROMPT_LIKE:
        if row.has_column(name):
            raise row.error("prompt", f"missing; if it is '{name}', say columns.prompt={name}")
    chosen, rejected = texts
    differences = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(differences, min(len(chosen), len(rejected)))]
    marker = shared.rfind(ASSISTANT)
    if marker >= 0:
        return shared[: marker + len(ASSISTANT)]
    end = len(shared)
    while end and not shared[end - 1].isspace():
        end -= 1
    while end and shared[end - 1] == " ":
        end -= 1
    if end == 0:
        raise UserError(
            f"{row.where}: no prompt: there is no '{row.name('prompt')}' column, and '{row.name('chosen')}' and "
            f"'{row.name('rejected')}' do not start alike. Name the prompt's column with columns.prompt"
        )
    return shared[:end]


def transcript_messages(prompt: str) -> Messages | None:
    """The messages of a "\\n\\nHuman: ... \\n\\nAssistant:" prompt, or None if it is not of this form."""
    if not prompt.startswith(HUMAN) or not prompt.endswith(ASSISTANT):
        return None
    messages = []
    for part in prompt.removesuffix(ASSISTANT).split(HUMAN)[1:]:
        user, *assistant = part.split(ASSISTANT)
        messages += [{"role": "user", "content": user.strip()}]
        messages += [{"role": "assistant", "content": text.strip()} for text in assistant]
    return messages


def _rewards(row: _Row, values: list[Any], column: Callable[[int], str]) -> list[float] | None:
    """None when any is missing. Every one that is there must be a number that float32 holds; `column` names the one
    that is not."""
    for i, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not _is_finite(value)):
            raise row.error(column(i), f"expected a finite number, found {value!r:.80}")
    return None if None in values else list(map(float, values))


def _numbers(row: _Row, values: list[Any], columns: list[str]) -> list[float]:
    """Every one must be there; true counts 1, false 0."""
    for value, column in zip(values, columns, strict=True):
        if not _is_finite(value):
            raise row.error(column, f"expected a finite number, true or false; found {_kind(value)}")
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    """A number (or a truth value) that float32 holds."""
    return isinstance(value, int | float) and abs(value) <= FLOAT32_MAX  # NaN compares false


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.80}"
