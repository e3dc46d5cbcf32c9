"""The short way from a line to a group against the long one."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.config_verbs import ColumnsConfig
from rpo_megatron.data.layouts import RawGroup, parse_row
from rpo_megatron.data.readers import RawRow
from rpo_megatron.data.typed_rows import _typed, group_reader
from rpo_megatron.errors import UserError

TEXT = st.sampled_from(["", "a", "b\n", "é", "a\ud83d", "日本"])
USUAL = st.sampled_from([0, -1, 0.5, None])
ODD = st.sampled_from([2**53 + 1, 12345678901234567890123, 3.4028234663852886e38, 3.5e38, float("nan"), True, "1"])
NUMBER = st.one_of(USUAL, USUAL, USUAL, ODD)
ITEM = st.one_of(
    st.fixed_dictionaries({"text": TEXT}, optional={"reward": NUMBER, "more": NUMBER}),
    TEXT,
    st.sampled_from([None, 7, {"reward": 1.0}, {"text": [{"role": "assistant", "content": "a"}], "reward": 1.0}]),
)
REWARDS = dict.fromkeys(("chosen_reward", "rejected_reward", "score_chosen", "score_rejected"), NUMBER)
PAIR = st.fixed_dictionaries({"prompt": st.just("p"), "chosen": st.just("a"), "rejected": TEXT}, optional=REWARDS)
LISTED = st.fixed_dictionaries(
    {"prompt": st.just("p"), "responses": st.lists(ITEM, min_size=1, max_size=3)},
    optional={"rewards": st.one_of(st.lists(NUMBER, max_size=3), st.just(None)), "chosen": TEXT},
)
ANY = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(TEXT, st.sampled_from([None, 7, [{"role": "user", "content": "hi"}]])),
        "responses": st.one_of(st.lists(ITEM, max_size=3), st.just(None), TEXT),
        "chosen": st.one_of(TEXT, st.just(None), st.just([{"role": "assistant", "content": "a"}])),
        "rejected": st.one_of(TEXT, st.just(None)),
        **REWARDS,
    },
)


def outcome(read: Any) -> RawGroup | str:
    try:
        return read()
    except UserError as error:
        return str(error)


@settings(deadline=None, max_examples=300)
@given(row=st.one_of(PAIR, LISTED, ANY))
def test_equal_to_the_long_way(row: dict[str, Any]) -> None:
    """A type that is taken for another, a null for a missing column, a message that comes out differently."""
    read = group_reader(ColumnsConfig())
    for content in (
        row,
        json.dumps(row).encode(),
        json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"),
    ):
        line = RawRow("f.jsonl:7", content, 0.5)
        expected = outcome(lambda line=line: parse_row(line.decode(), where=line.where, columns=ColumnsConfig()))
        assert outcome(lambda line=line: read(line)) == expected


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "x": "\xff"}',
        b'{"prompt": "a", "chosen": "b", "rejected": "c"',
        b'{"prompt": "a", "chosen": "b", "rejected": "c"} x',
        b'["prompt"]',
    ],
)
def test_broken_lines(line: bytes) -> None:
    """Also where the damage is in a column that nobody reads."""
    with pytest.raises(UserError, match=r"^f\.jsonl:7: "):
        group_reader(ColumnsConfig())(RawRow("f.jsonl:7", line, 0.5))


def test_the_short_way_is_taken() -> None:
    """Otherwise nothing would be gained; and with columns of other names it must not be."""
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "responses": [{"text": "b", "reward": 1}, {"text": "c", "reward": 0.5, "id": 3}]},
        {"prompt": "a", "chosen": "b", "rejected": "c", "source": "x"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_reward": 2, "rejected_reward": 0.5},
    ]
    for row in rows:
        for content in (row, json.dumps(row).encode()):
            assert _typed(RawRow("f.jsonl:7", content, 0.5)) is not None
    line = RawRow("f.jsonl:7", json.dumps(rows[1] | {"better": "d"}).encode(), 0.5)
    assert group_reader(ColumnsConfig(chosen="better"))(line).responses == ["d", "c"]
