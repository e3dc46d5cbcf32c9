"""Responses: everything that an objective may know about a micro-batch.

Shapes: G groups (prompts), K responses of the widest group, M reward columns. Float tensors are fp32 or fp64; all live
on one device. A column that the method does not read is None.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The [G, K] record between the model and the mathematics. Entries where `valid_GK` is False hold finite values
    that no objective may let into a loss, a gradient or a statistic."""

    length_GK: torch.Tensor
    """Response lengths in tokens (int64), 0 where invalid."""
    valid_GK: torch.Tensor
    """bool. False where a group has fewer than K responses."""
    draw_G: torch.Tensor
    """fp64, uniform on [0, 1), one per group: the only randomness that an objective may use. The sampler makes it from
    (seed, epoch, group id), so that a random choice is the same under every layout, packing and resume."""
    logp_GK: torch.Tensor | None = None
    """Summed log-probability of each response under the policy; carries the gradient. None for a reward model."""
    value_GK: torch.Tensor | None = None
    """What a reward model's scalar head says of each response; carries the gradient. None for a policy."""
    ref_logp_GK: torch.Tensor | None = None
    """Summed log-probability under the frozen reference."""
    token_kl_GK: torch.Tensor | None = None
    """Sum over a response's tokens of KL(pi_ref(.|s_t) || pi(.|s_t)) over the whole vocabulary, in nats; carries the
    gradient."""
    entropy_GK: torch.Tensor | None = None
    """Sum over a response's tokens of the entropy of pi(.|s_t), in nats; on held-out data only."""
    reward_GK: torch.Tensor | None = None
    """Explicit reward r*(x, y): the mean over the chosen reward columns (config section `rewards`)."""
    rewards_GKM: torch.Tensor | None = None
    """Each chosen reward column by itself."""
    source_GK: torch.Tensor | None = None
    """bool. True where the response comes from another model than the one that training starts from."""
    progress: float = 1.0
    """Share of the run's steps that are done, 0 to 1, for knobs with a schedule."""
