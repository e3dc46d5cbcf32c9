"""Items into bins: the best partition where all can be tried, and the limits that any must keep to."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.partition import Items, Rows, Shape, cheapest_bin_first, fill_empty, first_fit, spread

fast = settings(deadline=None, max_examples=150)
numbers = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=7)


def items_of(pairs: list[tuple[int, int]]) -> Items:
    return Items(cost=[cost for cost, _ in pairs], size=[size for _, size in pairs])


def best(items: Items, *, num_bins: int, room: int) -> int | None:
    """Of all partitions into bins of one row, the lowest highest cost."""
    found = []
    for bins in product(range(num_bins), repeat=len(items.cost)):
        members = [[i for i, b in enumerate(bins) if b == number] for number in range(num_bins)]
        if all(sum(items.size[i] for i in row) <= room for row in members):
            found.append(max(map(items.total, members)))
    return min(found, default=None)


@fast
@given(pairs=numbers, num_bins=st.integers(1, 3), room=st.integers(20, 100))
def test_close_to_the_best_of_all(pairs: list[tuple[int, int]], num_bins: int, room: int) -> None:
    """A partition far from the best one, or none where there is plenty of room (a third more than the sizes need)."""
    items = items_of(pairs)
    shape = Shape(num_bins=num_bins, num_rows=1, room=room)
    found = spread(range(len(pairs)), items, shape, limit=sum(items.cost))
    lowest = best(items, num_bins=num_bins, room=room)
    if found is None:
        assert num_bins * (room - max(items.size)) < sum(items.size), "room for all wherever they go"
    else:
        assert lowest is not None
        assert lowest <= items.highest(found) <= 4 / 3 * lowest or sum(items.size) * 2 > num_bins * room


@fast
@given(
    pairs=numbers,
    num_bins=st.integers(1, 5),
    num_rows=st.integers(1, 3),
    room=st.integers(20, 60),
    limit=st.integers(1, 300),
)
def test_limits_hold(pairs: list[tuple[int, int]], num_bins: int, num_rows: int, room: int, limit: int) -> None:
    """Items lost or doubled, a row beyond its room, a bin beyond its limit, an empty bin beside another's two."""
    items = items_of(pairs)
    shape = Shape(num_bins=num_bins, num_rows=num_rows, room=room)
    found = spread(range(len(pairs)), items, shape, limit=limit)
    if found is None:
        return
    assert len(found) == num_bins
    assert {len(rows) for rows in found} == {num_rows}
    assert sorted(i for rows in found for row in rows for i in row) == list(range(len(pairs)))
    assert max(sum(items.size[i] for i in row) for rows in found for row in rows) <= room
    assert items.highest(found) <= limit
    counts = [sum(map(len, rows)) for rows in found]
    assert min(counts) > 0 or max(counts) == 1


def test_multifit_by_hand() -> None:
    """Catches a bisection that never improves on the first partition. 5 5 4 4 3 3 3 on 3 bins is Graham's worst case:
    costliest first gives 11, the best is 9."""
    items = Items(cost=[5, 5, 4, 4, 3, 3, 3], size=[1] * 7)
    shape = Shape(num_bins=3, num_rows=1, room=7)
    first = cheapest_bin_first(range(7), items, shape)
    assert first is not None
    assert items.highest(first) == 11
    found = spread(range(7), items, shape, limit=11)
    assert found is not None
    assert items.highest(found) == 9


def test_first_fit_by_hand() -> None:
    """Catches best fit or next fit in its place: 6 5 5 3 1 in rows of 10."""
    items = Items(cost=[1] * 5, size=[5, 6, 1, 5, 3])
    assert first_fit(range(5), items, room=10) == [[1, 4, 2], [0, 3]]


def test_empty_bins_are_filled_from_the_costliest() -> None:
    """Catches a row that is emptied to fill another, and an endless search when only single items are left."""
    items = Items(cost=[8, 4, 2, 1], size=[1] * 4)
    bins: list[Rows] = [[[0, 1, 2, 3]], [[]], [[]]]
    fill_empty(bins, items)
    assert bins == [[[0]], [[1, 3]], [[2]]]
    bins = [[[0], [1]], [[], []], [[], []]]
    fill_empty(bins, items)
    assert bins == [[[], [1]], [[0], []], [[], []]]
