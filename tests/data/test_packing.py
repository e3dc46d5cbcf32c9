"""Rows from lengths: nothing lost, doubled or split, budgets kept, ranks balanced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.packing import CROSSOVER, Size, pack, size_of

fast = settings(deadline=None, max_examples=80)
groups_of_segments = st.lists(
    st.lists(st.integers(2, 400), min_size=1, max_size=5).map(np.array), min_size=1, max_size=30
)


def sizes(groups: list[np.ndarray]) -> list[Size]:
    """Of groups whose segments stand alone."""
    return [Size(tokens=int(s.sum()), cost=float(s.sum() + (s**2).sum() / CROSSOVER)) for s in groups]


def total(segments: list[np.ndarray], row: list[int]) -> int:
    return sum(int(segments[i].sum()) for i in row)


@fast
@given(
    segments=groups_of_segments,
    budget=st.integers(1, 3000),
    dp_size=st.integers(1, 8),
    multiple=st.sampled_from([1, 4, 16]),
    packing=st.booleans(),
)
def test_rows_are_a_partition_within_budget(
    segments: list[np.ndarray], budget: int, dp_size: int, multiple: int, packing: bool
) -> None:
    """A group lost, doubled or split over rows; a row over budget after padding; ranks with unequal row counts, which
    would hang; packing=False that packs."""
    ranks = pack(sizes(segments), budget=budget, dp_size=dp_size, multiple=multiple, packing=packing)
    rows = [row for rank in ranks for row in rank]
    assert len(ranks) == dp_size
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for row in rows for i in row) == list(range(len(segments)))
    for row in rows:
        padded = -(-total(segments, row) // multiple) * multiple
        assert len(row) <= 1 or (packing and padded <= budget)
    assert ranks == pack(sizes(segments), budget=budget, dp_size=dp_size, multiple=multiple, packing=packing)


def test_fills_rows_first_fit_decreasing() -> None:
    """Rows left half empty. By hand: sizes 6 3 5 5 1 in rows of 10 -> (6, 3, 1) and (5, 5)."""
    segments = [np.array([n]) for n in (6, 3, 5, 5, 1)]
    ranks = pack(sizes(segments), budget=10, dp_size=1, multiple=1)
    assert sorted(sorted(row) for row in ranks[0]) == [[0, 1, 4], [2, 3]]


def test_a_group_over_budget_stands_alone() -> None:
    """A long group that is dropped, split or shares its row."""
    ranks = pack(sizes([np.array([700, 700]), np.array([5]), np.array([5])]), budget=100, dp_size=1, multiple=8)
    assert sorted(map(sorted, ranks[0])) == [[0], [1, 2]]


def test_splits_a_row_before_a_rank_stands_idle() -> None:
    """A padding row on one rank while its other row could be split: sizes 8 5 5 1 in rows of 9 go as 8 + 1 to one rank
    and 5, 5 to the other, which needs two rows. And a rank that gets nothing although there is enough for all."""
    ranks = pack(sizes([np.array([n]) for n in (8, 5, 5, 1)]), budget=9, dp_size=2, multiple=1)
    assert ranks == [[[0], [3]], [[1], [2]]]
    ranks = pack(sizes([np.array([10])] * 8), budget=1000, dp_size=4, multiple=1)
    assert [[len(row) for row in rank] for rank in ranks] == [[2]] * 4


def test_surplus_ranks_get_empty_rows() -> None:
    """Fewer groups than ranks: every rank must still run one row."""
    ranks = pack(sizes([np.array([10])] * 2), budget=1000, dp_size=4, multiple=1)
    assert sorted(map(len, (row for rank in ranks for row in rank))) == [0, 0, 1, 1]
    assert [len(rank) for rank in ranks] == [1] * 4


def test_balances_attention_not_only_tokens() -> None:
    """Balance by tokens alone. A segment of CROSSOVER = n tokens costs 2 n, one of n/4 costs 5/16 n: the long one is
    worth six of them (1.875 n), though four have as many tokens."""
    segments = [np.array([CROSSOVER])] + [np.array([CROSSOVER // 4])] * 6
    ranks = pack(sizes(segments), budget=1, dp_size=2, multiple=1, packing=False)
    assert [sorted(i for row in rank for i in row) for rank in ranks] == [[0], [1, 2, 3, 4, 5, 6]]


@fast
@given(seed=st.integers(0, 2**31), dp_size=st.integers(2, 4))
def test_work_of_ranks_is_close(seed: int, dp_size: int) -> None:
    """A packing that leaves one rank with most of the work: 64 groups, spread below a tenth of the mean."""
    generator = np.random.default_rng(seed)
    segments = [generator.integers(50, 600, size=generator.integers(2, 6)) for _ in range(64)]
    ranks = pack(sizes(segments), budget=8192, dp_size=dp_size, multiple=8)
    work = [
        sum(segments[i].sum() + (segments[i] ** 2).sum() / CROSSOVER for row in rank for i in row) for rank in ranks
    ]
    assert max(work) - min(work) < 0.1 * np.mean(work)


def test_size_by_hand() -> None:
    """A cost that forgets the attention to a shared prompt, or counts the prompt for every response."""
    lengths = np.array([10, 30])
    repeated = size_of(100, lengths, share_prompt=False)
    assert repeated.tokens == 240
    assert repeated.cost == pytest.approx(240 + (110**2 + 130**2) / CROSSOVER)
    shared = size_of(100, lengths, share_prompt=True)
    assert shared.tokens == 140
    assert shared.cost == pytest.approx(140 + (100**2 + (110**2 - 100**2) + (130**2 - 100**2)) / CROSSOVER)
