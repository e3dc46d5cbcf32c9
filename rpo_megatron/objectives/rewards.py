"""What the policy thinks a response is worth: score letters [G, K], the left side of D[ score || target ].

A score is defined up to a constant per prompt (the unknown beta log Z(x)), which every distance must ignore.
"""

import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.selections import best

LARGEST_EXPONENT = 80.0
"""AlphaPO: exp(-alpha m) is cut off here. Beyond it fp32 overflows, and a mean log-probability of -80 / alpha per token
is no text that a model could have written."""
SMALL_ALPHA = 1e-6
"""Below this the two leading terms in alpha are exact to rounding, and expm1(x)/alpha divides by almost nothing."""


def log_ratios(batch: Responses, *, log_ratio: str) -> torch.Tensor:
    """rho_k = log pi(y_k|x) - log pi_ref(y_k|x), as a `sum` over the response's tokens (the papers' definition) or as
    their `mean`. Returns [G, K], in nats or nats per token."""
    assert batch.logp_GK is not None
    assert batch.ref_logp_GK is not None
    rho_GK = batch.logp_GK - batch.ref_logp_GK
    return rho_GK / batch.length_GK.clamp(min=1) if log_ratio == "mean" else rho_GK


def implicit(batch: Responses, *, beta: float, log_ratio: str) -> torch.Tensor:
    """beta rho_k: DPO's implicit reward without beta log Z(x). RPO (arXiv 2502.00203) Eq. 4. Returns [G, K]."""
    return beta * log_ratios(batch, log_ratio=log_ratio)


def logp(batch: Responses) -> torch.Tensor:
    """log pi(y_k|x), summed over tokens, no reference: EXPO (arXiv 2506.07492), compositional form. Returns [G, K]."""
    assert batch.logp_GK is not None
    return batch.logp_GK


def mean_logp(batch: Responses) -> torch.Tensor:
    """m_k = log pi(y_k|x) / |y_k|, nats per token. Returns [G, K]."""
    assert batch.logp_GK is not None
    return batch.logp_GK / batch.length_GK.clamp(min=1)


def alpha_shaped(batch: Responses, *, alpha: float, beta: float) -> torch.Tensor:
    """beta (1 - exp(-alpha m_k)) / alpha, m_k the mean log-probability per token: AlphaPO (arXiv 2501.03884).

    alpha = 0 is beta m_k (SimPO), alpha = 1 beta (1 - 1/p), alpha = -1 beta (p - 1) with p = exp(m_k). For alpha < 0 it
    is bounded below by -beta/|alpha|, so a loss on margins cannot reach 0. Its slope in m is beta exp(-alpha m).
    Returns [G, K].
    """
    m_GK = mean_logp(batch)
    if abs(alpha) < SMALL_ALPHA:
        return beta * (m_GK - 0.5 * alpha * m_GK.square())
    return -(beta / alpha) * torch.expm1((-alpha * m_GK).clamp(max=LARGEST_EXPONENT))


def alpha_shaped_with_margin(
    batch: Responses, *, alpha: float, beta: float, gamma: float | None, gamma_beta_ratio: float | None
) -> torch.Tensor:
    """The same, less gamma on the best response, which has to win by that much. gamma = gamma_beta_ratio * beta where
    only the ratio is given. SimPO (arXiv 2405.14734) Eq. 6, AlphaPO. Returns [G, K]."""
    if gamma is None:
        assert gamma_beta_ratio is not None
        gamma = gamma_beta_ratio * beta
    return alpha_shaped(batch, alpha=alpha, beta=beta) - gamma * best(batch).to(torch.float64)


def log_odds(batch: Responses) -> torch.Tensor:
    """log( p / (1 - p) ), p = exp(m_k) the geometric mean of the token probabilities: ORPO (arXiv 2403.07691) Eq. 4-7.
    Returns [G, K]."""
    m_GK = mean_logp(batch).clamp(max=-torch.finfo(torch.float32).tiny)  # p = 1 has infinite odds
    # log(1 - e^m), by the form that keeps digits on each side of p = 1/2 (Maechler 2012). Each sees only its own side:
    # torch.where would pass NaN on from the gradient of the other.
    near_one_GK = m_GK > -0.6931471805599453
    above_GK = torch.where(near_one_GK, m_GK, -0.5)
    below_GK = torch.where(near_one_GK, -1.0, m_GK)
    rest_GK = torch.where(near_one_GK, (-torch.expm1(above_GK)).log(), torch.log1p(-below_GK.exp()))
    return m_GK - rest_GK


def value(batch: Responses) -> torch.Tensor:
    """The scalar head's answer: a reward model. Returns [G, K]."""
    assert batch.value_GK is not None
    return batch.value_GK
