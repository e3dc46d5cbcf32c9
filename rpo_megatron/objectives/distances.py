"""D[ a || b ] per group: distances between scores a and targets b, over the valid responses of ragged groups.

Every function takes (a_GK, b_GK, valid_GK) and returns [G]. Each is K-way, and for two responses it is the pair form of
the literature. Adding a constant per group to a or to b changes nothing; a group with at most one valid response has
distance 0 and gradient 0; entries that are not valid never reach a result or a gradient. K is a group's own count of
valid responses. Everything is a log-softmax or a difference, so margins of 1e5 stay finite.
Source where none is named: RPO (arXiv 2502.00203) Sec. 3.2 and App. A.

`noise_corrected_cross_entropy` and `hinge` know pairs only, and `absolute_squared` is the exception to the second
sentence: it is for scores that have no unknown constant.
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


def reinforce_loo(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor, *, beta: float) -> torch.Tensor:
    """(K-1) / (K^2 beta) D^sqloo: with a = beta rho and b = r its gradient is -1/K sum_k A_k grad log pi(y_k), A the
    leave-one-out advantages of r - beta rho: RLOO's (arXiv 2402.14740), as RPO Table 1 says up to the factor."""
    num_G = valid_GK.sum(dim=1).clamp(min=1).to(a_GK.dtype)
    return (num_G - 1) / (num_G.square() * beta) * squared_loo(a_GK, b_GK, valid_GK)


def absolute_squared(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """mean_k (a_k - b_k)^2, not centred: regression of a reward model, which has no unknown constant per prompt."""
    d_GK = torch.where(valid_GK, a_GK - b_GK, 0.0)
    return d_GK.square().sum(dim=1) / valid_GK.sum(dim=1).clamp(min=1)


def squared_probability(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """1/2 sum_k (p_k - q_k)^2, p = softmax(a), q = softmax(b): the Brier score, for a pair (p_1 - q_1)^2. Ours, not
    RPO's. b may hold -inf (q = 0)."""
    p_GK = _log_softmax(a_GK, valid_GK).exp() * valid_GK
    q_GK = _log_softmax(b_GK, valid_GK).exp() * valid_GK
    return 0.5 * (p_GK - q_GK).square().sum(dim=1)


def noise_corrected_cross_entropy(
    a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor, *, label_smoothing: float
) -> torch.Tensor:
    """-log sigmoid(d) - e/(1-2e) d, d = a_better - a_other, e = label_smoothing, b the preferred target of a pair.

    The unbiased estimate of DPO's loss on clean labels when a share e is flipped: robust DPO (arXiv 2403.00409) Eq. 12.
    Not bounded below.
    """
    odds = label_smoothing / (1.0 - 2.0 * label_smoothing)
    return cross_entropy(a_GK, b_GK, valid_GK) - odds * _lead(a_GK, b_GK, valid_GK)


def hinge(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - d), d = a_better - a_other, b the preferred target of a pair: SLiC (arXiv 2305.10425), RSO (arXiv
    2309.06657) with log-ratios. 0 where there is no pair."""
    return torch.relu(1.0 - _lead(a_GK, b_GK, valid_GK)) * valid_GK.any(dim=1)


def _lead(a_GK: torch.Tensor, b_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """a of the response that b prefers minus a of the other, per pair; 0 where there is none."""
    q_GK = _log_softmax(b_GK, valid_GK).exp()
    return torch.where(valid_GK, (2.0 * q_GK - 1.0) * a_GK, 0.0).sum(dim=1)


def _log_softmax(x_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the valid entries; 0 at the others, so that products with them vanish instead of being NaN."""
    x_GK = torch.where(valid_GK, x_GK, -torch.inf)
    x_GK = torch.where(valid_GK.any(dim=1, keepdim=True), x_GK, 0.0)  # a softmax over nothing would be NaN
    return torch.where(valid_GK, x_GK.log_softmax(dim=1), 0.0)
