"""Attention by Transformer Engine: cuDNN's fused kernels, or flash-attn's where it is installed, for rows whose prompts
are not shared. NOT YET RUN on a GPU; tests/model/test_te_attention.py runs it with a stand-in of its module.

A row is a batch of segments in the format `thd`, every segment causal in itself. One module serves all layers: it has
no weights, and computes outside of FP8, so that it has no state either.
"""

import functools
import os
from typing import Any

import torch

from rpo_megatron.model.row import Segments

ROUND = 64
"""The longest segment is said to be a multiple of this many tokens, as Transformer Engine rounds it itself where it is
not told: kernels are chosen, and some compiled, per length."""


def te_attention(
    query_T1hd: torch.Tensor,
    key_T1gd: torch.Tensor,
    value_T1gd: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """[T, 1, h, d]. bf16 on a GPU; without soft-caps, which cuDNN does not know."""
    assert softcap is None
    assert max(segments.prompts) < 0, "Transformer Engine's masks know no shared prompts"
    from transformer_engine.pytorch import autocast

    borders = segments.borders(query_T1hd.device)
    longest = -(-borders.longest // ROUND) * ROUND
    attend = _module(query_T1hd.shape[2], key_T1gd.shape[2], query_T1hd.shape[3], scale)
    with autocast(enabled=False):
        out: torch.Tensor = attend(
            query_T1hd[:, 0],
            key_T1gd[:, 0],
            value_T1gd[:, 0],
            qkv_format="thd",
            cu_seqlens_q=borders.start_S1,
            cu_seqlens_kv=borders.start_S1,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            attn_mask_type="padding_causal",
            window_size=(-1 if window is None else window - 1, 0),  # how far back, beside the token itself
        )
    return out.view(query_T1hd.shape)


@functools.cache
def _module(heads: int, kv_heads: int, head_dim: int, scale: float) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    # Where no fused kernel fits, Transformer Engine would build the score matrix without a word. This makes it say so.
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    return DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )
