"""Rotary position embedding at explicit positions, so that a row's segments may start wherever they like."""

import math

import torch

from rpo_megatron.model.rope import RopeScaling
from rpo_megatron.model.shape import ModelShape


class Rotary(torch.nn.Module):
    """positions_T -> angles [T, 1, 1, d] in fp32, in the layout that megatron's attention applies to the first d
    numbers of a head; [2, T, 1, 1, d] where layers with a window have a base of their own: it comes second."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        super().__init__()
        size = shape.rotary_dim or shape.head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        self.frequencies = _scaled(1.0 / shape.rope_theta**exponents, shape.rope_scaling, theta=shape.rope_theta)
        if shape.local_rope_theta is not None:
            self.frequencies = torch.stack((self.frequencies, 1.0 / shape.local_rope_theta**exponents))

    def forward(self, positions_T: torch.Tensor) -> torch.Tensor:
        angles = positions_T.float()[:, None] * self.frequencies[..., None, :]
        return torch.cat((angles, angles), dim=-1)[..., None, None, :]


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
