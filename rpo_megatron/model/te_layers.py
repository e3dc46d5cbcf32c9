"""The transformer layer on Transformer Engine's modules: norms fused into the linear layers behind them, FP8.

The same mathematics as layers.py, with the same core attention, and the same names in checkpoints: megatron maps those
of its own layers to Transformer Engine's. Inside the model a fused norm's weight belongs to the linear layer, so
`canonical_name` gives it the name that it has there, by which weights are read and exported.
"""

from typing import Any

from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from rpo_megatron.distributed import Axis
from rpo_megatron.model.attention import AttentionName, PackedAttention

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def te_block_spec(config: Any, *, attention: AttentionName, cp: Axis) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm."""
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    inside = layer.submodules.self_attention.submodules
    inside.core_attention = ModuleSpec(module=PackedAttention, params={"attention": attention, "cp": cp})
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=transformer_engine.TENorm
    )


def canonical_name(name: str) -> str:
    """A parameter's name in layers.py's model."""
    for fused, own in FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + own
    return name
