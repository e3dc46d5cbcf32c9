"""Which groups belong to which step, as a pure function of (seed, consumed): no state, no table, no communication.

1. The k-th group consumed by the run is number k % D of epoch k // D, D = groups in the store.
2. Every epoch has a permutation of its own, which is computed for the positions that are asked for: a Feistel network
   over pairs (a, b) with a * b just above D (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); what
   leaves 0 .. D - 1 goes through it again.
3. Every (epoch, group) has one uniform number, for random choices inside an objective.

Hashes come from splitmix64, counter-based: ten lines of integer arithmetic that no library update can change, so that
a resumed run goes on with the same data on any numpy.
"""

import hashlib
import math

import numpy as np

_ORDER, _DRAW = 1, 2  # independent streams of one seed
_ROUNDS = 24
"""From 18 on all orders of up to 7 groups are equally frequent in 300,000 epochs."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def group_ids(num_groups: int, *, seed: int, consumed: int, count: int) -> np.ndarray:
    """Ids [count] of the groups number `consumed`, `consumed` + 1, ... of the run; it may span epochs. int64."""
    epoch = epochs(num_groups, consumed=consumed, count=count)
    position = np.arange(consumed, consumed + count) - epoch * num_groups
    return _permuted(position, num_groups, seed=seed, epoch=epoch)


def epochs(num_groups: int, *, consumed: int, count: int) -> np.ndarray:
    """The epoch [count] that each of the groups that `group_ids` returns belongs to. int64."""
    return np.arange(consumed, consumed + count) // num_groups


def draw(*, seed: int, epoch: np.ndarray | int, ids: np.ndarray) -> np.ndarray:
    """One number per (seed, epoch, group id), uniform on [0, 1): the upper 53 bits of a splitmix64 hash. float64."""
    return (_hash(seed, _DRAW, epoch, ids) >> np.uint64(11)) * 2.0**-53


def fingerprint(num_groups: int, *, seed: int) -> str:
    """sha256 over the beginning of two epochs, ids and random numbers: equal where a run gets the same groups in the
    same order, whatever version of this file decides it."""
    count = min(num_groups, 1000)
    digest = hashlib.sha256()
    for epoch in (0, 1):
        ids = group_ids(num_groups, seed=seed, consumed=epoch * num_groups, count=count)
        for array in (ids, draw(seed=seed, epoch=epoch, ids=ids)):
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _permuted(position: np.ndarray, num_groups: int, *, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where the epoch's permutation of 0 .. num_groups - 1 takes each position."""
    value = _feistel(position, num_groups, seed=seed, epoch=epoch)
    while (outside := value >= num_groups).any():
        value[outside] = _feistel(value[outside], num_groups, seed=seed, epoch=epoch[outside])
    return value


def _feistel(value: np.ndarray, num_groups: int, *, seed: int, epoch: np.ndarray) -> np.ndarray:
    """A permutation of 0 .. a * b - 1, a = ceil(sqrt(D)), b = D / a up to the next even number (with two odd ones all
    permutations would be even): the two digits of a number take turns in being moved by a hash of the other."""
    size = math.isqrt(num_groups - 1) + 1
    other_size = 2 * -(-num_groups // (2 * size))
    digit, other = value % size, value // size
    for number in range(_ROUNDS):
        hashed = _hash(seed, _ORDER, epoch, number, other) % np.uint64(size)
        digit, other = other, (digit + hashed.astype(np.int64)) % size
        size, other_size = other_size, size
    return other * size + digit


def _hash(seed: int, *parts: np.ndarray | int) -> np.ndarray:
    key = np.zeros(1, dtype=np.uint64)
    for part in (np.array([seed % 2**64], dtype=np.uint64), *parts):
        key = _mix(key + _GOLDEN * (np.atleast_1d(part).astype(np.uint64) + np.uint64(1)))
    return key


def _mix(z: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
