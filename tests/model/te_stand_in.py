"""Modules with Transformer Engine's structure, names and arguments, for a machine on which it cannot run: norms fused
into the linear layers behind them, the experts of a rank in one module. What they cannot show is its kernels and FP8;
tests/gpu does."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from rpo_megatron.model import build
from rpo_megatron.model.norms import NORMS, Norm


def norm_of(config: Any) -> Norm:
    if config.normalization == "LayerNorm":
        return "layer1p"
    return "rms1p" if config.layernorm_zero_centered_gamma else "rms"


class ExtraState:
    """What all of Transformer Engine's modules have beside their tensors, and of megatron's and ours only some."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0


class TENorm:
    """As megatron's: which norm it becomes, the config says."""

    def __new__(cls, config: Any, hidden_size: int, eps: float) -> Any:
        norm: Any = NORMS[norm_of(config)]
        return type("TENorm", (ExtraState, norm), {})(config, hidden_size, eps)


class NormLinear(ExtraState, ColumnParallelLinear):
    """As TELayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        if not hasattr(self.weight, "tensor_model_parallel"):  # Transformer Engine's has it from the start
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        norm = TENorm(config, input_size, config.layernorm_epsilon)
        for name, parameter in norm.named_parameters():
            self.register_parameter(f"layer_norm_{name}", parameter)
        self.norm = [norm]  # in a list, so that its parameters are not registered twice

    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> Any:
        return super().forward(self.norm[0](x), *others, **options)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class GroupedLinear(torch.nn.Module):
    """As TEGroupedLinear: the matrices of all experts of a rank."""

    split_dim: int

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, config: Any, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__()
        size = [output_size, input_size]
        size[self.split_dim] //= pg_collection.expt_tp.size()
        self.num_gemms, self.groups = num_gemms, pg_collection
        for i in range(num_gemms):
            weight: Any = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1
            set_tensor_model_parallel_attributes(weight, True, self.split_dim, 1)
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        parts = [F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(x.split(m_splits))]
        return torch.cat(parts), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        first, count = self.groups.ep.rank() * self.num_gemms, self.groups.ep.size() * self.num_gemms
        sharded: dict[str, Any] = {}
        for i in range(self.num_gemms):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + i, count))
            own = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{i}")},
                prefix,
                {"weight": self.split_dim},
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            sharded[f"{prefix}weight{i}"] = own[f"{prefix}weight"]
            own[f"{prefix}weight"].replica_id = (*own[f"{prefix}weight"].replica_id[:2], self.groups.expt_dp.rank())
        return sharded


class GroupedColumn(GroupedLinear):
    split_dim = 0


class GroupedRow(GroupedLinear):
    split_dim = 1


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
        assert options[0]
        linear = {"linear_fc1": GroupedColumn, "linear_fc2": GroupedRow}
        if len(options) == 2:  # up to 0.16
            return experts.TEGroupedMLP, MLPSubmodules(**linear)
        parts = experts.GroupedMLPSubmodules(activation_func=None, **linear)
        return partial(experts.TEGroupedMLP, submodules=parts)

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
