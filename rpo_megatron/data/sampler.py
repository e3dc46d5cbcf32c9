"""Which groups belong to which step, as a pure function of (seed, consumed): no state, no communication.

1. The k-th group consumed by the run is number k % D of epoch k // D, D = groups in the store.
2. Every epoch has a permutation of its own: the group ids in the order of their hashes.
3. Every (epoch, group) has one uniform number, for random choices inside an objective.

Hashes come from splitmix64, counter-based: ten lines of integer arithmetic that no library update can change, so that
a resumed run goes on with the same data on any numpy.
"""

from functools import lru_cache

import numpy as np

_ORDER, _DRAW = 1, 2  # independent streams of one seed
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def group_ids(num_groups: int, *, seed: int, consumed: int, count: int) -> np.ndarray:
    """Ids [count] of the groups number `consumed`, `consumed` + 1, ... of the run; it may span epochs. int64."""
    positions = np.arange(consumed, consumed + count)
    ids = np.empty(count, dtype=np.int64)
    for epoch in range(consumed // num_groups, (consumed + count - 1) // num_groups + 1):
        here = positions // num_groups == epoch
        ids[here] = _permutation(num_groups, seed, epoch)[positions[here] % num_groups]
    return ids


def epochs(num_groups: int, *, consumed: int, count: int) -> np.ndarray:
    """The epoch [count] that each of the groups that `group_ids` returns belongs to. int64."""
    return np.arange(consumed, consumed + count) // num_groups


def draw(*, seed: int, epoch: np.ndarray | int, ids: np.ndarray) -> np.ndarray:
    """One number per (seed, epoch, group id), uniform on [0, 1): the upper 53 bits of a splitmix64 hash. float64."""
    return (_hash(seed, _DRAW, epoch, ids) >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=2)  # two, because a step may span two epochs
def _permutation(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    order = np.argsort(_hash(seed, _ORDER, epoch, np.arange(num_groups)), kind="stable")
    order.flags.writeable = False
    return order


def _hash(seed: int, stream: int, epoch: np.ndarray | int, ids: np.ndarray) -> np.ndarray:
    key = np.zeros(1, dtype=np.uint64)
    for part in (np.array([seed % 2**64], dtype=np.uint64), stream, epoch, ids):
        key = _mix(key + _GOLDEN * (np.atleast_1d(part).astype(np.uint64) + np.uint64(1)))
    return key


def _mix(z: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
