"""What megatron-core is told about a model: its TransformerConfig, from a ModelShape, a layout and a precision."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer import TransformerConfig

from rpo_megatron.distributed import Groups
from rpo_megatron.model.families import Activation
from rpo_megatron.model.layout import chunk_layers
from rpo_megatron.model.router import routing
from rpo_megatron.model.shape import ModelShape

ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
}
Recompute = Literal["none", "mlp", "full"]
RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    shape: ModelShape, *, dtype: torch.dtype, sequence_parallel: bool, groups: Groups, **fields: Any
) -> TransformerConfig:
    """`dtype` is that of weights and activations; `fields` are further ones of megatron's."""
    config = TransformerConfig(
        **_architecture(shape),
        **_pipeline(chunk_layers(shape, groups.pp.size, groups.virtual), groups),
        **fields,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=groups.tp.size,
        pipeline_model_parallel_size=groups.pp.size,
        context_parallel_size=groups.cp.size,
        expert_model_parallel_size=groups.ep.size,
        sequence_parallel=sequence_parallel,
        # The exact mean over the groups of the global batch: losses are sums, counts travel beside them, and megatron
        # divides once. "Token" in its name is whatever the count counts.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # Rows differ in length. Megatron's check asks for the all-to-all dispatcher even in dense models.
        variable_seq_lengths=groups.pp.size > 1,
        batch_p2p_sync=False,  # against a race of old versions of torch: the host would wait for every message
        moe_token_dispatcher_type="alltoall",
        perform_initialization=False,
        use_cpu_initialization=groups.device.type == "cpu",
        # Fused kernels need apex or Transformer Engine.
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    # Not before: megatron refuses biases of experts that are split over tensor ranks, which expert_bias.py sees to.
    config.add_bias_linear = shape.biases
    return config


def _pipeline(chunks: tuple[int, ...], groups: Groups) -> dict[str, Any]:
    """Which layers are where, and how they pass on what they computed."""
    if groups.virtual > 1:
        names = [["decoder"] * count for count in chunks]
        return {
            "virtual_pipeline_model_parallel_size": groups.virtual,
            "pipeline_model_parallel_layout": [["embedding", *names[0]], *names[1:-1], [*names[-1], "loss"]],
            # Transfers run behind computation. Its other way of sending confuses the two messages that two stages have
            # for each other at once, without saying so; 1F1B, with one chunk for each rank, knows only that other way.
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    if len(set(chunks)) == 1:
        return {}
    return {"num_layers_in_first_pipeline_stage": chunks[0], "num_layers_in_last_pipeline_stage": chunks[-1]}


def _architecture(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_size,
        "gated_linear_unit": shape.gated,
        "activation_func": ACTIVATIONS[shape.activation],
        "normalization": "LayerNorm" if shape.norm == "layer1p" else "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "layernorm_zero_centered_gamma": shape.norm.endswith("1p"),
        "softmax_scale": shape.attention_scale,
        "qk_layernorm": shape.qk_norm,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **_experts(shape),
    }


def _experts(shape: ModelShape) -> dict[str, Any]:
    experts = shape.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_size,
        **routing(experts),
        "moe_shared_expert_intermediate_size": experts.shared_ffn_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        # A list also where all layers have experts: layers that differ are told apart in checkpoints by their number.
        "moe_layer_freq": [int(shape.has_experts(layer)) for layer in range(shape.num_layers)],
    }
