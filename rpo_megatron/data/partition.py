"""Items into bins of a fixed number of rows with limited room, so that the costliest bin is as cheap as possible.

1. Costliest item first, to the cheapest bin that has room (LPT: within 4/3 of the best, Graham 1969).
2. Where that leaves something to gain, or gets stuck: bisect on the highest cost of a bin. For each limit, costliest
   item first, to the fullest bin that keeps to the limit and has room (MULTIFIT: within 13/11; Coffman, Garey, Johnson
   1978).

Numbers are Python integers: sums are exact, and the result depends on the arguments alone, on any machine.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

Rows = list[list[int]]
"""Indices of items, row by row."""
TOLERANCE = 256
"""A costliest bin within 1/256 of its lower bound is good enough."""
LOOSENED = (128, 64, 32, 16, 8, 1)
"""Where room is tight, limits of 1/128, 1/64, ... above the mean are tried for a first partition."""
PROBES = 64
"""Bins without room that are passed over before an item counts as stuck: bounds the time where room is tight."""


@dataclass(frozen=True, kw_only=True)
class Items:
    """By index."""

    cost: Sequence[int]
    size: Sequence[int]

    def costliest_first(self, indices: Iterable[int]) -> list[int]:
        return sorted(indices, key=lambda i: (-self.cost[i], i))

    def total(self, row: Iterable[int]) -> int:
        """Cost of a row."""
        return sum(self.cost[i] for i in row)

    def highest(self, bins: Iterable[Rows]) -> int:
        """Cost of the costliest bin."""
        return max(sum(map(self.total, rows)) for rows in bins)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the bins."""

    num_bins: int
    num_rows: int
    """Of each bin."""
    room: int
    """Of each row: the sizes of its items add up to at most this."""

    def start(self) -> tuple[list[Rows], list[list[int]]]:
        """Empty bins, and the room that their rows have left."""
        bins: list[Rows] = [[[] for _ in range(self.num_rows)] for _ in range(self.num_bins)]
        return bins, [[self.room] * self.num_rows for _ in range(self.num_bins)]


def spread(indices: Iterable[int], items: Items, shape: Shape, *, limit: int) -> list[Rows] | None:
    """Bins that cost at most `limit` each, of rows that keep to their room; None if no such partition was found."""
    order = items.costliest_first(indices)
    if not order:
        return shape.start()[0]
    bins = cheapest_bin_first(order, items, shape)
    mean = -(-items.total(order) // shape.num_bins)
    for part in LOOSENED:
        if bins is not None and items.highest(bins) <= limit:
            break
        bins = _best_fit(order, items, shape, limit=min(mean + mean // part, limit))
    if bins is None or items.highest(bins) > limit:
        return None
    return _bisect(bins, order, items, shape)


def cheapest_bin_first(order: Sequence[int], items: Items, shape: Shape) -> list[Rows] | None:
    """`order` one by one to the cheapest bin that has room; None where an item finds none."""
    bins, left = shape.start()
    heap = [(0, b) for b in range(shape.num_bins)]
    for i in order:
        passed = []
        while (row := _row_with_room(left[heap[0][1]], items.size[i])) is None:
            passed.append(heapq.heappop(heap))
            if not heap or len(passed) == PROBES:
                return None
        work, b = heap[0]
        bins[b][row].append(i)
        left[b][row] -= items.size[i]
        heapq.heapreplace(heap, (work + items.cost[i], b))
        for entry in passed:
            heapq.heappush(heap, entry)
    return bins


def first_fit(indices: Iterable[int], items: Items, *, room: int) -> Rows:
    """Largest item first, to the first row that has room: as many rows as it takes."""
    rows: Rows = []
    left: list[int] = []
    for i in sorted(indices, key=lambda i: (-items.size[i], i)):
        row = _row_with_room(left, items.size[i])
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(room)
        rows[row].append(i)
        left[row] -= items.size[i]
    return rows


def fill_empty(bins: list[Rows], items: Items) -> None:
    """Give each empty bin about half of the costliest row of a bin that can be divided, costliest bins first. In
    place."""
    while empty := [rows for rows in bins if not any(rows)]:
        divisible = [rows for rows in bins if sum(map(len, rows)) > 1]
        if not divisible:
            return
        divisible.sort(key=lambda rows: -sum(map(items.total, rows)))
        for taker, giver in zip(empty, divisible, strict=False):
            row = max(giver, key=items.total)
            taker[0] = row[1::2] or row[:]
            row[:] = row[::2] if len(row) > 1 else []


def _bisect(bins: list[Rows], order: list[int], items: Items, shape: Shape) -> list[Rows]:
    """Bins whose highest cost is at most that of `bins`, by MULTIFIT."""
    high = items.highest(bins)
    low = max(-(-items.total(order) // shape.num_bins), items.cost[order[0]])
    while (high - low) * TOLERANCE > low:
        limit = (low + high) // 2
        found = _best_fit(order, items, shape, limit=limit)
        if found is None:
            low = limit + 1
        else:
            bins, high = found, items.highest(found)
    return bins


def _best_fit(order: Sequence[int], items: Items, shape: Shape, *, limit: int) -> list[Rows] | None:
    """`order` one by one to the bin with room that comes closest to the limit; None where an item finds none. An item
    beyond the limit fills a bin alone."""
    bins, left = shape.start()
    slack = [(limit, b) for b in range(shape.num_bins)]  # what a bin may still cost, in ascending order
    for i in order:
        cost = min(items.cost[i], limit)
        first = bisect_left(slack, (cost, -1))
        fullest = range(first, min(first + PROBES, shape.num_bins))
        emptiest = range(shape.num_bins - 1, max(fullest.stop, shape.num_bins - PROBES) - 1, -1)
        for at in chain(fullest, emptiest):
            rest, b = slack[at]
            row = _row_with_room(left[b], items.size[i])
            if row is not None:
                break
        else:
            return None
        bins[b][row].append(i)
        left[b][row] -= items.size[i]
        del slack[at]
        insort(slack, (rest - cost, b))
    fill_empty(bins, items)
    return bins


def _row_with_room(left: list[int], size: int) -> int | None:
    for row, free in enumerate(left):
        if size <= free:
            return row
    return None
