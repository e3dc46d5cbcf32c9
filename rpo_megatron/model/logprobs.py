"""From hidden states to log-probabilities: per scored token on vocabulary shards, then summed per response.

    hidden [T(/tp under SP), 1, H] -> rows that predict a response token [N, H] -> log-probs [N] -> sums [G, K]

Only the scored rows reach the output layer; a prompt's vocabulary projection is never computed. The output layer's
weight is split over the tensor ranks along the vocabulary, and so are the logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)

from rpo_megatron.distributed import Axis


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


def vocab_logits(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *, vocab_size: int, tp_rank: int) -> torch.Tensor:
    """Logits of this rank's vocabulary shard, fp32 [N, V]. Columns at or past `vocab_size` (padding) hold the lowest
    finite number: their probability is 0 on every path, without the NaNs that infinities give."""
    logits_NV = F.linear(hidden_NH, weight_VH).float()
    real = max(0, vocab_size - tp_rank * weight_VH.shape[0])
    if real < weight_VH.shape[0]:
        logits_NV[:, real:] = torch.finfo(torch.float32).min
    return logits_NV


def token_logprobs(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, label_N: torch.Tensor, *, vocab_size: int, tp_rank: int
) -> torch.Tensor:
    """Log-probability of each label, fp32 [N], the same on every tensor rank.

    `hidden_NH` comes from `scored_hidden`, `weight_VH` is this rank's vocabulary shard. The plain path: the N x V
    logits are materialised in fp32.
    """
    return -vocab_parallel_cross_entropy(
        vocab_logits(hidden_NH, weight_VH, vocab_size=vocab_size, tp_rank=tp_rank), label_N
    )


def response_logps(logp_N: torch.Tensor, length_GK: torch.Tensor) -> torch.Tensor:
    """Sum token log-probabilities per response: [N] -> fp64 [G, K].

    The scored tokens of a response are consecutive and in (group, response) order, so this is a segmented sum. It is
    done in fp64: a serial fp32 sum of a long response costs more accuracy than the whole forward pass.
    """
    sums: Any = torch.segment_reduce(logp_N.double(), "sum", lengths=length_GK.flatten(), unsafe=True, initial=0.0)
    return sums.view(length_GK.shape)
