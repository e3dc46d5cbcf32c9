"""Attention over a row with shared prompts as two flash-attention passes, merged by their log-sum-exp.

1. `own`: every segment attends causally to itself.
2. `shared`: every response attends to all of its prompt. Nothing is masked, and the responses of a group, which follow
   one another, are one block of queries.
3. With out_i and lse_i the result and the log-sum-exp of pass i, softmax over both sets of keys is

       out = sum_i exp(lse_i - lse) out_i,    lse = log sum_i exp(lse_i).

4. Backward gives `out` and `lse` of the merged softmax to each pass's own backward: its probabilities exp(score - lse)
   and its row sums out . grad are then those of the whole (as in ring attention, arXiv 2310.01889).
5. A sink (sinks.py) is merged as one more pass, whose result is 0.

Neither keys nor values are copied per response, and no mask exists. Shapes: T tokens, h query heads in g groups of r
that share one head of keys and values, d numbers per head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rpo_megatron.model.borders import ranges_of, shared_ranges
from rpo_megatron.model.row import Segments
from rpo_megatron.model.sinks import sink_gradient, take_sink_

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What scaled_dot_product_attention runs on a CPU. Called directly because it is the only way to the log-sum-exp."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A range of queries that attends to a range of keys."""

    queries: slice
    keys: slice
    causal: bool


def merged_attention(
    query_T1hd: torch.Tensor,
    key_T1gd: torch.Tensor,
    value_T1gd: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    sink_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, 1, h, d]. On CPU."""
    num_groups = key_T1gd.shape[2]
    # [g, r, T, d] and, one head for all r, [g, 1, T, d]: views, in the form that the kernels read
    query = query_T1hd[:, 0].unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
    # The value is a slice of what one linear layer made of queries, keys and values; kept as such it would keep it all.
    key, value = (tensor.permute(2, 1, 0, 3) for tensor in (key_T1gd, value_T1gd.contiguous()))
    sink = None if sink_h is None else sink_h.view(num_groups, -1, 1)
    out: torch.Tensor = _Merged.apply(query, key, value, sink, segments, scale)
    return out.permute(2, 0, 1, 3).reshape(query_T1hd.shape)


def own_blocks(segments: Segments) -> Iterator[Block]:
    for segment in ranges_of(segments.lengths):
        yield Block(queries=segment, keys=segment, causal=True)


def shared_blocks(segments: Segments) -> Iterator[Block]:
    for queries, keys in shared_ranges(segments.lengths, segments.prompts):
        yield Block(queries=queries, keys=keys, causal=False)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sink: torch.Tensor | None,
        segments: Segments,
        scale: float,
    ) -> torch.Tensor:
        keys, values = (tensor.expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        for block in own_blocks(segments):
            at = block.queries
            out[:, :, at], lse[:, :, at] = _attend(query, keys, values, block, scale)
        for block in shared_blocks(segments):
            at = block.queries
            merge_(out[:, :, at], lse[:, :, at], *_attend(query, keys, values, block, scale))
        if sink is not None:
            take_sink_(out, lse, sink)
        ctx.save_for_backward(query, key, value, sink, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sink, out, lse = ctx.saved_tensors
        keys, values = (tensor.expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
        grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))

        def parts(block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            q, k = block.queries, block.keys
            given = [grads[0][:, :, q], query[:, :, q], keys[:, :, k], values[:, :, k], out[:, :, q], lse[:, :, q]]
            by_query, by_key, by_value = _backward(*given, 0.0, block.causal, scale=ctx.scale)
            return by_query, by_key.sum(1, keepdim=True), by_value.sum(1, keepdim=True)

        for block in own_blocks(ctx.segments):
            at = block.queries
            grad_query[:, :, at], grad_key[:, :, at], grad_value[:, :, at] = parts(block)
        for block in shared_blocks(ctx.segments):
            by_query, by_key, by_value = parts(block)
            grad_query[:, :, block.queries] += by_query
            grad_key[:, :, block.keys] += by_key
            grad_value[:, :, block.keys] += by_value
        by_sink = None if sink is None else sink_gradient(out, grads[0], lse, sink).sum(-1, keepdim=True).to(sink.dtype)
        return grad_query, grad_key, grad_value, by_sink, None, None


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: Block, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, log-sum-exp) of a block's queries."""
    q, k = block.queries, block.keys
    out, lse = _forward(query[:, :, q], keys[:, :, k], values[:, :, k], 0.0, block.causal, scale=scale)
    return out, lse


def merge_(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Take the result [..., T, d] and log-sum-exp [..., T] of other keys into `out` and `lse`."""
    weight = (other_lse - lse).sigmoid()  # exp(other_lse) of exp(lse) + exp(other_lse)
    out.copy_(torch.lerp(out.float(), other_out.float(), weight[..., None]))
    lse.copy_(torch.logaddexp(lse, other_lse))
