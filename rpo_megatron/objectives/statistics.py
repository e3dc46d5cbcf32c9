"""What is logged beside the loss. Every statistic is (sum, count): 0-dim fp64 tensors on the device, to be added up
over micro-batches and ranks and divided once. Called without gradients; nothing here waits for the device.

`best` is the first response of highest reward, `rest` are the responses with strictly lower reward. Groups without
such a rest (all rewards equal) count in `ties` and in nothing else that compares the two.
"""

import dataclasses

import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.selections import best, worse

ROUNDING, FLOOR = 1e-6, 1e-5
"""Error of a log-probability that comes from the order of fp32 additions: relative for long responses, and in nats for
short ones, whose sums are smaller than the logits they come from."""

Stats = dict[str, tuple[torch.Tensor, torch.Tensor]]


def collect(batch: Responses, *, implicit_GK: torch.Tensor | None) -> Stats:
    """All statistics that the columns of the batch allow. `implicit_GK` is beta rho, None without a reference.

    accuracy     share of pairs with r_i > r_j where the implicit reward orders them the same way; chance is 0.5
    margin       implicit reward of the best minus the mean of the rest, mean over groups; likewise reward_best,
                 reward_rest, and logp_best, logp_rest (summed log-probabilities of the policy)
    ties         share of groups whose rewards are all equal
    kl           mean over responses of log pi_ref - log pi, in nats: an estimate of KL(pi_ref || pi) if the responses
                 were sampled from the reference, and merely a drift of the log-probabilities if they were not
    """
    stats: Stats = {}
    if batch.ref_logp_GK is not None:
        stats["kl"] = _mean(batch.ref_logp_GK - batch.logp_GK, batch.valid_GK)
    if batch.reward_GK is not None:
        stats |= _best_and_rest(batch, batch.logp_GK, "logp")
        group_G = batch.valid_GK.any(dim=1)
        stats["ties"] = _mean((~worse(batch).any(dim=1)).to(batch.logp_GK.dtype), group_G)
    if batch.reward_GK is not None and implicit_GK is not None:
        stats["accuracy"] = _accuracy(implicit_GK, batch.reward_GK, batch.valid_GK)
        stats |= _best_and_rest(batch, implicit_GK, "reward")
        (best_sum, count), (rest_sum, _) = stats["reward_best"], stats["reward_rest"]
        stats["margin"] = (best_sum - rest_sum, count)
    return stats


def without_rounding(batch: Responses) -> Responses:
    """The batch with log-ratios below the rounding of fp32 sums set to 0. While the policy is the reference, a stored
    reference differs by such noise, and an accuracy over its signs would be chance about chance."""
    if batch.ref_logp_GK is None:
        return batch
    noise_GK = (batch.logp_GK - batch.ref_logp_GK).abs() <= FLOOR + ROUNDING * batch.ref_logp_GK.abs()
    return dataclasses.replace(batch, logp_GK=torch.where(noise_GK, batch.ref_logp_GK, batch.logp_GK))


def _mean(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(mask, values, 0.0).sum(), mask.sum().to(values.dtype)


def _best_and_rest(batch: Responses, values_GK: torch.Tensor, name: str) -> Stats:
    rest_GK = worse(batch)
    compares_G = rest_GK.any(dim=1)
    best_G = torch.where(best(batch), values_GK, 0.0).sum(dim=1)
    rest_G = torch.where(rest_GK, values_GK, 0.0).sum(dim=1) / rest_GK.sum(dim=1).clamp(min=1)
    return {f"{name}_best": _mean(best_G, compares_G), f"{name}_rest": _mean(rest_G, compares_G)}


def _accuracy(a_GK: torch.Tensor, reward_GK: torch.Tensor, valid_GK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs with r_i > r_j: 1 where a_i > a_j, 1/2 where they are equal."""
    both_GKK = valid_GK[:, :, None] & valid_GK[:, None, :]
    better_GKK = both_GKK & (reward_GK[:, :, None] > reward_GK[:, None, :])
    agreement_GKK = 0.5 * (1.0 + torch.sign(a_GK[:, :, None] - a_GK[:, None, :]))
    return _mean(agreement_GKK, better_GKK)
