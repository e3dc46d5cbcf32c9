"""The output layer in chunks of rows: what log-probabilities and the token KL share.

The logits of all rows, [N, V], are the largest tensor of a step by far (N = 4,096 and V = 128k: 2.1 GB in fp32, and as
much again for their gradient). Here only those of a chunk exist at a time; forward reduces them to a few numbers per
row, backward makes them again. Shapes: N rows, C rows of a chunk, V this rank's rows of the padded vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

CHUNK_BYTES = 32 * 2**20
"""Memory of one chunk's fp32 logits; temporaries take about as much again."""


def vocab_logits(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *, vocab_size: int, tp_rank: int) -> torch.Tensor:
    """Logits of this rank's vocabulary shard, fp32 [N, V]. Columns at or past `vocab_size` (padding) hold the lowest
    finite number: their probability is 0 on every path, without the NaNs that infinities give."""
    logits_NV = F.linear(hidden_NH, weight_VH).float()
    real = max(0, vocab_size - tp_rank * weight_VH.shape[0])
    if real < weight_VH.shape[0]:
        logits_NV[:, real:] = torch.finfo(torch.float32).min
    return logits_NV


def row_chunks(num_rows: int, weight_VH: torch.Tensor, *, num_models: int = 1) -> Iterator[slice]:
    """Slices that cover the rows, each with as many as `num_models` logits of a chunk may take."""
    size = max(1, CHUNK_BYTES // (4 * num_models * weight_VH.shape[0]))
    return (slice(start, start + size) for start in range(0, num_rows, size))


def add_weight_gradient(total_VH: torch.Tensor, grad_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """total += grad^T hidden, in the total's fp32 whatever the precision of the factors."""
    if grad_CV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_CV.T, hidden_CH)  # in place: no second tensor of the weight's size
    else:
        total_VH += grad_CV.T @ hidden_CH
