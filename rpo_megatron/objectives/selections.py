"""Which of a group's responses a method acts on: a part of `valid_GK`. A pair method for K > 2 is a K-way method that
sees two responses, so distances and anchors need to know nothing about pairs.

The best response is the first of those with the highest reward. Responses that tie with it are not its opponents: no
preference exists between them. A group without a strictly worse response gives a pair method nothing to act on.
"""

import torch

from rpo_megatron.objectives.responses import Responses


def all_responses(batch: Responses) -> torch.Tensor:
    """Every valid response. Returns bool [G, K]."""
    return batch.valid_GK


def pair(batch: Responses, *, pair: str) -> torch.Tensor:
    """The best response and one strictly worse one; nothing where all rewards are equal. Returns bool [G, K].

    `best_random` takes the opponent uniformly from all strictly worse responses, by `draw_G`: RPO (arXiv 2502.00203)
    Sec. 4. `best_worst` takes the first of those with the lowest reward.
    """
    worse_GK = worse(batch)
    opponent_GK = _OPPONENTS[pair](batch, worse_GK)
    return (best(batch) & worse_GK.any(dim=1, keepdim=True)) | opponent_GK


def best_or_all(batch: Responses, *, responses: str) -> torch.Tensor:
    """`best`: the best response of each group; `all`: every valid one. Returns bool [G, K]."""
    return best(batch) if responses == "best" else batch.valid_GK


def best(batch: Responses) -> torch.Tensor:
    """The first response of highest reward in each group. Returns bool [G, K] with at most one True in a row."""
    assert batch.reward_GK is not None
    return _first_of_highest(batch.reward_GK, batch.valid_GK)


def worse(batch: Responses) -> torch.Tensor:
    """Responses whose reward is strictly below the group's highest. Returns bool [G, K]."""
    assert batch.reward_GK is not None
    highest_G1 = batch.reward_GK.masked_fill(~batch.valid_GK, -torch.inf).amax(dim=1, keepdim=True)
    return batch.valid_GK & (batch.reward_GK < highest_G1)


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
