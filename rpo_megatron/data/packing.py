"""Which groups go into which row: from lengths alone, so that every rank computes the same packing and keeps its share.

1. Groups go, costliest first, to the data-parallel rank that has the least work so far.
2. On each rank they go, longest first, into the first row of at most `budget` tokens that has room (first-fit
   decreasing). A group is never split; one that is longer than the budget gets a row of its own.
3. Ranks with fewer rows than others split their costliest rows in two; what is then still missing are empty rows.

rows.py lays the rows out. The cost of a segment of s tokens is s + s^2 / CROSSOVER: matrix multiplications and causal
attention; of one that also attends to c tokens of a shared prompt it is s + ((c + s)^2 - c^2) / CROSSOVER.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CROSSOVER = 24_576
"""Segment length at which causal attention costs as much as the matrix multiplications: 12 x the hidden size, here that
of a 1-2 billion parameter model. It moves the balance between ranks only, never a result."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a group takes up."""

    tokens: int
    """In a row."""
    cost: float
    """Of computing it, in tokens of a short segment."""


def size_of(prompt_length: int, response_lengths: np.ndarray, *, share_prompt: bool) -> Size:
    """Of a group whose responses share one copy of the prompt, or have one each."""
    if share_prompt:
        length_S = np.array([prompt_length, *response_lengths], dtype=np.float64)
        context_S = np.array([0, *np.full(len(response_lengths), prompt_length)], dtype=np.float64)
    else:
        length_S, context_S = (prompt_length + response_lengths).astype(np.float64), np.zeros(len(response_lengths))
    pairs = np.square(context_S + length_S) - np.square(context_S)
    return Size(tokens=int(length_S.sum()), cost=float(length_S.sum() + pairs.sum() / CROSSOVER))


def pack(
    sizes: Sequence[Size], *, budget: int, dp_size: int, multiple: int, packing: bool = True
) -> list[list[list[int]]]:
    """Rows of every data-parallel rank: `result[rank][row]` lists indices into `sizes`, [] for an empty row.

    Rows hold at most `budget` tokens after padding to
    `multiple`, unless a single group is longer. `packing=False` puts one group in a row. The result depends on the
    arguments alone.
    """
    tokens, costs = [size.tokens for size in sizes], [size.cost for size in sizes]
    capacity = budget - budget % multiple if packing else 0
    shares = _balance(range(len(sizes)), costs, dp_size)
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
