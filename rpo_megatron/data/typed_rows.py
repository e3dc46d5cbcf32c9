"""Rows of the commonest layouts, straight from JSON to a RawGroup: a prompt and responses that are plain text.

msgspec checks types while it decodes, in a fraction of the time that layouts.py takes to look at what it decoded. A row
that is not exactly of these types, in any way, goes to layouts.py: it knows all layouts, and what to say about errors.
"""

from collections.abc import Callable

import msgspec

from rpo_megatron.config_verbs import ColumnsConfig
from rpo_megatron.data.layouts import FLOAT32_MAX, RawGroup, parse_row
from rpo_megatron.data.readers import RawRow


class _Response(msgspec.Struct, gc=False):
    text: str
    reward: float | None = None


class _Row(msgspec.Struct, gc=False):
    """The columns that layouts.py looks at by itself. `None` as a type: such a column, not null, is not for here."""

    prompt: str
    responses: list[_Response] | None = None
    rewards: None = None
    chosen: str | None = None
    rejected: str | None = None
    chosen_reward: float | None = None
    score_chosen: None = None
    rejected_reward: float | None = None
    score_rejected: None = None


DECODER = msgspec.json.Decoder(_Row)


def group_reader(columns: ColumnsConfig) -> Callable[[RawRow], RawGroup]:
    """Of a row: equal to layouts.parse_row of the decoded one. Raises UserError as that and RawRow.decode do."""

    def parse(row: RawRow) -> RawGroup:
        return parse_row(row.decode(), where=row.where, columns=columns)

    if columns != ColumnsConfig():
        return parse
    return lambda row: _typed(row) or parse(row)


def _typed(row: RawRow) -> RawGroup | None:
    try:
        typed = _decode(row.content) if isinstance(row.content, bytes) else msgspec.convert(row.content, _Row)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    items = typed.responses
    if items:
        return _group(typed.prompt, [item.text for item in items], [item.reward for item in items], where=row.where)
    if items is None and typed.chosen is not None and typed.rejected is not None:
        return _pair(typed, typed.chosen, typed.rejected, where=row.where)
    return None


def _decode(line: bytes) -> _Row:
    if not line.isascii():
        line.decode()  # in columns that are not ours, msgspec would not look
    return DECODER.decode(line)


def _pair(row: _Row, chosen: str, rejected: str, *, where: str) -> RawGroup | None:
    rewards = [row.chosen_reward, row.rejected_reward]
    if rewards != [None, None]:
        return _group(row.prompt, [chosen, rejected], rewards, where=where)
    return RawGroup(
        where=where,
        prompt=row.prompt,
        responses=[chosen, rejected],
        rewards=[1.0, 0.0],
        reward_source="preference",
    )


def _group(prompt: str, texts: list[str], rewards: list[float | None], *, where: str) -> RawGroup | None:
    """None when a reward is one that float32 does not hold."""
    given = [reward for reward in rewards if reward is not None]
    for reward in given:
        if not -FLOAT32_MAX <= reward <= FLOAT32_MAX:  # NaN compares false
            return None
    if len(given) < len(rewards):
        return RawGroup(where=where, prompt=prompt, responses=texts, rewards=None, reward_source=None)
    return RawGroup(where=where, prompt=prompt, responses=texts, rewards=given, reward_source="given")
