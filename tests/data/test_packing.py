"""Rows from lengths: nothing lost, doubled or split, budgets kept, ranks balanced; and what a row holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.packing import CROSSOVER, build_row, empty_row, pack
from rpo_megatron.data.store import Group

fast = settings(deadline=None, max_examples=80)
groups_of_segments = st.lists(
    st.lists(st.integers(2, 400), min_size=1, max_size=5).map(np.array), min_size=1, max_size=30
)


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
    ranks = pack(segments, budget=budget, dp_size=dp_size, multiple=multiple, packing=packing)
    rows = [row for rank in ranks for row in rank]
    assert len(ranks) == dp_size
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for row in rows for i in row) == list(range(len(segments)))
    for row in rows:
        padded = -(-total(segments, row) // multiple) * multiple
        assert len(row) <= 1 or (packing and padded <= budget)
    assert ranks == pack(segments, budget=budget, dp_size=dp_size, multiple=multiple, packing=packing)


def test_fills_rows_first_fit_decreasing() -> None:
    """Rows left half empty. By hand: sizes 6 3 5 5 1 in rows of 10 -> (6, 3, 1) and (5, 5)."""
    segments = [np.array([n]) for n in (6, 3, 5, 5, 1)]
    ranks = pack(segments, budget=10, dp_size=1, multiple=1)
    assert sorted(sorted(row) for row in ranks[0]) == [[0, 1, 4], [2, 3]]


def test_a_group_over_budget_stands_alone() -> None:
    """A long group that is dropped, split or shares its row."""
    ranks = pack([np.array([700, 700]), np.array([5]), np.array([5])], budget=100, dp_size=1, multiple=8)
    assert sorted(map(sorted, ranks[0])) == [[0], [1, 2]]


def test_splits_a_row_before_a_rank_stands_idle() -> None:
    """A padding row on one rank while its other row could be split: sizes 8 5 5 1 in rows of 9 go as 8 + 1 to one rank
    and 5, 5 to the other, which needs two rows. And a rank that gets nothing although there is enough for all."""
    ranks = pack([np.array([n]) for n in (8, 5, 5, 1)], budget=9, dp_size=2, multiple=1)
    assert ranks == [[[0], [3]], [[1], [2]]]
    ranks = pack([np.array([10])] * 8, budget=1000, dp_size=4, multiple=1)
    assert [[len(row) for row in rank] for rank in ranks] == [[2]] * 4


def test_surplus_ranks_get_empty_rows() -> None:
    """Fewer groups than ranks: every rank must still run one row."""
    ranks = pack([np.array([10])] * 2, budget=1000, dp_size=4, multiple=1)
    assert sorted(map(len, (row for rank in ranks for row in rank))) == [0, 0, 1, 1]
    assert [len(rank) for rank in ranks] == [1] * 4


def test_balances_attention_not_only_tokens() -> None:
    """Balance by tokens alone. A segment of CROSSOVER = n tokens costs 2 n, one of n/4 costs 5/16 n: the long one is
    worth six of them (1.875 n), though four have as many tokens."""
    segments = [np.array([CROSSOVER])] + [np.array([CROSSOVER // 4])] * 6
    ranks = pack(segments, budget=1, dp_size=2, multiple=1, packing=False)
    assert [sorted(i for row in rank for i in row) for rank in ranks] == [[0], [1, 2, 3, 4, 5, 6]]


@fast
@given(seed=st.integers(0, 2**31), dp_size=st.integers(2, 4))
def test_work_of_ranks_is_close(seed: int, dp_size: int) -> None:
    """A packing that leaves one rank with most of the work: 64 groups, spread below a tenth of the mean."""
    generator = np.random.default_rng(seed)
    segments = [generator.integers(50, 600, size=generator.integers(2, 6)) for _ in range(64)]
    ranks = pack(segments, budget=8192, dp_size=dp_size, multiple=8)
    work = [
        sum(segments[i].sum() + (segments[i] ** 2).sum() / CROSSOVER for row in rank for i in row) for rank in ranks
    ]
    assert max(work) - min(work) < 0.1 * np.mean(work)


def group(prompt: list[int], *responses: list[int], reward: bool = True, ref: bool = False) -> Group:
    return Group(
        prompt=np.array(prompt),
        responses=[np.array(response) for response in responses],
        reward=np.arange(len(responses), dtype=np.float32) + 0.5 if reward else None,
        ref_logp=-np.arange(len(responses), dtype=np.float32) - 9 if ref else None,
    )


def test_row_by_hand() -> None:
    """Any slip of one in positions, scored positions or labels. Two groups with 2 and 1 responses, multiple 8."""
    row = build_row(
        [group([11, 12], [13, 14], [15], ref=True), group([21], [22, 23, 24], ref=True)],
        ids=np.array([7, 3]),
        draws=np.array([0.25, 0.75]),
        multiple=8,
    )
    assert row.tokens_T.tolist() == [11, 12, 13, 14, 11, 12, 15, 21, 22, 23, 24, 0, 0, 0, 0, 0]
    assert row.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert row.segments_S.tolist() == [4, 3, 4, 5]
    assert row.scored_position_N.tolist() == [1, 2, 5, 7, 8, 9]
    assert row.scored_label_N.tolist() == [13, 14, 15, 22, 23, 24]
    assert row.length_GK.tolist() == [[2, 1], [3, 0]]
    assert row.valid_GK.tolist() == [[True, True], [True, False]]
    assert row.reward_GK is not None
    assert row.reward_GK.tolist() == [[0.5, 1.5], [0.5, 0.0]]
    assert row.ref_logp_GK is not None
    assert row.ref_logp_GK.tolist() == [[-9.0, -10.0], [-9.0, 0.0]]
    assert (row.group_ids_G.tolist(), row.draw_G.tolist()) == ([7, 3], [0.25, 0.75])
    assert (row.has_padding, row.num_groups, row.num_real_tokens) == (True, 2, 11)


def test_full_row_has_no_padding_segment() -> None:
    """A padding segment of length 0, which attention kernels refuse; missing columns turned into zeros."""
    row = build_row([group([1, 2], [3, 4], reward=False)], ids=np.array([0]), draws=np.array([0.0]), multiple=4)
    assert row.segments_S.tolist() == [4]
    assert not row.has_padding
    assert row.reward_GK is None
    assert row.ref_logp_GK is None


@pytest.mark.parametrize(("has_reward", "has_reference"), [(True, False), (False, True)])
def test_empty_row(has_reward: bool, has_reference: bool) -> None:
    """A surplus rank's row that counts a group, scores a token, or has other columns than the real rows."""
    row = empty_row(multiple=4, has_reward=has_reward, has_reference=has_reference)
    assert row.segments_S.tolist() == [4]
    assert row.tokens_T.size == row.positions_T.size == 4
    assert row.scored_position_N.size == row.scored_label_N.size == row.length_GK.sum() == 0
    assert (row.num_groups, row.num_real_tokens) == (0, 0)
    assert row.group_ids_G.tolist() == [-1]
    assert (row.reward_GK is not None, row.ref_logp_GK is not None) == (has_reward, has_reference)


@fast
@given(seed=st.integers(0, 2**31), multiple=st.sampled_from([1, 2, 16]))
def test_row_invariants(seed: int, multiple: int) -> None:
    """Segments that do not cover the row, labels that are not the next token of their own segment, runs that do not
    match length_GK."""
    generator = np.random.default_rng(seed)

    def tokens() -> list[int]:
        return generator.integers(1, 99, size=generator.integers(1, 9)).tolist()

    groups = [group(tokens(), *(tokens() for _ in range(generator.integers(2, 5)))) for _ in range(3)]
    row = build_row(groups, ids=np.arange(3), draws=np.zeros(3), multiple=multiple)
    assert row.segments_S.sum() == row.tokens_T.size == row.positions_T.size
    assert row.segments_S.min() > 0
    assert row.tokens_T.size % multiple == 0
    assert row.tokens_T[row.scored_position_N + 1].tolist() == row.scored_label_N.tolist()
    segment_T = np.repeat(np.arange(row.segments_S.size), row.segments_S)
    assert segment_T[row.scored_position_N].tolist() == segment_T[row.scored_position_N + 1].tolist()
    runs = np.split(row.scored_label_N, np.cumsum(row.length_GK[row.valid_GK])[:-1])
    responses = [response for one in groups for response in one.responses]
    assert [run.tolist() for run in runs] == [response.tolist() for response in responses]
    assert (row.length_GK > 0).tolist() == row.valid_GK.tolist()
