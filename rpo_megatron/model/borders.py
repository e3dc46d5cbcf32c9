"""Where the segments of a packed row begin, as variable-length attention kernels read it.

Made once per row and used by all layers: the numbers come from lengths that the host knows, so that nothing waits for
the device. Padding is a segment of its own, never a gap between borders (gaps corrupt results: NVIDIA/TransformerEngine
issue 2892).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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
        stop_S = np.cumsum(lengths)
        runs, keys = [], []
        for prompt, members in groupby(range(len(lengths)), key=lambda i: prompts[i]):
            first, *_, last = [*members] * 2
            if prompt >= 0:
                runs.append(np.arange(stop_S[first] - lengths[first], stop_S[last]))
                keys.append(np.arange(stop_S[prompt] - lengths[prompt], stop_S[prompt]))
        if not runs:
            return None
        return cls(
            query_N=on_device(np.concatenate(runs), device),
            key_M=on_device(np.concatenate(keys), device),
            queries=Borders.of([run.size for run in runs], device),
            keys=Borders.of([key.size for key in keys], device),
        )


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy for which the host does not wait."""
    host = torch.from_numpy(array)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
