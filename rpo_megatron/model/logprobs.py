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


def token_logprobs(
    hidden_T1H: torch.Tensor,
    weight_VH: torch.Tensor,
    position_N: torch.Tensor,
    label_N: torch.Tensor,
    *,
    vocab_size: int,
    tp_rank: int,
    sequence_parallel: bool,
) -> torch.Tensor:
    """Log-probability of each scored token, fp32 [N], the same on every tensor rank.

    `weight_VH` is this rank's vocabulary shard; rows at or past `vocab_size` (padding) take no part. The plain path:
    the N x V/tp logits are materialised in fp32.
    """
    if sequence_parallel:
        # all-gather over TP forward; reduce-scatter backward, because each rank's shard gives a part of the gradient
        hidden_NH = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=True)[position_N, 0]
    else:
        # identity forward; all-reduce over TP backward, for the same reason
        hidden_NH = copy_to_tensor_model_parallel_region(hidden_T1H[position_N, 0])
    logits_NV = F.linear(hidden_NH, weight_VH).float()
    first = tp_rank * weight_VH.shape[0]
    real = max(0, min(weight_VH.shape[0], vocab_size - first))
    if real < weight_VH.shape[0]:
        logits_NV = F.pad(logits_NV[:, :real], (0, weight_VH.shape[0] - real), value=float("-inf"))
    return -vocab_parallel_cross_entropy(logits_NV, label_N)


def response_logps(logp_N: torch.Tensor, length_GK: torch.Tensor) -> torch.Tensor:
    """Sum token log-probabilities per response: [N] -> fp64 [G, K].

    The scored tokens of a response are consecutive and in (group, response) order, so this is a segmented sum. It is
    done in fp64: a serial fp32 sum of a long response costs more accuracy than the whole forward pass.
    """
    sums: Any = torch.segment_reduce(logp_N.double(), "sum", lengths=length_GK.flatten(), unsafe=True, initial=0.0)
    return sums.view(length_GK.shape)
