"""From hidden states to log-probabilities: per scored token on vocabulary shards, then summed per response.

    hidden [T(/tp under SP), 1, H] -> rows that predict a response token [N, H] -> log-probs [N] -> sums [G, K]

Only the scored rows reach the output layer; a prompt's vocabulary projection is never computed. The output layer's
weight is split over the tensor ranks along the vocabulary, and so are the logits.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)

from rpo_megatron.distributed import Axis
from rpo_megatron.model.vocab import add_weight_gradient, row_chunks, vocab_logits


def scored_hidden(
    hidden_T1H: torch.Tensor, position_N: torch.Tensor, *, tp: Axis, sequence_parallel: bool
) -> torch.Tensor:
    """Hidden states at the scored positions, [N, H], whole on every tensor rank, for layers whose weight is split over
    the tensor ranks: backward adds up the parts of the gradient that come from the shards."""
    if sequence_parallel:
        # all-gather over TP forward; reduce-scatter backward, because each rank's shard gives a part of the gradient
        whole_T1H = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=True, group=tp.group)
        return whole_T1H[position_N, 0]
    # identity forward; all-reduce over TP backward, for the same reason
    return copy_to_tensor_model_parallel_region(hidden_T1H[position_N, 0], group=tp.group)


def token_logprobs(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, label_N: torch.Tensor, *, vocab_size: int, tp: Axis
) -> torch.Tensor:
    """Log-probability of each label, fp32 [N], the same on every tensor rank; the N x V logits are never materialised.

    `hidden_NH` comes from `scored_hidden`, `weight_VH` is this rank's vocabulary shard; both get gradients.

    1. Of each row, this rank keeps the largest logit of its shard, the sum of exponentials and the label's logit, if
       the label is its own.
    2. Two small all-reduces over the tensor ranks merge them.
    3. Backward makes each chunk's logits again: their gradient is onehot(label) - p. That of the weight is added up in
       fp32.
    """
    logp_N: torch.Tensor = _TokenLogProbs.apply(hidden_NH, weight_VH, label_N, vocab_size, tp)
    return logp_N


def plain_logprobs(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, label_N: torch.Tensor, *, vocab_size: int, tp: Axis
) -> torch.Tensor:
    """The same with all logits materialised, by megatron's own cross-entropy: the oracle of the tests."""
    logits_NV = vocab_logits(hidden_NH, weight_VH, vocab_size=vocab_size, tp_rank=tp.rank)
    return -vocab_parallel_cross_entropy(logits_NV, label_N)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        label_N: torch.Tensor,
        vocab_size: int,
        tp: Axis,
    ) -> torch.Tensor:
        ctx.options = {"vocab_size": vocab_size, "tp_rank": tp.rank}
        column_N, mine_N = _own_labels(label_N, weight_VH, tp)
        max_N, sum_N, label_logit_N = torch.empty(3, len(label_N), dtype=torch.float32, device=hidden_NH.device)
        for rows in row_chunks(len(label_N), weight_VH):
            logits_CV = vocab_logits(hidden_NH[rows], weight_VH, **ctx.options)
            max_N[rows] = logits_CV.amax(-1)
            label_logit_N[rows] = logits_CV.gather(1, column_N[rows, None])[:, 0]
            sum_N[rows] = logits_CV.sub_(max_N[rows, None]).exp_().sum(-1)
        whole_max_N = max_N.clone()
        dist.all_reduce(whole_max_N, op=dist.ReduceOp.MAX, group=tp.group)
        parts_2N = torch.stack(
            ((max_N - whole_max_N).exp() * sum_N, torch.where(mine_N, label_logit_N - whole_max_N, 0.0))
        )
        dist.all_reduce(parts_2N, group=tp.group)
        whole_sum_N, label_N = parts_2N
        # Not as one log-sum-exp: its rounding would be that of every probability.
        ctx.save_for_backward(hidden_NH, weight_VH, column_N, mine_N, whole_max_N, whole_sum_N)
        return label_N - whole_sum_N.log()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, column_N, mine_N, max_N, sum_N = ctx.saved_tensors
        (grad_N,) = grads
        scale_N = -grad_N / sum_N
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        for rows in row_chunks(len(grad_N), weight_VH):
            logits_CV = vocab_logits(hidden_NH[rows], weight_VH, **ctx.options)
            grad_CV = logits_CV.sub_(max_N[rows, None]).exp_().mul_(scale_N[rows, None])
            grad_CV.scatter_add_(1, column_N[rows, None], torch.where(mine_N[rows], grad_N[rows], 0.0)[:, None])
            grad_CV = grad_CV.to(weight_VH.dtype)
            grad_hidden_NH[rows] = grad_CV @ weight_VH
            add_weight_gradient(grad_weight_VH, grad_CV, hidden_NH[rows])
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None


def _own_labels(label_N: torch.Tensor, weight_VH: torch.Tensor, tp: Axis) -> tuple[torch.Tensor, torch.Tensor]:
    """(column of each label in this rank's shard, whether the label is in it); the column is 0 where it is not."""
    column_N = label_N - tp.rank * weight_VH.shape[0]
    mine_N = (column_N >= 0) & (column_N < weight_VH.shape[0])
    return torch.where(mine_N, column_N, 0), mine_N


def response_logps(logp_N: torch.Tensor, length_GK: torch.Tensor) -> torch.Tensor:
    """Sum token log-probabilities per response: [N] -> fp64 [G, K].

    The scored tokens of a response are consecutive and in (group, response) order, so this is a segmented sum. It is
    done in fp64: a serial fp32 sum of a long response costs more accuracy than the whole forward pass.
    """
    sums: Any = torch.segment_reduce(logp_N.double(), "sum", lengths=length_GK.flatten(), unsafe=True, initial=0.0)
    return sums.view(length_GK.shape)
