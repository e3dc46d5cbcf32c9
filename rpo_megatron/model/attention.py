"""Core attention for packed rows: causal inside a segment, blind across its borders except to a shared prompt.

Plugged into megatron's layer spec where it has its own DotProductAttention, which refuses packed rows and holds the
full score matrix. Nothing quadratic in the row is ever built. There are several implementations of the one function,
chosen by name when a model is built:

    sdpa     torch's scaled_dot_product_attention per segment, on any device: public API, and the others' oracle
    merged   prompts and responses in two flash-attention passes (merged.py), without copies of keys; CPU
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule

from rpo_megatron.distributed import Axis
from rpo_megatron.model.context import attend_over_heads
from rpo_megatron.model.merged import merged_attention
from rpo_megatron.model.row import Segments

Attend = Callable[..., torch.Tensor]
"""(query [T, 1, h, d], key and value [T, 1, g, d], segments, *, scale) -> [T, 1, h, d]: T tokens, h query heads of this
tensor rank, g heads of keys and values, d numbers per head."""
AttentionName = Literal["auto", "sdpa", "merged"]


def choose_attention(name: AttentionName, device: torch.device) -> AttentionName:
    """`auto` is merged on a CPU, where it saves memory, and sdpa elsewhere."""
    if name != "auto":
        return name
    return "merged" if device.type == "cpu" else "sdpa"


def segment_attention(
    query_T1hd: torch.Tensor, key_T1gd: torch.Tensor, value_T1gd: torch.Tensor, segments: Segments, *, scale: float
) -> torch.Tensor:
    """A call per segment. A response that shares its prompt has the keys [prompt, response], joined for it, and a mask
    of response x (prompt + response) numbers, made once per row and used by all layers."""
    queries, keys, values = (
        [part.permute(1, 2, 0, 3) for part in tensor.split(segments.lengths)]
        for tensor in (query_T1hd, key_T1gd, value_T1gd)
    )  # each [1, heads, tokens, d]
    outputs = []
    for i, prompt in enumerate(segments.prompts):
        keys_i, values_i, mask = keys[i], values[i], None
        if prompt >= 0:
            keys_i, values_i = torch.cat([keys[prompt], keys_i], 2), torch.cat([values[prompt], values_i], 2)
            mask = segments.mask(i, dtype=query_T1hd.dtype, device=query_T1hd.device)
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


ATTENTION: dict[AttentionName, Attend] = {"sdpa": segment_attention, "merged": merged_attention}


class PackedAttention(MegatronModule):
    """query [T, 1, heads, dim], key and value [T, 1, kv heads, dim] (this TP rank's heads) -> [T, 1, heads * dim]; with
    context parallelism, of this rank's part of the row."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        attention: AttentionName,
        cp: Axis,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.attend = partial(ATTENTION[attention], scale=softmax_scale or 1.0 / math.sqrt(config.kv_channels))
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
        return self.attend(query, key, value, packed_seq_params).flatten(2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}  # no parameters
