"""Terms besides the distance, per group, over the selected responses. Each takes (batch, selected_GK) -> [G]."""

import torch

from rpo_megatron.objectives.responses import Responses


def nll(batch: Responses, selected_GK: torch.Tensor) -> torch.Tensor:
    """Mean over the selected responses of -log pi(y|x) / |y|, in nats per token; 0 where none is selected."""
    per_token_GK = torch.where(selected_GK, -batch.logp_GK / batch.length_GK.clamp(min=1), 0.0)
    return per_token_GK.sum(dim=1) / selected_GK.sum(dim=1).clamp(min=1)
