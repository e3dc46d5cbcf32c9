"""D[ a || b ] per group: distances between scores a and targets b, over the valid responses of ragged groups.

Every function takes (a_GK, b_GK, valid_GK) and returns [G]. Each is K-way, and for two responses it is the pair form of
the literature. Adding a constant per group to a or to b changes nothing; a group with at most one valid response has
distance 0 and gradient 0; entries that are not valid never reach a result or a gradient. K is a group's own count of
valid responses. Everything is a log-softmax or a difference, so margins of 1e5 stay finite.
Source of all but the cross-entropy: RPO (arXiv 2502.00203) Sec. 3.2 and App. A.
"""

import torch


def backward_kl(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """sum_k q_k (log q_k - log p_k), p = softmax(a), q = softmax(b): D^bwd (Eq. 13 for a pair). dD/da = p - q.
    b may hold -inf (q = 0)."""
    q_GK = _log_softmax(b_GK, valid_GK).exp() * valid_GK
    return cross_entropy(a_GK, b_GK, valid_GK) - torch.special.entr(q_GK).sum(dim=1)


def cross_entropy(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """-sum_k q_k log p_k: backward_kl plus the entropy of q, so the same gradient. b may hold -inf (q = 0)."""
    q_GK = _log_softmax(b_GK, valid_GK).exp() * valid_GK
    return -(q_GK * _log_softmax(a_GK, valid_GK)).sum(dim=1)


def forward_kl(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """sum_k p_k (log p_k - log q_k), p = softmax(a), q = softmax(b): D^fwd. dD/da_k = p_k (log p_k - log q_k - D).

    The paper's Eq. 10 prints D^bwd again; this is what its text and NeMo-Aligner's rpo_fwd_kl (K = 2) mean.
    """
    log_p_GK = _log_softmax(a_GK, valid_GK)
    return (log_p_GK.exp() * (log_p_GK - _log_softmax(b_GK, valid_GK))).sum(dim=1)


def squared(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """sum_k (d_k - mean d)^2, d = a - b; for a pair this is D^sq = 1/2 ((a_1 - a_2) - (b_1 - b_2))^2.
    dD/da_k = 2 (d_k - mean d). Without the centring, log Z(x) would not cancel."""
    num_G1 = valid_GK.sum(dim=1, keepdim=True).clamp(min=1)
    d_GK = torch.where(valid_GK, a_GK - b_GK, 0.0)
    centred_GK = torch.where(valid_GK, d_GK - d_GK.sum(dim=1, keepdim=True) / num_G1, 0.0)
    return centred_GK.square().sum(dim=1)


def squared_loo(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """1/2 sum_k (A_k - B_k)^2, A_k = a_k - mean_{j != k} a_j, likewise B (leave-one-out baselines): D^sqloo.

    A_k - B_k = K/(K-1) (d_k - mean d), which is how it is computed. dD/da_k = K/(K-1) (A_k - B_k). For a pair it is
    ((a_1 - a_2) - (b_1 - b_2))^2, twice `squared`.
    """
    num_G = valid_GK.sum(dim=1).to(a_GK.dtype)  # a quotient of integers would be fp32
    return 0.5 * (num_G / (num_G - 1).clamp(min=1)).square() * squared(a_GK, b_GK, valid_GK)


def _log_softmax(x_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the valid entries; 0 at the others, so that products with them vanish instead of being NaN."""
    x_GK = torch.where(valid_GK, x_GK, -torch.inf)
    x_GK = torch.where(valid_GK.any(dim=1, keepdim=True), x_GK, 0.0)  # a softmax over nothing would be NaN
    return torch.where(valid_GK, x_GK.log_softmax(dim=1), 0.0)
