"""The transformer layer on Transformer Engine's modules: norms fused into the linear layers behind them, FP8.

The same mathematics as layers.py, with the same core attention, and the same names in checkpoints: megatron maps those
of its own layers to Transformer Engine's. Inside the model a fused norm's weight belongs to the linear layer, so
`canonical_name` gives it the name that it has there, by which weights are read and exported. A rank's experts are one
module, which multiplies with the weights of all of them in one kernel (GroupedLinear); for FP8 it pads each expert's
tokens to what the recipe needs.
"""

from typing import Any

from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from rpo_megatron.distributed import Axis
from rpo_megatron.model.attention import AttentionName
from rpo_megatron.model.layers import complete, of_stage
from rpo_megatron.model.shape import ModelShape

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}


def te_block_spec(
    config: Any, shape: ModelShape, *, attention: AttentionName, cp: Axis, chunk: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of one of its chunks, and the final norm."""

    def layer(num_experts: int | None) -> ModuleSpec:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=True, qk_layernorm=shape.qk_norm
        )
        if num_experts is not None:  # a norm that is not fused has the name in checkpoints that layers.py's has
            names = spec.submodules.sharded_state_dict_keys_map
            spec.submodules.sharded_state_dict_keys_map = {**names, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        return complete(spec, config, shape, attention=attention, cp=cp)

    specs = of_stage(config, shape, layer, chunk=chunk)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=transformer_engine.TENorm)


def canonical_name(name: str) -> str:
    """A parameter's name in layers.py's model."""
    for fused, own in FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + own
    return name
