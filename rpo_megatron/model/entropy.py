"""Entropy of the policy's next-token distribution at every scored position, without ever holding the logits.

Of each tile (vocab.py) a row keeps the largest logit M, the sum S of exponentials and W = sum_v exp(z_v - M) (z_v - M);
tiles, then tensor ranks, are merged. Then H = log S - W / S. No gradient: it is looked at, not trained on.
"""

import torch

from rpo_megatron.model.vocab import LOWEST, Tiles, VocabShard, reduce_logits


@torch.no_grad()
def token_entropy(hidden_NH: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """In nats, fp32 [N], the same on every tensor rank. `hidden_NH` comes from `scored_hidden`."""

    def statistics(logits_CW: torch.Tensor, rows: slice, words: slice) -> torch.Tensor:
        max_C = logits_CW.amax(-1)
        below_CW = logits_CW.sub_(max_C[:, None])
        weight_CW = below_CW.exp()
        sum_C = weight_CW.sum(-1)
        return torch.stack((max_C, sum_C, weight_CW.mul_(below_CW).sum(-1)))

    tiles = Tiles(shard, hidden_NH.shape[0])
    _, sum_N, weighted_N = reduce_logits(hidden_NH, shard, tiles, statistics, merge=_merge, nothing=(LOWEST, 0.0, 0.0))
    return sum_N.log() - weighted_N / sum_N


def _merge(parts_P3N: torch.Tensor) -> torch.Tensor:
    max_PN, sum_PN, weighted_PN = parts_P3N.unbind(1)
    max_N = max_PN.amax(0)
    scale_PN = (max_PN - max_N).exp()
    # W is measured from the part's maximum; this moves it to that of all parts. A part without words has none.
    moved_PN = torch.where(scale_PN > 0, scale_PN * (weighted_PN + sum_PN * (max_PN - max_N)), 0.0)
    return torch.stack((max_N, (scale_PN * sum_PN).sum(0), moved_PN.sum(0)))
