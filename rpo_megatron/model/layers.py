"""The transformer layer as a megatron spec: megatron's own linear layers, our norms and our core attention.

The same layers run on CPU and GPU and need neither Transformer Engine nor apex.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from rpo_megatron.distributed import Axis
from rpo_megatron.model.attention import AttentionName, PackedAttention
from rpo_megatron.model.latent import LatentAttention
from rpo_megatron.model.norms import NORMS, NormAndAdd
from rpo_megatron.model.shape import ModelShape


def block_spec(
    config: Any, shape: ModelShape, *, attention: AttentionName, cp: Axis, chunk: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of one of its chunks, and the final norm."""
    norm = NORMS[shape.norm]

    def layer(num_experts: int | None) -> ModuleSpec:
        spec = get_gpt_layer_local_spec(
            num_experts=num_experts,
            moe_grouped_gemm=False,
            normalization=config.normalization,
            qk_layernorm=shape.qk_norm,
        )
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        if shape.qk_norm:
            # Replicated weights that see one rank's heads: megatron sums their gradients over TP by parameter name.
            inside = spec.submodules.self_attention.submodules
            inside.q_layernorm = inside.k_layernorm = norm
        return complete(spec, config, shape, attention=attention, cp=cp)

    return TransformerBlockSubmodules(layer_specs=of_stage(config, shape, layer, chunk=chunk), layer_norm=norm)


def of_stage(
    config: Any, shape: ModelShape, layer: Callable[[int | None], ModuleSpec], *, chunk: int | None
) -> list[ModuleSpec]:
    """The layers of this pipeline stage (chunk=None), or of one of its chunks; `layer` makes one with so many experts,
    or without (None)."""
    first = get_transformer_layer_offset(config, chunk)
    numbers = range(first, first + get_num_layers_to_build(config, chunk))
    count = shape.experts.count if shape.experts is not None else None
    kinds = {experts: layer(count if experts else None) for experts in {shape.has_experts(i) for i in numbers}}
    return [kinds[shape.has_experts(i)] for i in numbers]


def complete(layer: ModuleSpec, config: Any, shape: ModelShape, *, attention: AttentionName, cp: Axis) -> ModuleSpec:
    """Put into a layer of megatron's what is ours: core attention, and what megatron lacks of some families."""
    parts = layer.submodules
    params = {"attention": attention, "shape": shape, "cp": cp}
    if shape.latent is not None:
        parts.self_attention = ModuleSpec(module=LatentAttention, params=params)
        return layer
    parts.self_attention.submodules.core_attention = ModuleSpec(module=PackedAttention, params=params)
    if shape.post_norms:
        post = ModuleSpec(module=NormAndAdd, params={"config": config, "norm": NORMS[shape.norm]})
        parts.self_attn_bda = parts.mlp_bda = post
    return layer
