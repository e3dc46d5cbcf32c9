"""Modules with Transformer Engine's structure, names and arguments, for a machine on which it cannot run: norms fused
into the linear layers behind them. What they cannot show is its kernels and FP8; tests/gpu does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from rpo_megatron.model import build
from rpo_megatron.model.layers import RMSNorm


class NormLinear(ColumnParallelLinear):
    """As TELayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> Any:
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon)
        return super().forward(normed, *others, **options)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class Provider:
    """As megatron's TESpecProvider."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def column_parallel_layer_norm_linear(self) -> type:
        return NormLinear

    def layer_norm(self, **_: Any) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return torch.nn.Identity  # replaced by ours

    def fuse_layernorm_and_linear(self) -> bool:
        return True


@contextmanager
def stand_in() -> Iterator[None]:
    """While it lasts, kernels.layers=transformer_engine builds these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_layer_specs, "TESpecProvider", Provider, raising=False)
        patch.setattr(transformer_engine, "TENorm", RMSNorm)
        patch.setattr(build, "check_transformer_engine", lambda wanted_by: None)
        yield
