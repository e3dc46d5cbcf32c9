"""How good a model of the reward is, on held-out responses: the same numbers for a reward model and for the implicit
reward of a policy, so that the two can be compared (as in arXiv 2409.03650). Statistics as in `statistics`, which also
turns them into the numbers that are printed; pairwise `accuracy` and `length_correlation` are among those of `collect`.
"""

import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.statistics import CALIBRATION_BINS, Stats, differences, mean, pairs, preferences


def ranking(batch: Responses, *, implicit_GK: torch.Tensor | None) -> Stats:
    """`implicit_GK` a_k is what the model thinks the responses are worth, up to a constant per group; the truth is the
    explicit reward. Empty where one of the two is missing.

    best_of_n     explicit reward of the response that the model ranks first (mean of those that it ranks first
                  together), mean over groups; it lies between
    reward_mean   mean explicit reward of a group, which is best of 1, and
    reward_max    highest explicit reward of a group: what a perfect model would reach
    kendall_tau   Kendall's tau-b of a group, mean over the groups whose rewards differ; 0 where the model sees no
                  difference. Where rewards tie and the model does not, even a perfect order is below 1
    brier         mean over pairs with r_i > r_j of (1 - p)^2, p = sigmoid(a_i - a_j) the model's probability that i
                  is the better one (Bradley-Terry); 0.25 for a model that knows nothing
    _calibration_0 to 9
                  of the same pairs, by confidence max(p, 1 - p): parts of `calibration_error`
    """
    if batch.reward_GK is None or implicit_GK is None:
        return {}
    return {
        **_best_of_n(batch.reward_GK, implicit_GK, batch.valid_GK),
        **_kendall_tau(batch, implicit_GK),
        **_calibration(implicit_GK, preferences(batch)),
    }


def _best_of_n(reward_GK: torch.Tensor, implicit_GK: torch.Tensor, valid_GK: torch.Tensor) -> Stats:
    group_G = valid_GK.any(dim=1)
    return {
        "best_of_n": mean(_mean_in_group(reward_GK, _highest(implicit_GK, valid_GK)), group_G),
        "reward_mean": mean(_mean_in_group(reward_GK, valid_GK), group_G),
        "reward_max": mean(_mean_in_group(reward_GK, _highest(reward_GK, valid_GK)), group_G),
    }


def _kendall_tau(batch: Responses, implicit_GK: torch.Tensor) -> Stats:
    """(concordant - discordant) / sqrt(pairs untied in the reward * pairs untied in a), M. G. Kendall 1945. Counts of
    both orders of a pair: the factor 2 cancels."""
    assert batch.reward_GK is not None
    pairs_GKK = pairs(batch)
    reward_GKK = torch.where(pairs_GKK, torch.sign(differences(batch.reward_GK)), 0.0)
    implicit_GKK = torch.where(pairs_GKK, torch.sign(differences(implicit_GK)), 0.0)
    concordance_G = (reward_GKK * implicit_GKK).sum(dim=(1, 2))
    num_reward_G, num_implicit_G = reward_GKK.abs().sum(dim=(1, 2)), implicit_GKK.abs().sum(dim=(1, 2))
    tau_G = concordance_G / (num_reward_G * num_implicit_G).clamp(min=1.0).sqrt()
    return {"kendall_tau": mean(tau_G, num_reward_G > 0)}


def _calibration(implicit_GK: torch.Tensor, better_GKK: torch.Tensor) -> Stats:
    """Naeini et al. 2015, with bins [0.50, 0.55), ..., [0.95, 1]. A pair is correct where p > 1/2, half so at 1/2."""
    margin_GKK = differences(implicit_GK)
    confidence_GKK = torch.sigmoid(margin_GKK.abs())
    correct_GKK = 0.5 * (1.0 + torch.sign(margin_GKK))
    num = len(CALIBRATION_BINS)
    bin_GKK = ((confidence_GKK - 0.5) * 2 * num).floor().clamp(max=num - 1)
    stats = {"brier": mean(torch.sigmoid(-margin_GKK).square(), better_GKK)}
    for index, name in enumerate(CALIBRATION_BINS):
        stats[name] = mean(correct_GKK - confidence_GKK, better_GKK & (bin_GKK == index))
    return stats


def _highest(values_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """All valid responses of highest value in their group. Returns bool [G, K]."""
    highest_G1 = values_GK.masked_fill(~valid_GK, -torch.inf).amax(dim=1, keepdim=True)
    return valid_GK & (values_GK == highest_G1)


def _mean_in_group(values_GK: torch.Tensor, mask_GK: torch.Tensor) -> torch.Tensor:
    """Mean of each group [G] over the responses in the mask; 0 for an empty one."""
    total_G = torch.where(mask_GK, values_GK.double(), 0.0).sum(dim=1)
    return total_G / mask_GK.sum(dim=1).clamp(min=1)
