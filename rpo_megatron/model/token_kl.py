"""KL(pi_ref(.|s) || pi(.|s)) at every scored position, over the whole vocabulary, without ever holding the logits.

1. Rows go through in chunks: both models' logits of this rank's vocabulary shard, [C, V], are made, reduced to five
   numbers per row, and dropped.
2. Two small all-reduces over the tensor ranks merge those numbers: with M, S the maximum and the sum of exponentials
   of a model's logits z, and d_v = (z_ref,v - M_ref) - (z_v - M),

       KL = sum_v p_ref,v d_v + log S - log S_ref.

   Subtracting the maxima first removes what the logits have in common, so that a small KL is no difference of large
   numbers; and equal models give exactly 0.
3. Backward makes each chunk's logits again: the gradient with respect to the policy's logits is p - p_ref. The
   reference gets none.
"""

from typing import Any

import torch
import torch.distributed as dist

from rpo_megatron.distributed import Axis
from rpo_megatron.model.scores import ReferenceTokens
from rpo_megatron.model.vocab import add_weight_gradient, row_chunks, vocab_logits


def token_kl(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, reference: ReferenceTokens, *, vocab_size: int, tp: Axis
) -> torch.Tensor:
    """KL of the policy from the reference at each scored position, in nats, fp32 [N], the same on every tensor rank.

    `hidden_NH` comes from `scored_hidden`, `weight_VH` is this rank's vocabulary shard; both get gradients. The two
    models must have the same vocabulary.
    """
    assert reference.vocab_size == vocab_size, (reference.vocab_size, vocab_size)
    assert reference.hidden_NH.shape[0] == hidden_NH.shape[0], "reference and policy saw different rows"
    kl_N: torch.Tensor = _TokenKL.apply(
        hidden_NH, weight_VH, reference.hidden_NH.detach(), reference.weight_VH.detach(), vocab_size, tp
    )
    return kl_N


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        ref_hidden_NJ: torch.Tensor,
        ref_weight_VJ: torch.Tensor,
        vocab_size: int,
        tp: Axis,
    ) -> torch.Tensor:
        ctx.options = {"vocab_size": vocab_size, "tp_rank": tp.rank}
        local_5N = torch.empty(5, hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)
        for rows in row_chunks(hidden_NH.shape[0], weight_VH, num_models=2):
            local_5N[:, rows] = _statistics(
                vocab_logits(ref_hidden_NJ[rows], ref_weight_VJ, **ctx.options),
                vocab_logits(hidden_NH[rows], weight_VH, **ctx.options),
            )
        kl_N, log_sum_2N = _merge(local_5N, tp.group)
        ctx.save_for_backward(hidden_NH, weight_VH, ref_hidden_NJ, ref_weight_VJ, log_sum_2N)
        return kl_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, ref_hidden_NJ, ref_weight_VJ, log_sum_2N = ctx.saved_tensors
        (grad_N,) = grads
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        for rows in row_chunks(hidden_NH.shape[0], weight_VH, num_models=2):
            ref_CV = vocab_logits(ref_hidden_NJ[rows], ref_weight_VJ, **ctx.options)
            policy_CV = vocab_logits(hidden_NH[rows], weight_VH, **ctx.options)
            ref_CV = ref_CV.sub_(log_sum_2N[0, rows, None]).exp_()
            policy_CV = policy_CV.sub_(log_sum_2N[1, rows, None]).exp_()
            grad_CV = policy_CV.sub_(ref_CV).mul_(grad_N[rows, None]).to(weight_VH.dtype)
            grad_hidden_NH[rows] = grad_CV @ weight_VH
            add_weight_gradient(grad_weight_VH, grad_CV, hidden_NH[rows])
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None


def _statistics(ref_CV: torch.Tensor, policy_CV: torch.Tensor) -> torch.Tensor:
    """Of this rank's shard, [5, C]: both maxima, both sums of exponentials, and sum_v exp(z_ref,v - max) d_v. The
    logits are overwritten."""
    ref_max_C, policy_max_C = ref_CV.amax(-1), policy_CV.amax(-1)
    ref_CV.sub_(ref_max_C[:, None])
    policy_CV.sub_(policy_max_C[:, None])
    weight_CV = ref_CV.exp()
    weighted_C = ref_CV.sub_(policy_CV).mul_(weight_CV).sum(-1)
    return torch.stack((ref_max_C, policy_max_C, weight_CV.sum(-1), policy_CV.exp_().sum(-1), weighted_C))


def _merge(local_5N: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL [N], log-sum-exp of the reference's and the policy's logits [2, N]) from all shards' statistics."""
    max_2N = local_5N[:2].clone()
    dist.all_reduce(max_2N, op=dist.ReduceOp.MAX, group=group)
    ref_sum_N, policy_sum_N, weighted_N = local_5N[2:]
    ref_scale_N, policy_scale_N = (local_5N[:2] - max_2N).exp()
    # d_v is measured from the shard's maxima; this moves it to the maxima of the whole vocabulary.
    shift_N = (local_5N[0] - local_5N[1]) - (max_2N[0] - max_2N[1])
    sums_3N = torch.stack(
        (ref_scale_N * ref_sum_N, policy_scale_N * policy_sum_N, ref_scale_N * (weighted_N + ref_sum_N * shift_N))
    )
    dist.all_reduce(sums_3N, group=group)
    log_2N = sums_3N[:2].log()
    return sums_3N[2] / sums_3N[0] + (log_2N[1] - log_2N[0]), max_2N + log_2N
