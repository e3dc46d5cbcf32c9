"""Where the segments of a packed row begin, as variable-length attention kernels read it.

Made once per row and used by all layers: the numbers come from lengths that the host knows, so that nothing waits for
the device. Padding is a segment of its own, never a gap between borders (gaps corrupt results: NVIDIA/TransformerEngine
issue 2892).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Of S segments that follow one another."""

    start_S1: torch.Tensor
    """int32 [S + 1] on the device: where each begins, and where the last one ends."""
    longest: int
    """Tokens of the longest."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Borders":
        return cls(start_S1=on_device(np.cumsum([0, *lengths], dtype=np.int32), device), longest=max(lengths))


@dataclass(frozen=True, kw_only=True)
class SharedBorders:
    """What attends to shared prompts: for every run of responses with one prompt, the run's tokens (N in all) and the
    prompt's (M in all)."""

    query_N: torch.Tensor
    """Their positions in the row."""
    key_M: torch.Tensor
    queries: Borders
    """Of the runs among the N tokens."""
    keys: Borders
    """Of the prompts among the M tokens."""

    @classmethod
    def of(cls, lengths: Sequence[int], prompts: Sequence[int], device: torch.device) -> "SharedBorders | None":
        """None where no segment shares a prompt."""
        pairs = shared_ranges(lengths, prompts)
        if not pairs:
            return None
        (query_N, queries), (key_M, keys) = (_together(ranges, device) for ranges in zip(*pairs, strict=True))
        return cls(query_N=query_N, key_M=key_M, queries=queries, keys=keys)


def ranges_of(lengths: Sequence[int]) -> list[slice]:
    """Of each segment, its tokens in the row."""
    return [slice(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]


def shared_ranges(lengths: Sequence[int], prompts: Sequence[int]) -> list[tuple[slice, slice]]:
    """Of every run of responses with one prompt, which follow one another: the run's tokens, and the prompt's."""
    ranges, pairs = ranges_of(lengths), []
    for prompt, members in groupby(range(len(ranges)), key=lambda i: prompts[i]):
        if prompt >= 0:
            first, *_, last = [ranges[i] for i in members] * 2
            pairs.append((slice(first.start, last.stop), ranges[prompt]))
    return pairs


def _together(ranges: Sequence[slice], device: torch.device) -> tuple[torch.Tensor, Borders]:
    positions = np.concatenate([np.arange(one.start, one.stop) for one in ranges])
    return on_device(positions, device), Borders.of([one.stop - one.start for one in ranges], device)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy for which the host does not wait, as it would for one from memory that is not pinned."""
    host = torch.from_numpy(array)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
