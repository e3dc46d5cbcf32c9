"""Losses that no distance between scores and targets expresses, as RPO (arXiv 2502.00203) says of KTO. Each takes
(batch, selected_GK) and gives [G], like a divergence."""

import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.rewards import implicit
from rpo_megatron.objectives.selections import best


def kto(
    batch: Responses,
    selected_GK: torch.Tensor,
    *,
    beta: float,
    log_ratio: str,
    desirable_weight: float,
    undesirable_weight: float,
    kl_baseline: str,
) -> torch.Tensor:
    """Mean over the selected responses of  w_D (1 - sigmoid(beta rho - z))  for the better one (desirable) and
    w_U (1 - sigmoid(z - beta rho))  for the others: KTO (arXiv 2402.01306) Eq. 8.

    z, which carries no gradient, is the paper's beta max(0, KL). The paper estimates it from mismatched pairs of the
    micro-batch, which would make the gradient depend on the packing; here it is the mean of beta rho over the selected
    responses of the same prompt (`group`) or 0 (`zero`).
    """
    a_GK = implicit(batch, beta=beta, log_ratio=log_ratio)
    num_G1 = selected_GK.sum(dim=1, keepdim=True).clamp(min=1)
    z_G1 = torch.zeros_like(a_GK[:, :1])
    if kl_baseline == "group":
        z_G1 = (torch.where(selected_GK, a_GK, 0.0).sum(dim=1, keepdim=True) / num_G1).clamp(min=0.0).detach()
    desirable_GK = desirable_weight * torch.sigmoid(z_G1 - a_GK)
    undesirable_GK = undesirable_weight * torch.sigmoid(a_GK - z_G1)
    losses_GK = torch.where(best(batch), desirable_GK, undesirable_GK)
    return (torch.where(selected_GK, losses_GK, 0.0) / num_G1).sum(dim=1)
