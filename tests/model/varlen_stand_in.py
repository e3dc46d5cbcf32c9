"""Variable-length flash-attention in plain torch, with the arguments of aten._flash_attention_forward and _backward:
what a GPU's kernel computes from them, segment by segment, and what it demands of them."""

from collections.abc import Iterator
from typing import Any

import torch


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """(result [N, h, d], log-sum-exp [h, N], state, state, debug). `window`, of Transformer Engine, counts backwards
    from the token itself."""
    assert dropout_p == 0.0
    assert not return_debug_mask
    check(query, key, cum_seq_q, max_q)
    check(key, query, cum_seq_k, max_k)
    out, lse = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for q, k in segments(cum_seq_q, cum_seq_k):
        scores = scores_of(query[q], key[k], scale, causal=is_causal, window=window)
        lse[:, q] = scores.logsumexp(-1)
        weights = (scores - lse[:, q, None]).exp()
        out[q] = torch.einsum("hts,shd->thd", weights, repeated(value[k], query).float()).to(query.dtype)
    return out, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *state: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the kernels: probabilities from the log-sum-exp that is given, row sums from the result that is given."""
    assert dropout_p == 0.0
    assert len(state) == 2
    assert grad_out.is_contiguous()
    assert logsumexp.is_contiguous()
    check(query, key, cum_seq_q, max_q)
    check(key, query, cum_seq_k, max_k)
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for q, k in segments(cum_seq_q, cum_seq_k):
        scores = scores_of(query[q], key[k], scale, causal=is_causal)
        weights = (scores - logsumexp[:, q, None]).exp()
        by_weight = torch.einsum("thd,shd->hts", grad_out[q].float(), repeated(value[k], query).float())
        row_sum = (grad_out[q].float() * out[q].float()).sum(-1).T[..., None]
        by_score = weights * (by_weight - row_sum) * scale
        grads[0][q] = torch.einsum("hts,shd->thd", by_score, repeated(key[k], query).float()).to(query.dtype)
        grads[1][k] = summed(torch.einsum("hts,thd->shd", by_score, query[q].float()), key)
        grads[2][k] = summed(torch.einsum("hts,thd->shd", weights, grad_out[q].float()), key)
    return grads[0], grads[1], grads[2]


def check(tensor: torch.Tensor, other: torch.Tensor, starts: torch.Tensor, longest: int) -> None:
    assert starts.dtype == torch.int32
    assert type(longest) is int
    assert int(starts.diff().max()) <= longest
    assert int(starts[-1]) == len(tensor), "every token is in a segment"
    assert tensor.stride(-1) == 1
    assert tensor.dim() == other.dim() == 3


def segments(starts_q: torch.Tensor, starts_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    borders: list[Any] = [torch.stack([starts[:-1], starts[1:]]).T.tolist() for starts in (starts_q, starts_k)]
    for q, k in zip(*borders, strict=True):
        yield slice(*q), slice(*k)


def scores_of(
    query: torch.Tensor, key: torch.Tensor, scale: float, *, causal: bool, window: int | None = None
) -> torch.Tensor:
    scores = torch.einsum("thd,shd->hts", query.float(), repeated(key, query).float()) * scale
    distance = torch.arange(len(query))[:, None] - torch.arange(len(key)) + len(key) - len(query)
    hidden = (distance < 0) & causal
    if window is not None:
        hidden |= distance > window
    return scores.masked_fill(hidden, float("-inf"))


def repeated(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


def summed(grad: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return grad.unflatten(1, (key.shape[1], -1)).sum(2).to(key.dtype)
