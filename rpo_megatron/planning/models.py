"""The models that can be planned: any directory with a config.json that the program reads, and a few public ones by
name, for planning before anything is downloaded."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpo_megatron.errors import UserError, nearest
from rpo_megatron.model.adapter import Adapter, num_adapter_parameters
from rpo_megatron.model.shape import ModelShape, num_parameters, read_shape


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    shape: ModelShape
    adapter: Adapter | None = None
    """What is trained in place of the weights."""


_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "llama-3.1-405b": {
        **_LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
    "moonlight-16b-a3b": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "kv_lora_rank": 512,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 163840,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}
"""What matters of the config.json of public models."""


def find_model(name: str) -> Model:
    """A directory, or a key of CONFIGS in any case.

    Raises UserError when it is neither, or config.json is not one that the program can read.
    """
    if Path(name).is_dir():
        return Model(name=name, shape=read_shape(name))
    key = name.lower()
    if key not in CONFIGS:
        raise UserError(
            f"model={name}: neither a directory nor one of {', '.join(CONFIGS)}{nearest(key, CONFIGS)}; give the "
            f"directory of a Hugging Face model (config.json is enough)"
        )
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIGS[key]), encoding="utf-8")
        return Model(name=key, shape=read_shape(directory))


def count_parameters(model: Model) -> int:
    """Numbers of the weights, without vocabulary padding."""
    return num_parameters(model.shape)


def count_trained(model: Model) -> int:
    """All of them, or those of an adapter and of the value head beside it."""
    shape = model.shape
    if model.adapter is None:
        return num_parameters(shape)
    return num_adapter_parameters(shape, model.adapter) + (shape.hidden_size if shape.head == "value" else 0)


def count_active(model: Model) -> int:
    """Those of them that take part in one token: of experts, the ones that compute it; the router whole."""
    shape, experts = model.shape, model.shape.experts
    if experts is None:
        return num_parameters(shape)
    chosen = num_parameters(replace(shape, experts=replace(experts, count=experts.per_token)))
    layers = shape.num_layers - len(experts.dense_layers)
    return chosen + layers * (experts.count - experts.per_token) * (shape.hidden_size + shape.biases)
