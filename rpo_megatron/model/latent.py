"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) on packed rows.

1. Of the hidden state, a few numbers per token: c_q and c_kv, each normed, and the part of the key that turns with the
   position and that all heads share. Every tensor rank has all of these matrices.
2. Of c_q this rank's queries, of c_kv its keys and values; queries, and the shared part of the key, are rotated.
3. Core attention, as in all other layers, and the output projection.

Megatron's own module (multi_latent_attention.py, whose names weights have here) counts positions from the start of a
row and cannot be given others, which segments with a shared prompt need. A head's rotated numbers come first here, in
queries and keys alike, so that attention.py finds them where it finds others'.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule

from rpo_megatron.distributed import Axis
from rpo_megatron.model.attention import AttentionName, PackedAttention
from rpo_megatron.model.norms import RMSNorm
from rpo_megatron.model.rotary import Turn
from rpo_megatron.model.row import Segments
from rpo_megatron.model.shape import ModelShape

NORM_EPS = 1e-6
"""Of the norms inside, whatever rms_norm_eps says, as in transformers."""


class WholeLinear(torch.nn.Module):
    """A matrix that every tensor rank has all of; under sequence parallelism each sees its own rows."""

    def __init__(self, config: Any, size: int, out_size: int) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        weight: Any = torch.nn.Parameter(torch.empty(out_size, size, dtype=config.params_dtype, device=device))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two dimensions: for three, torch takes one kernel with gradients and another without.
        return F.linear(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class LatentAttention(MegatronModule):
    """hidden [T, 1, H] (under sequence parallelism this rank's rows) -> the same."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        pg_collection: Any,
        *,
        attention: AttentionName,
        shape: ModelShape,
        cp: Axis,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        latent = shape.latent
        assert latent is not None
        self.latent, self.tp_group = latent, pg_collection.tp
        self.heads = shape.num_heads // self.tp_group.size()
        hidden, num_heads = shape.hidden_size, shape.num_heads
        options = {"config": config, "init_method": config.init_method, "bias": False, "tp_group": self.tp_group}
        column = {**options, "gather_output": False}
        if latent.query_rank is None:
            self.linear_q_proj = ColumnParallelLinear(hidden, num_heads * shape.head_dim, **column)
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden, latent.query_rank)
            self.q_layernorm = RMSNorm(config, latent.query_rank, eps=NORM_EPS)
            self.linear_q_up_proj = ColumnParallelLinear(latent.query_rank, num_heads * shape.head_dim, **column)
        self.linear_kv_down_proj = WholeLinear(config, hidden, latent.kv_rank + latent.rotary_dim)
        self.kv_layernorm = RMSNorm(config, latent.kv_rank, eps=NORM_EPS)
        made = num_heads * (latent.plain_dim + latent.value_dim)
        self.linear_kv_up_proj = ColumnParallelLinear(latent.kv_rank, made, **column)
        self.core_attention = PackedAttention(
            config, layer_number, None, "self", config.softmax_scale, attention=attention, shape=shape, cp=cp
        )
        row = {**options, "input_is_parallel": True, "skip_bias_add": True}
        self.linear_proj = RowParallelLinear(num_heads * latent.value_dim, hidden, **row)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: Segments,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        assert self.config.sequence_parallel or self.tp_group.size() == 1, "as models with experts need it anyway"
        (turn,) = packed_seq_params.turns
        query = self._query(hidden_states, turn)
        key, value = self._key_value(hidden_states, turn)
        result = self.core_attention(query, key, value, attention_mask, packed_seq_params=packed_seq_params)
        return self.linear_proj(result)[0], None

    def _query(self, hidden: torch.Tensor, turn: Turn) -> torch.Tensor:
        """[T, 1, h, d]"""
        if self.latent.query_rank is None:
            made = self.linear_q_proj(hidden)[0]
        else:
            made = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))[0]
        plain, rotary = made.unflatten(-1, (self.heads, -1)).split((self.latent.plain_dim, self.latent.rotary_dim), -1)
        return torch.cat((*self._turned(rotary, turn), plain), -1)

    def _key_value(self, hidden: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, 1, h, d] and [T, 1, h, v]"""
        narrow, shared = self.linear_kv_down_proj(hidden).split((self.latent.kv_rank, self.latent.rotary_dim), -1)
        made = self.linear_kv_up_proj(self.kv_layernorm(narrow))[0].unflatten(-1, (self.heads, -1))
        plain, value = made.split((self.latent.plain_dim, self.latent.value_dim), -1)
        if self.config.sequence_parallel:  # backward sums over the tensor ranks, each of which uses it for its heads
            shared = gather_from_sequence_parallel_region(shared, group=self.tp_group)
        turned = [half.expand(*plain.shape[:-1], -1) for half in self._turned(shared[:, :, None], turn)]
        return torch.cat((*turned, plain), -1), value

    def _turned(self, x: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second numbers of all pairs in x [T, 1, h, rotary_dim], rotated."""
        first, second = (x[..., 0::2], x[..., 1::2]) if self.latent.interleaved else x.chunk(2, -1)
        cos, sin = turn
        return first * cos - second * sin, second * cos + first * sin
