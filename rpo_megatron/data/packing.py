"""Groups to rows: from lengths alone, so that every rank computes the same packing and keeps its share.

1. Groups go, costliest first, to the data-parallel rank that has the least work so far.
2. On each rank they go, longest first, into the first row of at most `budget` tokens that has room (first-fit
   decreasing). A group is never split; one that is longer than the budget gets a row of its own.
3. Ranks with fewer rows than others split their costliest rows in two; what is then still missing are empty rows.
4. A rank lays out its rows as MicroBatches: one segment prompt + response per response, then the padding.

The cost of a segment of s tokens is s + s^2 / CROSSOVER: matrix multiplications and causal attention.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.data.store import Group

CROSSOVER = 24_576
"""Segment length at which causal attention costs as much as the matrix multiplications: 12 x the hidden size, here that
of a 1-2 billion parameter model. It moves the balance between ranks only, never a result."""


def pack(
    segments: Sequence[np.ndarray], *, budget: int, dp_size: int, multiple: int, packing: bool = True
) -> list[list[list[int]]]:
    """Rows of every data-parallel rank: `result[rank][row]` lists indices into `segments`, [] for an empty row.

    segments: for each group the lengths in tokens of its segments. Rows hold at most `budget` tokens after padding to
    `multiple`, unless a single group is longer. `packing=False` puts one group in a row. The result depends on the
    arguments alone.
    """
    tokens = [int(lengths.sum()) for lengths in segments]
    costs = [float(lengths.sum() + np.square(lengths, dtype=np.float64).sum() / CROSSOVER) for lengths in segments]
    capacity = budget - budget % multiple if packing else 0
    shares = _balance(range(len(segments)), costs, dp_size)
    ranks = [_first_fit_decreasing(share, tokens, capacity) for share in shares]
    num_rows = max(map(len, ranks))
    return [_split_into(rows, costs, num_rows) for rows in ranks]


def _balance(indices: Iterable[int], costs: list[float], num_parts: int) -> list[list[int]]:
    """Costliest first to the cheapest part so far: within 4/3 of the best possible maximum (Graham 1969)."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    work = [0.0] * num_parts
    for index in sorted(indices, key=lambda i: (-costs[i], i)):
        cheapest = work.index(min(work))
        parts[cheapest].append(index)
        work[cheapest] += costs[index]
    return parts


def _first_fit_decreasing(indices: list[int], tokens: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: (-tokens[i], i)):
        fitting = next((row for row, free in enumerate(room) if tokens[index] <= free), None)
        if fitting is None:
            rows.append([index])
            room.append(capacity - tokens[index])
        else:
            rows[fitting].append(index)
            room[fitting] -= tokens[index]
    return rows


def _split_into(rows: list[list[int]], costs: list[float], num_rows: int) -> list[list[int]]:
    rows = list(rows)
    while len(rows) < num_rows and (divisible := [row for row in rows if len(row) > 1]):
        costliest = max(divisible, key=lambda row: sum(costs[i] for i in row))
        rows.remove(costliest)
        rows += _balance(costliest, costs, 2)
    return rows + [[] for _ in range(num_rows - len(rows))]


def build_row(groups: Sequence[Group], *, ids: np.ndarray, draws: np.ndarray, multiple: int) -> MicroBatch:
    """Lay out groups (at least one, with the numbers `ids` [G] and `draws` [G]) in one row without prompt sharing.

    Every response is a segment prompt + response whose positions start at 0. The token before each response token
    predicts it, so the prompt's last token predicts the first. Padding up to a multiple of `multiple` is a segment of
    its own at the end.
    """
    assert all(group.prompt.size and min(map(len, group.responses)) for group in groups), "empty prompt or response"
    pieces = [(group.prompt, response) for group in groups for response in group.responses]
    segments = np.array([prompt.size + response.size for prompt, response in pieces], dtype=np.int64)
    ends = np.cumsum(segments)
    scored = [np.arange(end - 1 - response.size, end - 1) for end, (_, response) in zip(ends, pieces, strict=True)]
    last = iter(ends - 1)
    padding = -int(ends[-1]) % multiple
    tokens = [part for piece in pieces for part in piece] + [np.zeros(padding, dtype=np.int64)]
    segments = np.append(segments, padding) if padding else segments
    return MicroBatch(
        tokens_T=np.concatenate(tokens).astype(np.int64, copy=False),
        positions_T=np.concatenate([np.arange(length) for length in segments]),
        segments_S=segments,
        scored_position_N=np.concatenate(scored),
        scored_label_N=np.concatenate([response for _, response in pieces]).astype(np.int64, copy=False),
        length_GK=_ragged([[response.size for response in group.responses] for group in groups], np.int64),
        last_position_GK=_ragged([[next(last) for _ in group.responses] for group in groups], np.int64),
        reward_GK=_column([group.reward for group in groups], np.float32),
        rewards_GKM=_columns([group.rewards for group in groups]),
        source_GK=_column([group.source for group in groups], np.bool_),
        ref_logp_GK=_column([group.ref_logp for group in groups], np.float32),
        valid_GK=_ragged([[True] * len(group.responses) for group in groups], np.bool_),
        draw_G=np.asarray(draws, dtype=np.float64),
        group_ids_G=np.asarray(ids, dtype=np.int64),
        has_padding=padding > 0,
    )


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
        scored_position_N=np.zeros(0, dtype=np.int64),
        scored_label_N=np.zeros(0, dtype=np.int64),
        length_GK=np.zeros((1, 1), dtype=np.int64),
        last_position_GK=np.zeros((1, 1), dtype=np.int64),
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


def _ragged(rows: Sequence[Sequence | np.ndarray], dtype: type) -> np.ndarray:
    """Rows of different lengths as one [G, K] array, filled up with 0."""
    filled_GK: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype=dtype)
    for filled_K, row in zip(filled_GK, rows, strict=True):
        filled_K[: len(row)] = row
    return filled_GK
