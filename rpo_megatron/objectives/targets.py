"""What a response should be worth: target letters [G, K], the right side of D[ score || target ].

Targets are logits: the Kullback-Leibler distances read them through a softmax, so -inf means probability 0 there.
The squared distances need finite ones. Entries outside the selected responses are never read.
"""

import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.selections import best


def scored(batch: Responses, *, eta: float) -> torch.Tensor:
    """eta r*(x, y_k): RPO (arXiv 2502.00203) Eq. 4-7. Returns [G, K]."""
    assert batch.reward_GK is not None
    return eta * batch.reward_GK


def preferred(batch: Responses) -> torch.Tensor:
    """Probability 1 on the best response, 0 on the other: the limit eta -> inf of `scored`. Returns [G, K]."""
    return smoothed(batch, label_smoothing=0.0)


def smoothed(batch: Responses, *, label_smoothing: float) -> torch.Tensor:
    """Log-probabilities log(1 - e) on the better of a pair, log(e) on the other, e = label_smoothing: the chance that
    the label is wrong. The RPO paper's c (Table 1) is 1 - e. Returns [G, K]."""
    probability_GK = (1.0 - 2.0 * label_smoothing) * best(batch).to(torch.float64) + label_smoothing
    return probability_GK.log()


def margin(batch: Responses, *, beta: float) -> torch.Tensor:
    """The better of a pair is worth 1/(2 beta) nats of log-ratio more than the other: IPO (arXiv 2310.12036) Eq. 17.
    Returns [G, K]."""
    return best(batch).to(torch.float64) / (2.0 * beta)


def win_probability(batch: Responses, *, eta: float, win_scale: float) -> torch.Tensor:
    """eta w_k, w_k = mean over the group's other responses j of P(y_k beats y_j) = sigmoid(win_scale (r_k - r_j)).

    DNO's reward E_{y' ~ pi} P(y > y' | x) (arXiv 2404.03715, Alg. 1; RPO Table 1), with the group standing for samples
    of the policy and Bradley-Terry for the preference. A response alone in its group gets 0. Returns [G, K].
    """
    assert batch.reward_GK is not None
    other_GKK = batch.valid_GK[:, None, :] & ~torch.eye(
        batch.valid_GK.shape[1], dtype=torch.bool, device=batch.valid_GK.device
    )
    difference_GKK = batch.reward_GK[:, :, None] - batch.reward_GK[:, None, :]
    wins_GK = torch.where(other_GKK, torch.sigmoid(win_scale * difference_GKK), 0.0).sum(dim=2)
    return eta * wins_GK / other_GKK.sum(dim=2).clamp(min=1)


def attribute_posterior(batch: Responses) -> torch.Tensor:
    """log [ P(a|y_k,x) P(y_k|x) / Q'(y_k|x,a) ]: SteerLM 2.0 (arXiv 2406.08673) Eq. 11, RPO Table 1.

    The chosen reward columns are log-probabilities and are added up: log P(a|y,x) of the attributes under the predictor
    and log P(y|x) of the response under the unconditioned model (a column that `rpo score --with logp` writes). Q' is
    the reference. Returns [G, K].
    """
    assert batch.rewards_GKM is not None
    assert batch.ref_logp_GK is not None
    return batch.rewards_GKM.sum(dim=2) - batch.ref_logp_GK


def reference(batch: Responses) -> torch.Tensor:
    """log pi_ref(y_k|x): the policy should prefer what the reference prefers. Returns [G, K]."""
    assert batch.ref_logp_GK is not None
    return batch.ref_logp_GK
