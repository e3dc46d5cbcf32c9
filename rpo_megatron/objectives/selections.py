"""Which of a group's responses a method acts on. A pair method for K > 2 is a K-way method that sees two responses, so
distances and anchors need to know nothing about pairs.

The best response is the first of those with the highest reward. Responses that tie with it are not its opponents: no
preference exists between them. A group without a strictly worse response gives a pair method nothing to act on.

Shapes: R rows, P per group (R = G * P); P is 1 except for `all_pairs`.
"""

import dataclasses
from dataclasses import dataclass

import torch

from rpo_megatron.objectives.responses import Responses


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the divergences see: rows [R, K'], each a part of a group, in the order of the groups."""

    batch: Responses
    """The rows; the batch itself for most selections."""
    mask_RK: torch.Tensor
    """bool. Responses of the row that take part; a row without any counts nowhere."""

    def per_group(self, losses_R: torch.Tensor, *, num_groups: int) -> torch.Tensor:
        """Mean over the rows of each group that take part: [R] -> [G]; 0 for a group without any."""
        active_GP = self.mask_RK.any(dim=1).view(num_groups, -1)
        losses_GP = torch.where(active_GP, losses_R.view(num_groups, -1), 0.0)
        return losses_GP.sum(dim=1) / active_GP.sum(dim=1).clamp(min=1)


def all_responses(batch: Responses) -> Selection:
    """Every valid response."""
    return Selection(batch=batch, mask_RK=batch.valid_GK)


def pair(batch: Responses, *, pair: str) -> Selection:
    """The best response and one strictly worse one, or every pair.

    `best_random` takes the opponent uniformly from all strictly worse responses, by `draw_G`: RPO (arXiv 2502.00203)
    Sec. 4. `best_worst` takes the first of those with the lowest reward. `all_pairs` makes a row of every pair with
    unequal rewards: the loss of a group is the mean over its pairs.
    """
    if pair == "all_pairs":
        return _all_pairs(batch)
    worse_GK = worse(batch)
    opponent_GK = _OPPONENTS[pair](batch, worse_GK)
    return Selection(batch=batch, mask_RK=(best(batch) & worse_GK.any(dim=1, keepdim=True)) | opponent_GK)


def weighted_sources(batch: Responses, *, source_weight: float, source_schedule: str) -> Selection:
    """WRPO (arXiv 2412.03187): rows of two, the better of which is a mixture,

        w r(y_ws) + (1 - w) r(y_wt)   against   r(y_l),        r = log-ratio,

    y_ws the best response of the source models (`source_GK`), y_wt the best and y_l the worst of the policy's own. A
    mixture of log-ratios is the log-ratio of mixed log-probabilities, so everything behind this sees an ordinary pair.
    w is source_weight, or with the `linear` schedule source_weight times the progress of the run. A group needs a
    source response and two responses of its own with unequal rewards; another one gives nothing to act on.
    """
    assert batch.source_GK is not None
    assert batch.reward_GK is not None
    assert batch.logp_GK is not None
    assert batch.ref_logp_GK is not None
    weight = source_weight * (batch.progress if source_schedule == "linear" else 1.0)
    own_GK = batch.valid_GK & ~batch.source_GK
    source_GK = _first_of_highest(batch.reward_GK, batch.valid_GK & batch.source_GK)
    chosen_GK = _first_of_highest(batch.reward_GK, own_GK)
    rejected_GK = _first_of_highest(-batch.reward_GK, own_GK)
    reward_best_G, reward_worst_G = _pick(batch.reward_GK, chosen_GK), _pick(batch.reward_GK, rejected_GK)
    usable_G = source_GK.any(dim=1) & own_GK.any(dim=1) & (reward_best_G > reward_worst_G)

    def mixed(values_GK: torch.Tensor) -> torch.Tensor:
        better_G = weight * _pick(values_GK, source_GK) + (1.0 - weight) * _pick(values_GK, chosen_GK)
        return torch.stack([better_G, _pick(values_GK, rejected_GK)], dim=1)

    valid_G2 = usable_G[:, None].expand(-1, 2)
    rows = Responses(
        logp_GK=mixed(batch.logp_GK),
        ref_logp_GK=mixed(batch.ref_logp_GK),
        reward_GK=torch.stack([torch.ones_like(reward_best_G), torch.zeros_like(reward_best_G)], dim=1),
        length_GK=torch.stack([_pick(batch.length_GK, chosen_GK), _pick(batch.length_GK, rejected_GK)], dim=1),
        valid_GK=valid_G2,
        draw_G=batch.draw_G,
        progress=batch.progress,
    )
    return Selection(batch=rows, mask_RK=valid_G2)


def best(batch: Responses) -> torch.Tensor:
    """The first response of highest reward in each group. Returns bool [G, K] with at most one True in a row."""
    assert batch.reward_GK is not None
    return _first_of_highest(batch.reward_GK, batch.valid_GK)


def worse(batch: Responses) -> torch.Tensor:
    """Responses whose reward is strictly below the group's highest. Returns bool [G, K]."""
    assert batch.reward_GK is not None
    highest_G1 = batch.reward_GK.masked_fill(~batch.valid_GK, -torch.inf).amax(dim=1, keepdim=True)
    return batch.valid_GK & (batch.reward_GK < highest_G1)


def _all_pairs(batch: Responses) -> Selection:
    """Rows of two, P = K (K - 1) / 2 for each group."""
    assert batch.reward_GK is not None
    num_groups, width = batch.valid_GK.shape
    i_P, j_P = torch.triu_indices(width, width, offset=1, device=batch.valid_GK.device)

    def rows(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else torch.stack([values[:, i_P], values[:, j_P]], dim=2).flatten(0, 1)

    differs_GP = batch.reward_GK[:, i_P] != batch.reward_GK[:, j_P]
    usable_GP = batch.valid_GK[:, i_P] & batch.valid_GK[:, j_P] & differs_GP
    valid_R2 = usable_GP.flatten()[:, None].expand(-1, 2)
    length_R2 = rows(batch.length_GK)
    assert length_R2 is not None
    pairs = dataclasses.replace(
        batch,
        logp_GK=rows(batch.logp_GK),
        value_GK=rows(batch.value_GK),
        ref_logp_GK=rows(batch.ref_logp_GK),
        token_kl_GK=rows(batch.token_kl_GK),
        reward_GK=rows(batch.reward_GK),
        rewards_GKM=rows(batch.rewards_GKM),
        source_GK=rows(batch.source_GK),
        length_GK=length_R2,
        valid_GK=valid_R2,
        draw_G=batch.draw_G[:, None].expand(num_groups, len(i_P)).flatten(),
    )
    return Selection(batch=pairs, mask_RK=valid_R2)


def _random(batch: Responses, candidates_GK: torch.Tensor) -> torch.Tensor:
    num_G = candidates_GK.sum(dim=1)
    pick_G = (batch.draw_G * num_G).long()  # draw < 1, so this is below num wherever there is a candidate
    rank_GK = candidates_GK.cumsum(dim=1) - 1
    return candidates_GK & (rank_GK == pick_G[:, None])


def _lowest(batch: Responses, candidates_GK: torch.Tensor) -> torch.Tensor:
    assert batch.reward_GK is not None
    return _first_of_highest(-batch.reward_GK, candidates_GK)


_OPPONENTS = {"best_random": _random, "best_worst": _lowest}


def _first_of_highest(values_GK: torch.Tensor, among_GK: torch.Tensor) -> torch.Tensor:
    index_G1 = values_GK.masked_fill(~among_GK, -torch.inf).argmax(dim=1, keepdim=True)  # the first, by definition
    chosen_GK = torch.zeros_like(among_GK).scatter(1, index_G1, True)
    return chosen_GK & among_GK


def _pick(values_GK: torch.Tensor, one_GK: torch.Tensor) -> torch.Tensor:
    """The value at the one True of each row, 0 where there is none."""
    return torch.where(one_GK, values_GK, 0).sum(dim=1)
