"""Core attention for packed rows: causal inside a segment, blind across its borders except to a shared prompt.

Plugged into megatron's layer spec where it has its own DotProductAttention, which refuses packed rows and holds the
full score matrix. Torch's scaled_dot_product_attention (flash kernels on CPU and GPU) runs once per segment, so nothing
quadratic in the row is ever built. A response that shares its prompt has the keys [prompt, response] and a mask of
response x (prompt + response) numbers, made once per row and used by all layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule

from rpo_megatron.model.row import Segments


class PackedAttention(MegatronModule):
    """query [T, 1, heads, dim], key and value [T, 1, kv heads, dim] (this TP rank's heads) -> [T, 1, heads * dim]."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        segments = packed_seq_params
        queries, keys, values = (
            [part.permute(1, 2, 0, 3) for part in tensor.split(segments.lengths)] for tensor in (query, key, value)
        )  # each [1, heads, tokens, dim]
        outputs = []
        for i, prompt in enumerate(segments.prompts):
            keys_i, values_i, mask = keys[i], values[i], None
            if prompt >= 0:
                keys_i, values_i = torch.cat([keys[prompt], keys_i], 2), torch.cat([values[prompt], values_i], 2)
                mask = segments.mask(i, dtype=query.dtype, device=query.device)
            output = F.scaled_dot_product_attention(
                queries[i],
                keys_i,
                values_i,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
            outputs.append(output.permute(2, 0, 1, 3))
        return torch.cat(outputs).flatten(2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}  # no parameters
