"""KL(pi_ref(.|s) || pi(.|s)) at every scored position, over the whole vocabulary, without ever holding the logits.

1. Both models' logits of a tile of rows x words (vocab.py) are made, reduced to five numbers per row, and dropped.
2. Tiles, then tensor ranks, are merged: with M, S the maximum and the sum of exponentials of a model's logits z, and
   d_v = (z_ref,v - M_ref) - (z_v - M),

       KL = sum_v p_ref,v d_v + log S - log S_ref.

   Subtracting the maxima first removes what the logits have in common, so that a small KL is no difference of large
   numbers; and equal models give exactly 0.
3. Backward makes each tile's logits again: the gradient with respect to the policy's logits is p - p_ref. The
   reference gets none.
"""

from typing import Any

import torch

from rpo_megatron.model.scores import ReferenceTokens
from rpo_megatron.model.vocab import LOWEST, Tiles, VocabShard, backpropagate, reduce_logits


def token_kl(hidden_NH: torch.Tensor, shard: VocabShard, reference: ReferenceTokens) -> torch.Tensor:
    """KL of the policy from the reference at each scored position, in nats, fp32 [N], the same on every tensor rank.

    `hidden_NH` comes from `scored_hidden`; it and the shard's weight get gradients. The two models must have the same
    vocabulary.
    """
    assert reference.shard.vocab_size == shard.vocab_size, (reference.shard.vocab_size, shard.vocab_size)
    assert reference.hidden_NH.shape[0] == hidden_NH.shape[0], "reference and policy saw different rows"
    kl_N: torch.Tensor = _TokenKL.apply(hidden_NH, shard.weight_VH, shard, reference)
    return kl_N


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, shard: VocabShard, reference: ReferenceTokens
    ) -> torch.Tensor:
        tiles = Tiles(shard, hidden_NH.shape[0], num_models=2)

        def statistics(policy_CW: torch.Tensor, rows: slice, words: slice) -> torch.Tensor:
            return _statistics(tiles.logits(reference.hidden_NH[rows], reference.shard, words, model=1), policy_CW)

        ref_max_N, max_N, ref_sum_N, sum_N, weighted_N = reduce_logits(
            hidden_NH, shard, tiles, statistics, merge=_merge, nothing=(LOWEST, LOWEST, 0.0, 0.0, 0.0)
        )
        ctx.shard, ctx.reference = shard, reference
        ctx.save_for_backward(hidden_NH, ref_max_N, ref_sum_N, max_N, sum_N)
        return weighted_N / ref_sum_N + (sum_N.log() - ref_sum_N.log())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, ref_max_N, ref_sum_N, max_N, sum_N = ctx.saved_tensors
        reference: ReferenceTokens = ctx.reference
        (grad_N,) = grads
        tiles = Tiles(ctx.shard, hidden_NH.shape[0], num_models=2)

        def gradient(policy_CW: torch.Tensor, rows: slice, words: slice) -> torch.Tensor:
            ref_CW = tiles.logits(reference.hidden_NH[rows], reference.shard, words, model=1)
            ref_CW.sub_(ref_max_N[rows, None]).exp_().div_(ref_sum_N[rows, None])
            policy_CW.sub_(max_N[rows, None]).exp_().div_(sum_N[rows, None])
            return policy_CW.sub_(ref_CW).mul_(grad_N[rows, None])

        return *backpropagate(hidden_NH, ctx.shard, tiles, gradient), None, None


def _statistics(ref_CW: torch.Tensor, policy_CW: torch.Tensor) -> torch.Tensor:
    """Of a tile, [5, C]: both maxima, both sums of exponentials, and sum_v exp(z_ref,v - max) d_v. The logits are
    overwritten."""
    ref_max_C, policy_max_C = ref_CW.amax(-1), policy_CW.amax(-1)
    ref_CW.sub_(ref_max_C[:, None])
    policy_CW.sub_(policy_max_C[:, None])
    weight_CW = ref_CW.exp()
    weighted_C = ref_CW.sub_(policy_CW).mul_(weight_CW).sum(-1)
    return torch.stack((ref_max_C, policy_max_C, weight_CW.sum(-1), policy_CW.exp_().sum(-1), weighted_C))


def _merge(parts_P5N: torch.Tensor) -> torch.Tensor:
    max_P2N, sum_P2N, weighted_PN = parts_P5N[:, :2], parts_P5N[:, 2:4], parts_P5N[:, 4]
    max_2N = max_P2N.amax(0)
    scale_P2N = (max_P2N - max_2N).exp()
    # d_v is measured from the part's maxima; this moves it to the maxima of all parts. A part without words has none.
    has_words_PN = max_P2N[:, 0] > LOWEST
    shift_PN = (max_P2N[:, 0] - max_P2N[:, 1]) - (max_2N[0] - max_2N[1])
    weighted_N = torch.where(has_words_PN, scale_P2N[:, 0] * (weighted_PN + sum_P2N[:, 0] * shift_PN), 0.0).sum(0)
    return torch.cat((max_2N, (scale_P2N * sum_P2N).sum(0), weighted_N[None]))
