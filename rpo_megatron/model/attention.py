"""Core attention for packed rows: causal inside a segment, blind across its borders except to a shared prompt.

Plugged into megatron's layer spec where it has its own DotProductAttention, which refuses packed rows and holds the
full score matrix. Nothing quadratic in the row is ever built. There are several implementations of the one function,
chosen by name when a model is built:

    sdpa     torch's scaled_dot_product_attention per segment, on any device: public API, and the others' oracle
    merged   prompts and responses in two flash-attention passes, no copies of keys: a call per segment on a CPU
             (merged.py), one for all segments on a GPU (merged_gpu.py, not yet run on one). Where a window or a
             soft-cap applies, sdpa takes its place
    flex     torch's FlexAttention (flex.py), one block-sparse kernel for the row; GPU, not yet run on one
    te       Transformer Engine's fused attention (te_attention.py), for prompts that are not shared; GPU, not yet run
             on one
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule

from rpo_megatron.distributed import Axis
from rpo_megatron.errors import UserError
from rpo_megatron.model import merged, merged_gpu
from rpo_megatron.model.context import attend_over_heads
from rpo_megatron.model.flex import build_mask, flex_attention
from rpo_megatron.model.precision import check_transformer_engine
from rpo_megatron.model.rotary import rotate
from rpo_megatron.model.row import Segments
from rpo_megatron.model.shape import ModelShape
from rpo_megatron.model.sinks import attend_with_sink_key, shard_sinks, sink_parameter
from rpo_megatron.model.te_attention import te_attention

Attend = Callable[..., torch.Tensor]
"""(query [T, 1, h, d], key and value [T, 1, g, d], segments, *, scale) -> [T, 1, h, d]: T tokens, h query heads of this
tensor rank, g heads of keys and values, d numbers per head."""
AttentionName = Literal["auto", "sdpa", "merged", "flex", "te"]


def choose_attention(name: AttentionName, device: torch.device) -> AttentionName:
    """`auto` is merged on a CPU, where it saves memory, and sdpa elsewhere."""
    if name != "auto":
        return name
    return "merged" if device.type == "cpu" else "sdpa"


def check_attention(name: AttentionName, shape: ModelShape, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where the chosen implementation cannot compute the model."""
    key = f"kernels.attention={name}"
    if name in ("merged", "te") and device.type == "cuda" and dtype != torch.bfloat16:
        raise UserError(f"{key} computes in bf16 on a GPU: set precision=bf16, or use kernels.attention=sdpa")
    if name != "te":
        return
    if device.type == "cpu":
        raise UserError(f"{key} needs an NVIDIA GPU; set kernels.attention=auto on this machine")
    if shape.attention_softcap is not None:
        raise UserError(
            f"{key} has no fused kernel for the soft-cap on attention scores that {shape.family} has; use "
            f"kernels.attention=flex or sdpa"
        )
    if shape.sinks:
        raise UserError(f"{key} does not know the sinks that {shape.family} has; use kernels.attention=auto")
    check_transformer_engine(key, least=(2, 9))  # the first with `autocast`


def segment_attention(
    query_T1hd: torch.Tensor,
    key_T1gd: torch.Tensor,
    value_T1gd: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """A call per segment. A response that shares its prompt has the keys [prompt, response], joined for it, and a mask
    of response x (prompt + response) numbers, made once per row and used by all layers; so has a segment that is longer
    than `window`, how many last tokens a token sees. Sinks and a soft-cap exclude each other."""
    queries, keys, values = (
        [part.permute(1, 2, 0, 3) for part in tensor.split(segments.lengths)]
        for tensor in (query_T1hd, key_T1gd, value_T1gd)
    )  # each [1, heads, tokens, d]
    assert softcap is None or sink_h is None
    outputs = []
    for i, prompt in enumerate(segments.prompts):
        keys_i, values_i, mask = keys[i], values[i], None
        if prompt >= 0:
            keys_i, values_i = torch.cat([keys[prompt], keys_i], 2), torch.cat([values[prompt], values_i], 2)
        seen = None if window is None or window >= keys_i.shape[2] else window
        if prompt >= 0 or seen is not None or softcap is not None:
            sinks = 0 if sink_h is None else 1
            mask = segments.mask(i, window=seen, sinks=sinks, dtype=query_T1hd.dtype, device=query_T1hd.device)
        if softcap is not None:
            output = _softcapped(queries[i], keys_i, values_i, mask, scale=scale, softcap=softcap)
        elif sink_h is not None:
            output = attend_with_sink_key(queries[i], keys_i, values_i, mask, sink_h, scale=scale)
        else:
            output = F.scaled_dot_product_attention(
                queries[i],
                keys_i,
                values_i,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query_T1hd.shape[2] != key_T1gd.shape[2],
            )
        outputs.append(output.permute(2, 0, 1, 3))
    return torch.cat(outputs)


def _softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, *, scale: float, softcap: float
) -> torch.Tensor:
    """[1, h, t, d] from query [1, h, t, d], key and value [1, g, s, d]: scores z become softcap * tanh(z / softcap)
    before the softmax (Gemma 2, arXiv 2408.00118, section 2). torch has no kernel for this: the scores of the segment
    exist, in fp32."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * (scale / softcap)
    weights = (scores.tanh() * softcap + mask).softmax(-1)
    return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)


def block_attention(
    query_T1hd: torch.Tensor,
    key_T1gd: torch.Tensor,
    value_T1gd: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """FlexAttention, with a mask that is made once per row for all layers of the same window."""
    if window not in segments.blocks:
        device = query_T1hd.device
        segments.blocks[window] = build_mask(segments.lengths, segments.prompts, device=device, window=window)
    mask = segments.blocks[window]
    return flex_attention(query_T1hd, key_T1gd, value_T1gd, mask, scale=scale, softcap=softcap, sink_h=sink_h)


def merged_attention(query_T1hd: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
    """Two merged passes, by the kernels of the device."""
    attend = merged_gpu.merged_attention if query_T1hd.is_cuda else merged.merged_attention
    return attend(query_T1hd, *given, **options)


ATTENTION: dict[AttentionName, Attend] = {
    "sdpa": segment_attention,
    "merged": merged_attention,
    "flex": block_attention,
    "te": te_attention,
}


def layer_attention(name: AttentionName, shape: ModelShape, layer: int, *, scale: float) -> Attend:
    """Attention of layer `layer`, counted from 0: implementation `name`, except that a soft-cap, or a window that is
    shorter than a row's longest text, takes sdpa in place of merged."""
    window, softcap = shape.window(layer), shape.attention_softcap
    if name != "merged":
        return partial(ATTENTION[name], scale=scale, window=window, softcap=softcap)
    plain = partial(merged_attention, scale=scale)
    masked = partial(segment_attention, scale=scale, window=window, softcap=softcap)
    if softcap is not None:
        return masked
    if window is None:
        return plain

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, **sinks: torch.Tensor
    ) -> torch.Tensor:
        return (plain if segments.longest <= window else masked)(query, key, value, segments, **sinks)

    return attend


def attend_padded(
    attend: Attend, query_T1hd: torch.Tensor, key_T1gd: torch.Tensor, value_T1gv: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """[T, 1, h, v], for kernels that know one width only: values get zeros up to the d numbers of a key."""
    width = value_T1gv.shape[-1]
    value_T1gd = F.pad(value_T1gv, (0, key_T1gd.shape[-1] - width))
    return attend(query_T1hd, key_T1gd, value_T1gd, segments)[..., :width]


class PackedAttention(MegatronModule):
    """query [T, 1, heads, dim], key and value [T, 1, kv heads, dim] (this TP rank's heads) -> [T, 1, heads * dim], dim
    of the values; with context parallelism, of this rank's part of the row."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        attention: AttentionName,
        shape: ModelShape,
        cp: Axis,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        local = shape.local_rope_theta is not None and shape.window(layer_number - 1) is not None
        self.turn = None if shape.latent is not None else int(local)
        """Which of the row's turns; None where queries and keys come turned, as those of latent attention do."""
        self.attend = layer_attention(attention, shape, layer_number - 1, scale=scale)
        if shape.value_dim != shape.head_dim:
            self.attend = partial(attend_padded, self.attend)
        self.sinks = sink_parameter(config, shape) if shape.sinks else None
        if cp.size > 1:
            self.attend = partial(attend_over_heads, self.attend, cp=cp)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> torch.Tensor:
        assert packed_seq_params is not None
        assert attention_mask is None
        assert attention_bias is None
        if self.turn is not None:
            query, key = (rotate(tensor, packed_seq_params.turns[self.turn]) for tensor in (query, key))
        sinks = {} if self.sinks is None else {"sink_h": self.sinks}
        return self.attend(query, key, value, packed_seq_params, **sinks).flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {} if self.sinks is None else shard_sinks(self.sinks, prefix, sharded_offsets)
