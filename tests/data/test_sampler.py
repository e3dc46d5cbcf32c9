"""The order of the data: every group once per epoch, from any point, for ever the same."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.sampler import draw, epochs, group_ids

fast = settings(deadline=None, max_examples=60)
seeds = st.integers(-5, 2**40)


def splitmix64(state: int, count: int) -> int:
    """The `count`-th output of the published generator, in Python integers."""
    z = (state + count * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def hashed(*parts: int) -> int:
    state = 0
    for part in parts:
        state = splitmix64(state, part % 2**64 + 1)
    return state


def test_oracle_is_splitmix64() -> None:
    """An oracle that repeats our mistake: the first outputs that the authors publish for seed 0."""
    assert [splitmix64(0, n) for n in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@fast
@given(seed=seeds, epoch=st.integers(0, 1000), ids=st.lists(st.integers(0, 2**31), min_size=1, max_size=5))
def test_draws_are_the_hash(seed: int, epoch: int, ids: list[int]) -> None:
    """Integer arithmetic that overflows, saturates or changes with numpy: compared with Python integers, stream 2."""
    expected = [(hashed(seed, 2, epoch, i) >> 11) * 2.0**-53 for i in ids]
    assert draw(seed=seed, epoch=epoch, ids=np.array(ids)).tolist() == expected


def test_the_order_is_frozen() -> None:
    """A change of the sampler that would give a resumed run other data: argsort of the hashes, stream 1."""
    expected = sorted(range(11), key=lambda i: hashed(7, 1, 3, i))
    assert group_ids(11, seed=7, consumed=33, count=11).tolist() == expected


@fast
@given(seed=seeds, num_groups=st.integers(1, 40), consumed=st.integers(0, 200), count=st.integers(1, 100))
def test_any_stretch_is_a_slice_of_the_run(seed: int, num_groups: int, consumed: int, count: int) -> None:
    """A group lost or doubled within an epoch, or a resume at any point that sees other groups than the run did."""
    run = group_ids(num_groups, seed=seed, consumed=0, count=(302 // num_groups + 1) * num_groups)
    for epoch in run.reshape(-1, num_groups):
        assert sorted(epoch) == list(range(num_groups))
    stretch = group_ids(num_groups, seed=seed, consumed=consumed, count=count)
    assert stretch.tolist() == run[consumed : consumed + count].tolist()
    assert stretch.dtype == np.int64
    assert epochs(num_groups, consumed=consumed, count=count).tolist() == [
        (consumed + i) // num_groups for i in range(count)
    ]


def test_epochs_and_seeds_differ() -> None:
    """One permutation for all epochs or all seeds, or random pairs that repeat in every epoch."""
    first, second = group_ids(50, seed=1, consumed=0, count=100).reshape(2, 50)
    other = group_ids(50, seed=2, consumed=0, count=50)
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()
    ids = np.arange(50)
    assert not np.intersect1d(draw(seed=1, epoch=0, ids=ids), draw(seed=1, epoch=1, ids=ids)).size
    assert not np.intersect1d(draw(seed=1, epoch=0, ids=ids), draw(seed=2, epoch=0, ids=ids)).size


def test_draws_and_positions_are_uniform() -> None:
    """A biased hash: chi-square of 20 000 draws in 20 bins (mean 19, sd 6.2), no correlation with the next epoch, and
    the mean position of a group over 2000 shuffles."""
    ids = np.arange(20_000)
    draws = draw(seed=3, epoch=0, ids=ids)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45
    assert abs(np.corrcoef(draws, draw(seed=3, epoch=1, ids=ids))[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.03
    shuffles = group_ids(5, seed=3, consumed=0, count=10_000).reshape(2000, 5)
    assert np.abs(np.argsort(shuffles, axis=1).mean(axis=0) - 2).max() < 0.15


def test_epochs_are_vectorised() -> None:
    """A step that spans two epochs and takes the draws of one of them for all."""
    both = draw(seed=1, epoch=np.array([0, 1]), ids=np.array([4, 4]))
    assert both.tolist() == [draw(seed=1, epoch=e, ids=np.array([4]))[0] for e in (0, 1)]
