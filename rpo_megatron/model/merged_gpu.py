"""The two merged passes of merged.py on a GPU: each of them one call of torch's variable-length flash-attention for the
whole row. NOT YET RUN on one; tests/model/test_merged_gpu.py runs it with a stand-in for the two operators.

1. `own`: all segments, causally; heads of keys and values stay as they are (grouped-query attention is the kernel's).
2. `shared`: the responses' tokens, gathered, attend to their prompts' keys, gathered once per prompt.
3. The results and log-sum-exps of 2 are merged into those of 1 at the responses' positions.
4. Backward gives each pass the merged result and log-sum-exp, and adds up what the two say of a token.

The operators are what torch.nn.attention.varlen calls (torch 2.10 and later); called directly because its own backward
knows nothing of a merged log-sum-exp. Shapes: T tokens, h query heads, g heads of keys and values, d numbers per head;
N and M of borders.py.
"""

from dataclasses import dataclass
from typing import Any

import torch

from rpo_megatron.model.borders import Borders, SharedBorders
from rpo_megatron.model.merged import merge_
from rpo_megatron.model.row import Segments
from rpo_megatron.model.sinks import sink_gradient, take_sink_

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Which queries attend to which keys, segment by segment."""

    queries: Borders
    keys: Borders
    causal: bool

    def __call__(
        self, query_Nhd: torch.Tensor, key_Mgd: torch.Tensor, value_Mgd: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """(result [N, h, d], log-sum-exp fp32 [h, N], the generator's state for backward)."""
        given = query_Nhd, key_Mgd, value_Mgd, *self._sizes(), 0.0, self.causal, False
        out_Nhd, lse_hN, seed, offset, _ = _forward(*given, scale=scale)
        return out_Nhd, lse_hN, (seed, offset)

    def backward(
        self,
        grad_Nhd: torch.Tensor,
        query_Nhd: torch.Tensor,
        key_Mgd: torch.Tensor,
        value_Mgd: torch.Tensor,
        out_Nhd: torch.Tensor,
        lse_hN: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor],
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value."""
        given = grad_Nhd, query_Nhd, key_Mgd, value_Mgd, out_Nhd, lse_hN
        by_query, by_key, by_value = _backward(*given, *self._sizes(), 0.0, self.causal, *state, scale=scale)
        return by_query, by_key, by_value

    def _sizes(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return self.queries.start_S1, self.keys.start_S1, self.queries.longest, self.keys.longest


def merged_attention(
    query_T1hd: torch.Tensor,
    key_T1gd: torch.Tensor,
    value_T1gd: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    sink_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, 1, h, d]. bf16 on a GPU."""
    # The value is a slice of what one linear layer made of queries, keys and values; kept as such it would keep it all.
    value_Tgd = value_T1gd[:, 0].contiguous()
    sink_h1 = None if sink_h is None else sink_h[:, None]
    out: torch.Tensor = _Merged.apply(query_T1hd[:, 0], key_T1gd[:, 0], value_Tgd, sink_h1, segments, scale)
    return out[:, None]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_Thd: torch.Tensor,
        key_Tgd: torch.Tensor,
        value_Tgd: torch.Tensor,
        sink_h1: torch.Tensor | None,
        segments: Segments,
        scale: float,
    ) -> torch.Tensor:
        own, shared = _passes(segments, query_Thd.device)
        out_Thd, lse_hT, state = own(query_Thd, key_Tgd, value_Tgd, scale)
        states = [state]
        if shared is not None:
            borders, attend = shared
            n, m = borders.query_N, borders.key_M
            out_Nhd, lse_hN, state = attend(query_Thd[n], key_Tgd[m], value_Tgd[m], scale)
            states.append(state)
            merged_Nhd, merged_lse_hN = out_Thd[n], lse_hT[:, n]
            merge_(merged_Nhd.transpose(0, 1), merged_lse_hN, out_Nhd.transpose(0, 1), lse_hN)
            out_Thd.index_copy_(0, n, merged_Nhd)
            lse_hT.index_copy_(1, n, merged_lse_hN)
        if sink_h1 is not None:
            take_sink_(out_Thd.transpose(0, 1), lse_hT, sink_h1)
        ctx.save_for_backward(query_Thd, key_Tgd, value_Tgd, sink_h1, out_Thd, lse_hT)
        ctx.segments, ctx.scale, ctx.states = segments, scale, states
        return out_Thd

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_Thd, key_Tgd, value_Tgd, sink_h1, out_Thd, lse_hT = ctx.saved_tensors
        grad_Thd = grads[0].contiguous()
        own, shared = _passes(ctx.segments, query_Thd.device)
        saved = query_Thd, key_Tgd, value_Tgd, out_Thd, lse_hT
        by_query, by_key, by_value = own.backward(grad_Thd, *saved, ctx.states[0], ctx.scale)
        if shared is not None:
            borders, attend = shared
            n, m = borders.query_N, borders.key_M
            given = grad_Thd[n], query_Thd[n], key_Tgd[m], value_Tgd[m], out_Thd[n], lse_hT[:, n]
            more_query, more_key, more_value = attend.backward(*given, ctx.states[1], ctx.scale)
            by_query.index_add_(0, n, more_query)
            by_key.index_add_(0, m, more_key)
            by_value.index_add_(0, m, more_value)
        by_sink = None
        if sink_h1 is not None:
            by_sink_hT = sink_gradient(out_Thd.transpose(0, 1), grad_Thd.transpose(0, 1), lse_hT, sink_h1)
            by_sink = by_sink_hT.sum(-1, keepdim=True).to(sink_h1.dtype)
        return by_query, by_key, by_value, by_sink, None, None


def _passes(segments: Segments, device: torch.device) -> tuple[Pass, tuple[SharedBorders, Pass] | None]:
    borders, shared = segments.borders(device), segments.shared_borders(device)
    own = Pass(queries=borders, keys=borders, causal=True)
    if shared is None:
        return own, None
    return own, (shared, Pass(queries=shared.queries, keys=shared.keys, causal=False))
