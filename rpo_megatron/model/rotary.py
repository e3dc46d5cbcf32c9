"""Rotary position embedding at explicit positions, so that a row's segments may start wherever they like."""

import math
from typing import TypeAlias

import torch

from rpo_megatron.model.rope import RopeScaling
from rpo_megatron.model.shape import ModelShape

Turn: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [T, 1, 1, d / 2] of the angles by which d numbers of a head turn."""


def rotate(x_T1hd: torch.Tensor, turn: Turn) -> torch.Tensor:
    """The first numbers of each head turned, the rest as it is. Those that turn together are half of them apart."""
    cos, sin = turn
    half = cos.shape[-1]
    first, second, rest = x_T1hd.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Rotary(torch.nn.Module):
    """positions_T -> the turns of a row's tokens, made once for all layers: of those with full attention, and of those
    with a window where these have a base of their own."""

    def __init__(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.stretch = shape.rope_scaling.attention_factor if shape.rope_scaling is not None else 1.0
        size = shape.rotary_dim or shape.head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        self.frequencies = [_scaled(1.0 / shape.rope_theta**exponents, shape.rope_scaling, theta=shape.rope_theta)]
        if shape.local_rope_theta is not None:
            self.frequencies.append(1.0 / shape.local_rope_theta**exponents)

    def forward(self, positions_T: torch.Tensor) -> list[Turn]:
        angles = [positions_T.float()[:, None, None, None] * frequencies for frequencies in self.frequencies]
        return [(self._rounded(angle.cos()), self._rounded(angle.sin())) for angle in angles]

    def _rounded(self, number: torch.Tensor) -> torch.Tensor:
        return (number * self.stretch).to(self.dtype)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling | None, *, theta: float) -> torch.Tensor:
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float32, device=frequencies.device)
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, theta)
    return _llama3(frequencies, scaling)


def _yarn(frequencies: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """What turns often within the original context is kept, what turns seldom is stretched by `factor`, and between
    them, from one dimension to the other, ever more (arXiv 2309.00071, section 3.2)."""
    original, most, least = scaling.original_max_positions, scaling.most_turns, scaling.least_turns
    assert original is not None
    assert most is not None
    assert least is not None
    count = len(frequencies)
    low, high = (count * math.log(original / (2 * math.pi * turns)) / math.log(theta) for turns in (most, least))
    if scaling.whole_dimensions:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    numbers = torch.arange(count, dtype=torch.float32, device=frequencies.device)
    stretched = ((numbers - low) / (high - low or 0.001)).clamp(0.0, 1.0)
    return frequencies / scaling.factor * stretched + frequencies * (1.0 - stretched)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions
    assert low is not None
    assert high is not None
    assert original is not None
    turns = original * frequencies / (2 * math.pi)  # within the original context
    keep = (turns - low) / (high - low)
    keep = keep.clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)
