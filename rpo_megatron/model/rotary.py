"""Rotary position embedding at explicit positions, so that a row's segments may start wherever they like."""

import math

import torch

from rpo_megatron.model.shape import ModelShape, RopeScaling


class Rotary(torch.nn.Module):
    """positions_T -> angles [T, 1, 1, head_dim] in fp32, in the layout that megatron's attention applies."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        super().__init__()
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
        self.frequencies = _scaled(1.0 / shape.rope_theta**exponents, shape.rope_scaling)

    def forward(self, positions_T: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(positions_T.float(), self.frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling | None) -> torch.Tensor:
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


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
