"""What the policy thinks a response is worth: score letters [G, K], the left side of D[ score || target ].

A score is defined up to a constant per prompt (the unknown beta log Z(x)), which every distance must ignore.
"""

import torch

from rpo_megatron.objectives.responses import Responses


def log_ratios(batch: Responses, *, log_ratio: str) -> torch.Tensor:
    """rho_k = log pi(y_k|x) - log pi_ref(y_k|x), as a `sum` over the response's tokens (the papers' definition) or as
    their `mean`. Returns [G, K], in nats or nats per token."""
    assert batch.ref_logp_GK is not None
    rho_GK = batch.logp_GK - batch.ref_logp_GK
    return rho_GK / batch.length_GK.clamp(min=1) if log_ratio == "mean" else rho_GK


def implicit(batch: Responses, *, beta: float, log_ratio: str) -> torch.Tensor:
    """beta rho_k: DPO's implicit reward without beta log Z(x). RPO (arXiv 2502.00203) Eq. 4. Returns [G, K]."""
    return beta * log_ratios(batch, log_ratio=log_ratio)
