"""Modules with Transformer Engine's structure, names and arguments, for a machine on which it cannot run: norms fused
into the linear layers behind them. What they cannot show is its kernels and FP8; tests/gpu does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from rpo_megatron.model import build
from rpo_megatron.model.norms import NORMS, Norm


def norm_of(config: Any) -> Norm:
    if config.normalization == "LayerNorm":
        return "layer1p"
    return "rms1p" if config.layernorm_zero_centered_gamma else "rms"


class TENorm:
    """As megatron's: which norm it becomes, the config says."""

    def __new__(cls, config: Any, hidden_size: int, eps: float) -> Any:
        return NORMS[norm_of(config)](config, hidden_size, eps)


class NormLinear(ColumnParallelLinear):
    """As TELayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm = TENorm(config, input_size, config.layernorm_epsilon)
        for name, parameter in norm.named_parameters():
            self.register_parameter(f"layer_norm_{name}", parameter)
        self.norm = [norm]  # in a list, so that its parameters are not registered twice

    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> Any:
        return super().forward(self.norm[0](x), *others, **options)

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
        return TENorm

    def grouped_mlp_modules(self, *options: bool) -> Any:
        return LocalSpecProvider().grouped_mlp_modules(*options)

    def activation_func(self) -> None:
        return None

    def core_attention(self) -> type:
        return torch.nn.Identity  # replaced by ours

    def fuse_layernorm_and_linear(self) -> bool:
        return True


@contextmanager
def stand_in() -> Iterator[None]:
    """While it lasts, kernels.layers=transformer_engine builds these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_layer_specs, "TESpecProvider", Provider, raising=False)
        patch.setattr(transformer_engine, "TENorm", TENorm)
        patch.setattr(build, "check_transformer_engine", lambda wanted_by: None)
        yield
