"""Responses: everything that an objective may know about a micro-batch.

Shapes: G groups (prompts), K responses of the widest group. Float tensors are fp32 or fp64; all live on one device.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The [G, K] record between the model and the mathematics. Entries where `valid_GK` is False hold finite values
    that no objective may let into a loss, a gradient or a statistic."""

    logp_GK: torch.Tensor
    """Summed log-probability of each response under the policy; carries the gradient."""
    length_GK: torch.Tensor
    """Response lengths in tokens (int64), 0 where invalid."""
    ref_logp_GK: torch.Tensor | None
    """Summed log-probability under the frozen reference; None for a method that reads no reference."""
    reward_GK: torch.Tensor | None
    """Explicit reward r*(x, y); None for a method that reads no reward."""
    valid_GK: torch.Tensor
    """bool. False where a group has fewer than K responses."""
    draw_G: torch.Tensor
    """fp64, uniform on [0, 1), one per group: the only randomness that an objective may use. The sampler makes it from
    (seed, epoch, group id), so that a random choice is the same under every layout, packing and resume."""
