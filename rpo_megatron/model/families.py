"""The model families we train: what differs from one model_type to the next.

A new family of known parts is a row of FAMILIES. No torch and no numpy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rpo_megatron.errors import UserError
from rpo_megatron.model.hf_config import HFConfig

Norm = Literal["rms", "rms1p", "layer1p"]
"""x / rms(x) * w;  x / rms(x) * (1 + w);  (x - mean) / std * (1 + w) + b."""
Activation = Literal["silu", "gelu_tanh", "relu2"]
ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}
"""By transformers' name."""


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """GPT-OSS's gate: with g = min(gate, limit) and u = up cut to [-limit, limit], g sigmoid(alpha g) (u + 1)."""

    limit: float
    alpha: float


# ------------------------------------------------------------------------------------------------ windows

Layers = Sequence[int]


def _no_layer(config: HFConfig) -> Layers:
    return ()


def _every_layer(config: HFConfig) -> Layers:
    return range(config.num_hidden_layers)


def _if_switched_on(config: HFConfig) -> Layers:
    return range(config.num_hidden_layers) if config.use_sliding_window else ()


def _upper_layers(config: HFConfig) -> Layers:
    """Qwen's rule: only with use_sliding_window, and only from layer max_window_layers on."""
    if not config.use_sliding_window:
        return ()
    listed = _listed(config)
    return range(config.max_window_layers, config.num_hidden_layers) if listed is None else listed


def _every_other_lower_layer(config: HFConfig) -> Layers:
    """Qwen2-MoE: only with use_sliding_window, and of the first max_window_layers layers the even ones."""
    if not config.use_sliding_window:
        return ()
    listed = _listed(config)
    return range(0, min(config.max_window_layers, config.num_hidden_layers), 2) if listed is None else listed


def _every_other_layer(config: HFConfig) -> Layers:
    listed = _listed(config)
    return range(0, config.num_hidden_layers, 2) if listed is None else listed


def _all_but_each_last(config: HFConfig) -> Layers:
    """Gemma 3: of every `sliding_window_pattern` layers the last sees everything."""
    listed = _listed(config)
    pattern = config.sliding_window_pattern
    return [i for i in range(config.num_hidden_layers) if (i + 1) % pattern] if listed is None else listed


def _listed(config: HFConfig) -> Layers | None:
    """Those that layer_types calls sliding; None where there is no such key."""
    kinds = config.layer_types
    if kinds is None:
        return None
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(
            f"layer_types '{min(unknown)}' is not supported; supported are full_attention, sliding_attention"
        )
    if len(kinds) != config.num_hidden_layers:
        raise UserError(f"layer_types has {len(kinds)} layers, num_hidden_layers says {config.num_hidden_layers}")
    return [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What a mixture of experts is called inside a layer of the Hugging Face files."""

    block: str
    gate: str
    up: str
    down: str
    router: str = "gate"
    stacked: bool = False
    """All experts of a layer are one tensor [expert, in, out]; gate and up are one, too, whose outputs take turns."""
    shared: str | None = None
    """There is one more, which computes every token; its name."""
    shared_gate: bool = False
    """It has a gate of its own."""
    biased: bool = False
    """DeepSeek-V3's router: sigmoids, and a bias that only helps to choose."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes one model_type from the others."""

    class_prefix: str
    """Of the names of transformers' reward model classes, e.g. Llama in LlamaForSequenceClassification."""
    qkv_bias: bool = False
    biases: bool = False
    """Every matrix of a layer has a bias, also the router's and the experts'."""
    sinks: bool = False
    """In attention's softmax every head has one more term, which is learned and has no value."""
    qk_norm: bool = False
    fused: bool = False
    """Query, key and value are one tensor in the files, and so are gate and up."""
    gated: bool = True
    """The feed-forward layer is down(act(gate(x)) * up(x)); else down(act(up(x)))."""
    norm: Norm = "rms"
    post_norms: bool = False
    """Attention and feed-forward layer each have a second norm, before their result is added to the residual."""
    partial_rotary: bool = False
    """partial_rotary_factor is read: only the first numbers of a head are rotated."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of hidden_size."""
    experts: ExpertNames | None = None
    latent: bool = False
    """Multi-head latent attention: keys and values are made of a few numbers per token."""
    sliding: Callable[[HFConfig], Layers] = _no_layer
    """Layers that see only the last `sliding_window` tokens, if config.json gives that number."""
    must_be_false: tuple[str, ...] = ()
    """Keys of config.json that this family reads and that we support only when they are false (or 0)."""
    must_be_true: tuple[str, ...] = ()
    """Keys that it takes for true where they are left out, and that we support only so."""
    unquantise: str = "use the unquantised model"
    """What to do about files with quantised weights."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Key of this family -> key of HFConfig that says the same."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json leaves out."""


_QWEN_EXPERTS = ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")
_GEMMA: dict[str, Any] = {
    "norm": "rms1p",
    "post_norms": True,
    "scaled_embedding": True,
    "must_be_false": ("attention_bias", "use_bidirectional_attention"),
    "renamed": {"hidden_activation": "hidden_act"},
}
_GEMMA_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(class_prefix="Llama", must_be_false=("attention_bias", "mlp_bias")),
    "mistral": Family(
        class_prefix="Mistral",
        sliding=_every_layer,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "mixtral": Family(
        class_prefix="Mixtral",
        experts=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
        sliding=_every_layer,
        must_be_false=("router_jitter_noise",),
        defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family(
        class_prefix="Qwen2",
        qkv_bias=True,
        sliding=_upper_layers,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen2_moe": Family(
        class_prefix="Qwen2Moe",
        qkv_bias=True,
        experts=replace(_QWEN_EXPERTS, shared="shared_expert", shared_gate=True),
        sliding=_every_other_lower_layer,
        renamed={"num_experts": "num_local_experts"},
        defaults={
            "num_key_value_heads": 16,
            "sliding_window": 4096,
            "num_local_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
        },
    ),
    "qwen3": Family(
        class_prefix="Qwen3",
        qk_norm=True,
        sliding=_upper_layers,
        must_be_false=("attention_bias",),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    ),
    "qwen3_moe": Family(
        class_prefix="Qwen3Moe",
        qk_norm=True,
        experts=_QWEN_EXPERTS,
        sliding=_if_switched_on,
        must_be_false=("attention_bias",),
        renamed={"num_experts": "num_local_experts"},
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3": Family(
        class_prefix="DeepseekV3",
        latent=True,
        experts=replace(_QWEN_EXPERTS, shared="shared_experts", biased=True),
        must_be_false=("attention_bias",),
        renamed={"n_routed_experts": "num_local_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        defaults={
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
        },
    ),
    "gpt_oss": Family(
        class_prefix="GptOss",
        qkv_bias=True,
        biases=True,
        sinks=True,
        experts=ExpertNames(
            block="mlp", gate="gate_up_proj", up="gate_up_proj", down="down_proj", router="router", stacked=True
        ),
        sliding=_every_other_layer,
        must_be_true=("attention_bias",),
        unquantise=(
            "dequantise them to bf16 first: transformers' from_pretrained(..., dtype='bfloat16', "
            "quantization_config=Mxfp4Config(dequantize=True)), then save_pretrained"
        ),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
        },
    ),
    "phi3": Family(class_prefix="Phi3", fused=True, partial_rotary=True, sliding=_every_layer),
    "nemotron": Family(
        class_prefix="Nemotron",
        gated=False,
        norm="layer1p",
        partial_rotary=True,
        must_be_false=("attention_bias", "mlp_bias"),
        renamed={"norm_eps": "rms_norm_eps"},
        defaults={"hidden_act": "relu2", "partial_rotary_factor": 0.5, "norm_eps": 1e-5},
    ),
    "gemma2": Family(
        class_prefix="Gemma2",
        sliding=_every_other_layer,
        defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        **_GEMMA,
    ),
    "gemma3_text": Family(
        class_prefix="Gemma3Text",
        qk_norm=True,
        sliding=_all_but_each_last,
        defaults={**_GEMMA_DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        **_GEMMA,
    ),
}
REFUSED: Mapping[str, str] = {
    "gemma3": "it reads images; save its language model alone (model_type gemma3_text) and train that",
    "deepseek_v2": "its router takes the best groups of experts by a rule of its own; supported is deepseek_v3",
    "llama4": "it reads images, and its layers mix chunked attention with layers without positions",
    "gemma": "it is Gemma 1; supported are gemma2 and gemma3_text",
    "phi": "it is Phi-1 or Phi-2; supported is phi3 (Phi-3, Phi-3.5, Phi-4)",
    "phimoe": "its router draws its experts one after the other (sparsemixer)",
}
"""Families that users ask for and that we do not support: why."""
