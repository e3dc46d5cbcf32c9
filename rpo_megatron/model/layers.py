"""The transformer layer as a megatron spec: megatron's own linear layers, our norm and our core attention.

The same layers run on CPU and GPU and need neither Transformer Engine nor apex.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from rpo_megatron.distributed import Axis
from rpo_megatron.model.attention import AttentionName, PackedAttention


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension. Under sequence parallelism each TP rank sees its own rows, so
    megatron must sum the weight's gradient over TP; it does so for parameters marked `sequence_parallel`."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def block_spec(config: Any, *, attention: AttentionName, cp: Axis) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    inside = parts.self_attention.submodules
    inside.core_attention = ModuleSpec(module=PackedAttention, params={"attention": attention, "cp": cp})
    if config.qk_layernorm:
        # Replicated weights that see one rank's heads: megatron sums their gradients over TP by parameter name.
        inside.q_layernorm = inside.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
