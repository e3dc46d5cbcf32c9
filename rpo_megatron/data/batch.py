"""Tokenized groups on their way from a worker to the store: a few flat arrays for all of them.

Shapes: G groups, S sequences (of each group its prompt, then its responses), R responses, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class GroupBatch:
    """Groups end to end."""

    tokens_T: np.ndarray
    length_S: np.ndarray
    """Tokens of each sequence."""
    num_responses_G: np.ndarray
    reward_R: np.ndarray | None
    """float32, or None when the groups have no rewards."""
    columns_R: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float32, further numbers by name."""

    def __len__(self) -> int:
        return self.num_responses_G.size

    def check(self, *, vocab_size: int) -> None:
        """Raises ValueError when one of them is no group: fewer than two responses, an empty sequence, a token outside
        the vocabulary, numbers that are not finite or not one per response."""
        if self.num_responses_G.min(initial=2) < 2:
            raise ValueError(f"a group needs two responses at least, got {self.num_responses_G.min()}")
        tokens_T = self.tokens_T
        if self.length_S.min(initial=1) < 1 or tokens_T.dtype.kind not in "iu":
            raise ValueError("expected non-empty rows of integer token ids")
        if tokens_T.size and (tokens_T.min() < 0 or tokens_T.max() >= vocab_size):
            raise ValueError(f"tokens from {tokens_T.min()} to {tokens_T.max()} in a vocabulary of {vocab_size}")
        size = int(self.num_responses_G.sum())
        if self.reward_R is not None:
            check_finite(self.reward_R, size=size, what="rewards")
        for name, values_R in self.columns_R.items():
            check_finite(values_R, size=size, what=f"column '{name}'")

    def selected(self, keep_G: np.ndarray, *, with_rewards: bool) -> "GroupBatch":
        """Only the groups for which `keep_G` is True, with their rewards or without."""
        num_responses_G = self.num_responses_G
        reward_R = self.reward_R if with_rewards else None
        if keep_G.all():
            return replace(self, reward_R=reward_R)
        keep_S, keep_R = np.repeat(keep_G, num_responses_G + 1), np.repeat(keep_G, num_responses_G)
        return GroupBatch(
            tokens_T=self.tokens_T[np.repeat(keep_S, self.length_S)],
            length_S=self.length_S[keep_S],
            num_responses_G=num_responses_G[keep_G],
            reward_R=None if reward_R is None else reward_R[keep_R],
            columns_R={name: values_R[keep_R] for name, values_R in self.columns_R.items()},
        )


def float32(values: np.ndarray) -> np.ndarray:
    """As float32; what overflows becomes infinite, without a warning."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(FLOAT32)


def check_finite(values: np.ndarray, *, size: int, what: str) -> None:
    """Raises ValueError, calling the values `what`, unless they are `size` finite numbers."""
    if values.shape != (size,):
        raise ValueError(f"{what}: expected {size} numbers, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{what}: {values[~np.isfinite(values)][:8]} are not all finite")


def starts(counts: np.ndarray) -> np.ndarray:
    """Where each of several runs of such lengths starts when they lie end to end."""
    return np.cumsum(counts) - counts


def concatenate(arrays: Sequence[np.ndarray], *, dtype: np.dtype) -> np.ndarray:
    """Like numpy's, also for no array at all."""
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
