"""Which groups go into which row: planned for the global batch from lengths alone, so that every rank computes the same
plan and keeps its share.

1. Groups go, costliest first, to the data-parallel rank that has the least work so far, whatever room there is; what
   first-fit decreasing then makes of each rank's share bounds the plan: so many rows, so much work on the busiest rank.
2. Upwards from the fewest rows that could hold the tokens (and that a pipeline with several chunks of layers on each
   rank needs), groups are spread over the ranks by cost, each with so many rows of limited room (partition.py). The
   first number of rows that works with no more work on the busiest rank than in 1 is taken; if none does, the shares
   of 1.
3. Each rank's groups are spread once more over its rows, by cost. The rows come costliest first, so that those that the
   ranks compute at the same time cost about the same.

A group is never split; one that is longer than the budget gets a row of its own, and its rank less of the others. All
ranks have equally many rows (they meet in every collective); the rows of a rank are even, because a pipeline waits for
the longest; what no group is left for are empty rows. rows.py lays the rows out, cost.py says what groups cost.
"""

from dataclasses import dataclass

import numpy as np

from rpo_megatron.data.cost import Sizes
from rpo_megatron.data.partition import Items, Rows, Shape, cheapest_bin_first, fill_empty, first_fit, spread


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How well a plan uses the machine, in numbers that add up over steps: `useful_tokens` over `row_tokens` is the
    share of computed tokens that is not padding, `max_cost` over `mean_cost` how much longer the busiest rank takes."""

    useful_tokens: int
    """Of groups: a shared prompt counts once."""
    row_tokens: int
    """With padding and empty rows."""
    mean_cost: float
    """Work of a rank, in tokens (cost.py)."""
    max_cost: float
    """Of the busiest rank, for which the others wait."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    ranks: list[Rows]
    """`ranks[rank][row]` lists indices of groups, [] for an empty row."""
    balance: Balance


def pack(
    sizes: Sizes, *, budget: int, dp_size: int, multiple: int, packing: bool = True, least_rows: int = 1
) -> Packing:
    """Rows of every data-parallel rank, for at least one group.

    Rows hold at most `budget` tokens after padding to `multiple`, unless a single group is longer. `packing=False` puts
    one group in a row. A rank has at least `least_rows`. The result depends on the arguments alone.
    """
    capacity = budget - budget % multiple if packing else 0
    # A row that a long group has to itself has no room left; without packing every group is such a group.
    size_G = np.minimum(sizes.tokens_G, capacity) if capacity else np.ones_like(sizes.tokens_G)
    items = Items(cost=sizes.cost_G.tolist(), size=size_G.tolist())
    plan = _plan(items, dp_size=dp_size, room=capacity or 1, least_rows=least_rows)
    ranks = [_costliest_first(rows, items) for rows in plan]
    return Packing(ranks=ranks, balance=_balance(ranks, sizes, multiple=multiple))


def _plan(items: Items, *, dp_size: int, room: int, least_rows: int) -> list[Rows]:
    shares = _shares(items, dp_size=dp_size)
    firsts = [first_fit(share, items, room=room) for share in shares]
    most_rows = max(least_rows, *map(len, firsts))
    busiest, idle = max(map(items.total, shares)), _empty_rows(firsts, most_rows)
    fewest_rows = max(least_rows, -(-sum(items.size) // (dp_size * room)))
    for num_rows in range(fewest_rows, most_rows + 1):
        shape = Shape(num_bins=dp_size, num_rows=num_rows, room=room)
        ranks = spread(range(len(items.cost)), items, shape, limit=busiest)
        if ranks is not None and _empty_rows(ranks, num_rows) <= idle:
            return [_even(rows, items, num_rows=num_rows, room=room) for rows in ranks]
    return [_even(rows, items, num_rows=most_rows, room=room) for rows in firsts]


def _shares(items: Items, *, dp_size: int) -> Rows:
    """The groups of each rank, balanced as if rows had no limit."""
    shape = Shape(num_bins=dp_size, num_rows=1, room=sum(items.size))
    bins = cheapest_bin_first(items.costliest_first(range(len(items.cost))), items, shape)
    assert bins is not None, "there was room for everything"
    return [share for (share,) in bins]


def _even(rows: Rows, items: Items, *, num_rows: int, room: int) -> Rows:
    """The same groups in rows of even cost; as they were, where that is not possible."""
    if len(rows) == num_rows == 1:
        return rows
    shape = Shape(num_bins=num_rows, num_rows=1, room=room)
    bins = spread([i for row in rows for i in row], items, shape, limit=max(map(items.total, rows), default=0))
    if bins is None:
        bins = [[row] for row in rows] + [[[]] for _ in range(num_rows - len(rows))]
        fill_empty(bins, items)
    return [row for (row,) in bins]


def _costliest_first(rows: Rows, items: Items) -> Rows:
    return sorted(rows, key=lambda row: (-items.total(row), row))


def _empty_rows(ranks: list[Rows], num_rows: int) -> int:
    """That no plan with these shares can avoid."""
    return sum(max(0, num_rows - sum(map(len, rows))) for rows in ranks)


def _balance(ranks: list[Rows], sizes: Sizes, *, multiple: int) -> Balance:
    tokens, cost = sizes.tokens_G.tolist(), sizes.cost_G.tolist()
    lengths = [sum(tokens[i] for i in row) for rows in ranks for row in rows]
    return Balance(
        useful_tokens=sum(lengths),
        row_tokens=sum(max(1, -(-length // multiple)) * multiple for length in lengths),
        mean_cost=sum(cost) / len(ranks),
        max_cost=float(max(sum(cost[i] for row in rows for i in row) for rows in ranks)),
    )
