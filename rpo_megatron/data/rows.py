"""The layout of a row: groups to a MicroBatch.

With a shared prompt a group is the prompt, once, and then its responses, each of which continues the prompt's positions
and attends to it and to itself. Without, it is prompt + response, once for each response: the same mathematics at the
cost of K prompts, kept as the other's oracle.

    shared      [ prompt | response 1 | response 2 | ... ]       the prompt's last token predicts every first token
    repeated    [ prompt response 1 | prompt response 2 | ... ]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.data.store import Group


def build_row(
    groups: Sequence[Group], *, ids: np.ndarray, draws: np.ndarray, multiple: int, share_prompt: bool
) -> MicroBatch:
    """Lay out groups (at least one, with the numbers `ids` [G] and `draws` [G]) in one row. Padding up to a multiple of
    `multiple` is a segment of its own at the end."""
    assert all(group.prompt.size and min(map(len, group.responses)) for group in groups), "empty prompt or response"
    row = _Row()
    for group in groups:
        (_place_shared if share_prompt else _place_repeated)(row, group)
    padding = -row.length % multiple
    if padding:
        row.add_segment(np.zeros(padding, dtype=np.int64))
    lengths = [len(group.responses) for group in groups]
    return MicroBatch(
        tokens_T=np.concatenate(row.tokens).astype(np.int64, copy=False),
        positions_T=np.concatenate(row.positions),
        segments_S=np.array(row.segments),
        prompt_S=np.array(row.prompts),
        scored_position_N=np.concatenate(row.predictors),
        scored_label_N=np.concatenate([tokens for group in groups for tokens in group.responses]).astype(np.int64),
        length_GK=_ragged([[tokens.size for tokens in group.responses] for group in groups], np.int64),
        last_position_GK=_grouped(row.last, lengths),
        before_last_position_GK=_grouped([int(predictors[-1]) for predictors in row.predictors], lengths),
        reward_GK=_column([group.reward for group in groups], np.float32),
        rewards_GKM=_columns([group.rewards for group in groups]),
        source_GK=_column([group.source for group in groups], np.bool_),
        ref_logp_GK=_column([group.ref_logp for group in groups], np.float32),
        valid_GK=_ragged([[True] * length for length in lengths], np.bool_),
        draw_G=np.asarray(draws, dtype=np.float64),
        group_ids_G=np.asarray(ids, dtype=np.int64),
        has_padding=padding > 0,
    )


@dataclass
class _Row:
    """A row as it grows."""

    length: int = 0
    tokens: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    predictors: list[np.ndarray] = field(default_factory=list)
    """For each response, the row positions that predict its tokens."""
    last: list[int] = field(default_factory=list)

    def add_segment(self, *parts: np.ndarray, first_position: int = 0, prompt: int = -1) -> int:
        """Append tokens as one segment; returns the row position of its first."""
        start, size = self.length, sum(part.size for part in parts)
        self.tokens += parts
        self.positions.append(first_position + np.arange(size))
        self.segments.append(size)
        self.prompts.append(prompt)
        self.length += size
        return start

    def score(self, predictors: np.ndarray) -> None:
        """The last segment ends in a response, which these positions predict."""
        self.predictors.append(predictors)
        self.last.append(self.length - 1)


def _place_shared(row: _Row, group: Group) -> None:
    prompt = len(row.segments)
    row.add_segment(group.prompt)
    last_of_prompt = row.length - 1
    for response in group.responses:
        start = row.add_segment(response, first_position=group.prompt.size, prompt=prompt)
        row.score(np.array([last_of_prompt, *range(start, start + response.size - 1)]))


def _place_repeated(row: _Row, group: Group) -> None:
    for response in group.responses:
        start = row.add_segment(group.prompt, response) + group.prompt.size
        row.score(np.arange(start - 1, start - 1 + response.size))


def empty_row(
    *, multiple: int, has_reward: bool, has_reference: bool, num_rewards: int = 0, has_source: bool = False
) -> MicroBatch:
    """A row of `multiple` padding tokens and one padding group: what a rank computes when others have a row more.
    Nothing in it is scored (N = 0); it has the columns that the others' rows have."""
    nothing_GK = np.zeros((1, 1), dtype=np.float32)
    return MicroBatch(
        tokens_T=np.zeros(multiple, dtype=np.int64),
        positions_T=np.arange(multiple),
        segments_S=np.array([multiple]),
        prompt_S=np.array([-1]),
        scored_position_N=np.zeros(0, dtype=np.int64),
        scored_label_N=np.zeros(0, dtype=np.int64),
        length_GK=np.zeros((1, 1), dtype=np.int64),
        last_position_GK=np.zeros((1, 1), dtype=np.int64),
        before_last_position_GK=np.zeros((1, 1), dtype=np.int64),
        reward_GK=nothing_GK if has_reward else None,
        rewards_GKM=np.zeros((1, 1, num_rewards), dtype=np.float32) if num_rewards else None,
        source_GK=np.zeros((1, 1), dtype=np.bool_) if has_source else None,
        ref_logp_GK=nothing_GK if has_reference else None,
        valid_GK=np.zeros((1, 1), dtype=np.bool_),
        draw_G=np.zeros(1),
        group_ids_G=np.array([-1]),
        has_padding=True,
    )


def _column(values: Sequence[np.ndarray | None], dtype: type) -> np.ndarray | None:
    present = [value for value in values if value is not None]
    return _ragged(present, dtype) if present else None


def _columns(values: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """[K, M] of each group as one [G, K, M] array."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    return np.stack([_ragged(column, np.float32) for column in zip(*(value.T for value in present), strict=True)], -1)


def _grouped(values: list[int], lengths: list[int]) -> np.ndarray:
    """One number per response, in order, as [G, K]."""
    borders = np.cumsum(lengths)[:-1]
    return _ragged(np.split(np.array(values), borders), np.int64)


def _ragged(rows: Sequence[Sequence | np.ndarray], dtype: type) -> np.ndarray:
    """Rows of different lengths as one [G, K] array, filled up with 0."""
    filled_GK: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype=dtype)
    for filled_K, row in zip(filled_GK, rows, strict=True):
        filled_K[: len(row)] = row
    return filled_GK
