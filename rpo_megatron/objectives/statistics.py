"""What is logged beside the loss, from sums on the device to the numbers of a log line:

1. `collect` turns a micro-batch into statistics (sum, count): 0-dim fp64 tensors on the device. Called without
   gradients; nothing here waits for the device.
2. The training adds them up over micro-batches, steps and ranks, name by name.
3. `summarise` divides once. What is no mean (a correlation, a calibration error) travels as several additive parts
   whose names begin with an underscore, and comes out as one number.

`best` is the first response of highest reward, `rest` are the responses with strictly lower reward. Groups without
such a rest (all rewards equal) count in `ties` and in nothing else that compares the two.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.selections import best, worse

ROUNDING, FLOOR = 1e-6, 1e-5
"""Error of a log-probability that comes from the order of fp32 additions: relative for long responses, and in nats for
short ones, whose sums are smaller than the logits they come from."""

CALIBRATION_BINS = tuple(f"_calibration_{index}" for index in range(10))
"""Parts of `calibration_error`, one per bin of confidence: (sum of correct - confidence, number of pairs)."""

Statistic = tuple[torch.Tensor, torch.Tensor]
Stats = dict[str, Statistic]


def collect(batch: Responses, *, implicit_GK: torch.Tensor | None) -> Stats:
    """All statistics that the columns of the batch allow. `implicit_GK` is what the model thinks the responses are
    worth, up to a constant per group: an implicit reward, or a reward model's value. None where it thinks nothing.

    accuracy     share of pairs with r_i > r_j that the implicit reward orders the same way; chance is 0.5
    margin       implicit reward of the best minus the mean of the rest, mean over groups; likewise reward_best,
                 reward_rest, and logp_best, logp_rest (summed log-probabilities of the policy)
    ties         share of groups whose rewards are all equal
    kl           mean over responses of log pi_ref - log pi, in nats: an estimate of KL(pi_ref || pi) if the responses
                 were sampled from the reference, and merely a drift of the log-probabilities if they were not
    token_kl     mean over responses of the mean over their tokens of KL(pi_ref || pi), in nats per token
    entropy      the same of the policy's entropy: near 0 it answers alike, whatever it is asked
    _implicit_implicit, _implicit_length, _length_length
                 second moments of implicit reward and length around the means of their groups
    """
    stats: Stats = {}
    if batch.ref_logp_GK is not None and batch.logp_GK is not None:
        stats["kl"] = mean(batch.ref_logp_GK - batch.logp_GK, batch.valid_GK)
    for name, sum_GK in (("token_kl", batch.token_kl_GK), ("entropy", batch.entropy_GK)):
        if sum_GK is not None:
            stats[name] = mean(sum_GK.double() / batch.length_GK.clamp(min=1), batch.valid_GK)
    if batch.reward_GK is not None:
        stats["ties"] = mean((~worse(batch).any(dim=1)).double(), batch.valid_GK.any(dim=1))
        if batch.logp_GK is not None:
            stats |= _best_and_rest(batch, batch.logp_GK, "logp")
    if implicit_GK is not None:
        stats |= _length_moments(batch, implicit_GK)
    if batch.reward_GK is not None and implicit_GK is not None:
        agreement_GKK = 0.5 * (1.0 + torch.sign(differences(implicit_GK)))  # 1/2 where it sees no difference
        stats["accuracy"] = mean(agreement_GKK, preferences(batch))
        stats |= _best_and_rest(batch, implicit_GK, "reward")
        (best_sum, count), (rest_sum, _) = stats["reward_best"], stats["reward_rest"]
        stats["margin"] = (best_sum - rest_sum, count)
    return stats


def summarise(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """The numbers to log from added-up statistics: sum / count of everything that was counted at all, and

    length_correlation   Pearson correlation of implicit reward and length over all responses, after each group's mean
                         is taken from both, so that the unknown constant of a group does not matter; in [-1, 1],
                         absent where one of the two never varies within a group
    calibration_error    expected calibration error over `CALIBRATION_BINS`: mean over pairs of the distance between
                         their bin's accuracy and its confidence; absent without pairs
    """
    numbers = {name: sums[name] / counts[name] for name in sums if counts[name] > 0 and not name.startswith("_")}
    return numbers | _length_correlation(sums) | _calibration_error(sums, counts)


def without_rounding(batch: Responses) -> Responses:
    """The batch with log-ratios below the rounding of fp32 sums set to 0. While the policy is the reference, a stored
    reference differs by such noise, and an accuracy over its signs would be chance about chance."""
    if batch.ref_logp_GK is None or batch.logp_GK is None:
        return batch
    noise_GK = (batch.logp_GK - batch.ref_logp_GK).abs() <= FLOOR + ROUNDING * batch.ref_logp_GK.abs()
    return dataclasses.replace(batch, logp_GK=torch.where(noise_GK, batch.ref_logp_GK, batch.logp_GK))


def mean(values: torch.Tensor, mask: torch.Tensor) -> Statistic:
    """The statistic of the mean of `values` where `mask` is True; what stands elsewhere does not matter."""
    return torch.where(mask, values.double(), 0.0).sum(), mask.sum().double()


def differences(values_GK: torch.Tensor) -> torch.Tensor:
    """x_i - x_j of every two responses of a group. Returns fp64 [G, K, K], indexed g, i, j."""
    values_GK = values_GK.double()
    return values_GK[:, :, None] - values_GK[:, None, :]


def pairs(batch: Responses) -> torch.Tensor:
    """Every two valid responses of a group, in both orders. Returns bool [G, K, K]."""
    return batch.valid_GK[:, :, None] & batch.valid_GK[:, None, :]


def preferences(batch: Responses) -> torch.Tensor:
    """The pairs with r_i > r_j. Returns bool [G, K, K], indexed g, i, j."""
    assert batch.reward_GK is not None
    return pairs(batch) & (differences(batch.reward_GK) > 0)


def _best_and_rest(batch: Responses, values_GK: torch.Tensor, name: str) -> Stats:
    rest_GK = worse(batch)
    compares_G = rest_GK.any(dim=1)
    best_G = torch.where(best(batch), values_GK, 0.0).sum(dim=1)
    rest_G = torch.where(rest_GK, values_GK, 0.0).sum(dim=1) / rest_GK.sum(dim=1).clamp(min=1)
    return {f"{name}_best": mean(best_G, compares_G), f"{name}_rest": mean(rest_G, compares_G)}


def _length_moments(batch: Responses, implicit_GK: torch.Tensor) -> Stats:
    """sum_i (x_i - mean x)(y_i - mean y) of a group is sum_ij (x_i - x_j)(y_i - y_j) / 2n: without the rounding of a
    mean, so that values that do not vary give exactly 0."""
    pairs_GKK = pairs(batch)
    implicit_GKK, length_GKK = differences(implicit_GK), differences(batch.length_GK)
    num_G = batch.valid_GK.sum(dim=1)

    def moment(products_GKK: torch.Tensor) -> Statistic:
        total_G = torch.where(pairs_GKK, products_GKK, 0.0).sum(dim=(1, 2))
        return (total_G / (2 * num_G).clamp(min=1)).sum(), num_G.sum().double()

    return {
        "_implicit_implicit": moment(implicit_GKK.square()),
        "_implicit_length": moment(implicit_GKK * length_GKK),
        "_length_length": moment(length_GKK.square()),
    }


def _length_correlation(sums: Mapping[str, float]) -> dict[str, float]:
    scale = math.sqrt(sums.get("_implicit_implicit", 0.0)) * math.sqrt(sums.get("_length_length", 0.0))
    if scale == 0.0:
        return {}
    correlation = sums["_implicit_length"] / scale
    return {"length_correlation": max(min(correlation, 1.0), -1.0)}  # the bounds come second: NaN stays NaN


def _calibration_error(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    num = sum(counts.get(name, 0.0) for name in CALIBRATION_BINS)
    gaps = sum(abs(sums.get(name, 0.0)) for name in CALIBRATION_BINS)
    return {"calibration_error": gaps / num} if num > 0 else {}
