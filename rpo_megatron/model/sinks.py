"""Attention sinks (GPT-OSS): in every softmax of a head one more term exp(sink), learned, whose value is 0.

With out and lse the result and the log-sum-exp over the keys alone, lse' = log(exp(lse) + exp(sink)) over all:

    result = out * exp(lse - lse') = out * sigmoid(lse - sink),    d loss / d sink = -sum exp(sink - lse') result . grad

the sum over a head's tokens. Each implementation of attention takes the form that costs it least: those that hold the
log-sum-exp themselves merge the sink as they merge their passes (merged.py, merged_gpu.py), FlexAttention gives it back
with its gradient (flex.py), and torch's scaled_dot_product_attention, which does not give it, sees one key more
(`attend_with_sink_key`). Megatron has the same parameter in an attention that we cannot use (DotProductAttention's
softmax_offset, of softmax_type="learnable").
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from rpo_megatron.model.shape import ModelShape

ALIGN = 8
"""Heads are widened by so many numbers for the key of the sink: torch's fused kernels want multiples of it."""


def sink_parameter(config: Any, shape: ModelShape) -> torch.nn.Parameter:
    """[heads of this tensor rank]"""
    heads = shape.num_heads // config.tensor_model_parallel_size
    sinks = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=torch.cuda.current_device()))
    set_tensor_model_parallel_attributes(sinks, True, 0, 1)
    return sinks


def shard_sinks(sinks: torch.Tensor, prefix: str, sharded_offsets: Any) -> dict[str, Any]:
    """For a checkpoint: split over the tensor ranks."""
    named: dict[str, Any] = make_sharded_tensors_for_checkpoint({"sinks": sinks}, prefix, {"sinks": 0}, sharded_offsets)
    return named


def take_sink_(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> None:
    """Take the sink into `out` [..., T, d] and `lse` [..., T] of the keys; `sink` [..., 1]."""
    out.mul_((lse - sink).sigmoid()[..., None])
    lse.copy_(torch.logaddexp(lse, sink.to(lse.dtype).expand_as(lse)))


def sink_gradient(out: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """What each token adds to the gradient of its head's sink, fp32 [..., T]; `out` and `lse` with the sink in them."""
    return -(sink - lse).exp() * (out.float() * grad.float()).sum(-1)


def attend_with_sink_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sink_h: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """[1, h, t, d] from query [1, h, t, d], key and value [1, g, s, d], and mask [t, 1 + s], None for a causal one.

    Heads become wider: a query's further numbers are (sink / scale, 0, ...), those of its keys 0, and there is a first
    key (0, ..., 1, 0, ...) whose value is 0, which every query sees. Behind a causal mask it needs a first query.
    """
    size, tokens = query.shape[-1], query.shape[2]
    sink = (sink_h / scale).to(query.dtype)[None, :, None, None].expand(-1, -1, tokens, -1)
    wide = torch.cat((query, F.pad(sink, (0, ALIGN - 1))), -1)
    key, value = (F.pad(tensor, (0, ALIGN, 1, 0)) for tensor in (key, value))
    key[:, :, 0, size] = 1.0
    if mask is None:
        wide = F.pad(wide, (0, 0, 1, 0))
    out: torch.Tensor = F.scaled_dot_product_attention(
        wide,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[:, :, -tokens:, :size]
