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
    probability_GK = (1.0 - 2.0 * label_smoothing) * best(batch).to(batch.logp_GK.dtype) + label_smoothing
    return probability_GK.log()


def margin(batch: Responses, *, beta: float) -> torch.Tensor:
    """The better of a pair is worth 1/(2 beta) nats of log-ratio more than the other: IPO (arXiv 2310.12036) Eq. 17.
    Returns [G, K]."""
    return best(batch).to(batch.logp_GK.dtype) / (2.0 * beta)
