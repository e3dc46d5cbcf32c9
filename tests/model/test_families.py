"""What each family's config.json means: windows, rotary bases, experts; both spellings, and the published sizes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.errors import UserError
from rpo_megatron.model.families import Clamp
from rpo_megatron.model.layout import check_layout
from rpo_megatron.model.parts import Experts, Latent
from rpo_megatron.model.rope import RopeScaling
from rpo_megatron.model.shape import num_parameters
from rpo_megatron.planning.models import find_model
from tests.model.test_shape import LLAMA_31, QWEN_25, read

GEMMA_3 = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "sliding_window": 512,
    "vocab_size": 262144,
}


def test_gemma_3_in_both_styles(tmp_path: Path) -> None:
    """Rotary bases exchanged between windowed and full layers, stretching applied to both, or a pattern that begins
    with the full layer: google/gemma-3-1b-it as transformers 4 and as transformers 5 wrote it, stretched."""
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 10000, "rope_scaling": linear, "sliding_window_pattern": 6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    types = [f"{'full' if i % 6 == 5 else 'sliding'}_attention" for i in range(26)]
    new = {"rope_parameters": {"full_attention": {**linear, "rope_theta": 1e6}, "sliding_attention": local}}
    shape = read(tmp_path, GEMMA_3, **old)
    assert read(tmp_path, GEMMA_3, **new, layer_types=types) == shape
    assert (shape.full_layers, shape.sliding_window) == ((5, 11, 17, 23), 512)
    assert (shape.rope_theta, shape.local_rope_theta) == (1e6, 1e4)
    assert shape.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert (shape.tied_embeddings, shape.attention_scale, shape.qk_norm) == (True, 1 / 16, True)
    plain = read(tmp_path, GEMMA_3)
    assert (plain.rope_theta, plain.local_rope_theta, plain.rope_scaling) == (1e6, 1e4, None)


PHI_4_MINI = {
    "model_type": "phi3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 47 + [2.0], "long_factor": [3.0] * 48},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}


def test_longrope(tmp_path: Path) -> None:
    """The set of factors for long texts, a context in which they would be needed, or another attention factor than
    sqrt(1 + ln 32 / ln 4096) = 1.190238."""
    shape = read(tmp_path, PHI_4_MINI)
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.factors == (*[1.0] * 47, 2.0)
    assert shape.rope_scaling.attention_factor == pytest.approx(1.190238, abs=1e-6)
    assert (shape.max_positions, shape.rotary_dim, shape.sliding_window) == (4096, 96, 262144)


def test_experts(tmp_path: Path) -> None:
    """Qwen3-30B-A3B's key for the number of experts, in the spellings of transformers 4 and 5, not found; layers
    without experts counted from 1."""
    qwen = {**QWEN_25, "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True}
    for key in ("num_experts", "num_local_experts"):
        experts = read(tmp_path, qwen, **{key: 64, "mlp_only_layers": [3], "decoder_sparse_step": 2}).experts
        dense = (*range(0, 3, 2), 3, *range(4, 24, 2))
        assert experts == Experts(count=64, per_token=8, ffn_size=768, normalise=True, dense_layers=dense)


QWEN_15_MOE = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_shared_expert(tmp_path: Path) -> None:
    """Qwen/Qwen1.5-MoE-A2.7B: a shared expert of the routed ones' size, a gate that is not there, biases that the file
    says are not there, a window on other layers than transformers'."""
    shape = read(tmp_path, QWEN_15_MOE)
    expected = Experts(count=60, per_token=4, ffn_size=1408, normalise=False, shared_ffn_size=5632, shared_gate=True)
    assert (shape.experts, shape.qkv_bias, shape.sliding_window) == (expected, True, None)
    assert read(tmp_path, QWEN_15_MOE, qkv_bias=False).qkv_bias is False
    windows = read(tmp_path, QWEN_15_MOE, use_sliding_window=True)
    assert [windows.window(layer) for layer in (0, 1, 20, 21, 22, 23)] == [32768, None, 32768, None, None, None]
    with pytest.raises(UserError, match="5632 feed-forward columns of the shared expert"):
        check_layout(replace(shape, num_heads=48, num_kv_heads=48, ffn_size=48), tensor=3, pipeline=1)


def test_latent_attention_and_biased_routers() -> None:
    """deepseek-ai/DeepSeek-V3: rotated and other numbers of a head exchanged, mscale on the scores forgotten or taken
    once, both shared experts of Moonlight counted as one, groups of experts where there is one."""
    shape = find_model("deepseek-v3").shape
    assert shape.latent == Latent(
        query_rank=1536, kv_rank=512, plain_dim=128, rotary_dim=64, value_dim=128, interleaved=True
    )
    assert (shape.head_dim, shape.value_dim, shape.rotary_dim) == (192, 128, 64)
    assert shape.attention_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.attention_factor == 1.0
    routed: dict[str, Any] = {"normalise": True, "biased": True}
    assert shape.experts == Experts(
        **{"count": 256, "per_token": 8, "ffn_size": 2048, "dense_layers": (0, 1, 2), "shared_ffn_size": 2048},
        **{**routed, "groups": 8, "chosen_groups": 4, "scale": 2.5},
    )
    moonlight = find_model("moonlight-16b-a3b").shape
    assert moonlight.experts == Experts(
        **{"count": 64, "per_token": 6, "ffn_size": 1408, "dense_layers": (0,), "shared_ffn_size": 2816},
        **{**routed, "scale": 2.446},
    )
    assert moonlight.latent is not None
    assert moonlight.latent.query_rank is None
    assert moonlight.attention_scale == 192**-0.5


def test_deepseek_agrees_with_transformers(tmp_path: Path) -> None:
    """A default for a key left out that transformers reads otherwise."""
    transformers = pytest.importorskip("transformers")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps")
    bare = {key: QWEN_15_MOE[key] for key in sizes} | {"vocab_size": 509, "num_attention_heads": 128}
    ours = read(tmp_path, {"model_type": "deepseek_v3", **bare}, num_mtp_layers=1)
    theirs = transformers.DeepseekV3Config(**bare).to_dict()
    assert read(tmp_path, theirs, rope_interleave=True) == ours
    assert ours.further_layers == 1


GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"rope_type": "yarn", "truncate": False},
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def test_gpt_oss(tmp_path: Path) -> None:
    """openai/gpt-oss-20b: a window on the wrong half of the layers, a bias that is not there, sinks or the clamp
    forgotten; its quantised files taken, or refused without the way out."""
    shape = read(tmp_path, GPT_OSS_20B)
    assert shape.experts == Experts(count=32, per_token=4, ffn_size=2880, normalise=True)
    assert (shape.qkv_bias, shape.biases, shape.sinks, shape.clamp) == (True, True, True, Clamp(limit=7.0, alpha=1.702))
    assert [shape.window(layer) for layer in (0, 1, 22, 23)] == [128, None, 128, None]
    assert read(tmp_path, GPT_OSS_20B, layer_types=..., rope_scaling=..., rope_theta=..., swiglu_limit=...) == shape
    with pytest.raises(UserError, match="attention_bias=false is not supported for gpt_oss"):
        read(tmp_path, GPT_OSS_20B, attention_bias=False)
    with pytest.raises(UserError, match=r"dequantise them to bf16 first.*Mxfp4Config\(dequantize=True\)"):
        read(tmp_path, GPT_OSS_20B, quantization_config={"quant_method": "mxfp4"})


def test_window_rules(tmp_path: Path) -> None:
    """A window applied although Qwen's switch is off, dropped although it is on, or applied to every layer where
    only the upper ones have it."""
    assert read(tmp_path, QWEN_25).sliding_window is None
    assert read(tmp_path, QWEN_25, use_sliding_window=True).sliding_window is None  # 24 of 24 layers are full
    assert read(tmp_path, QWEN_25, use_sliding_window=True, max_window_layers=0).sliding_window == 32768
    upper = read(tmp_path, QWEN_25, use_sliding_window=True, max_window_layers=12)
    assert [upper.window(layer) for layer in (0, 11, 12, 23)] == [None, None, 32768, 32768]
    listed = ["sliding_attention", *["full_attention"] * 23]
    first = read(tmp_path, QWEN_25, use_sliding_window=True, layer_types=listed)
    assert [first.window(layer) for layer in (0, 1, 23)] == [32768, None, None]
    gemma2 = read(tmp_path, QWEN_25, model_type="gemma2")
    assert [gemma2.window(layer) for layer in range(4)] == [32768, None, 32768, None]
    assert read(tmp_path, QWEN_25, model_type="mistral").sliding_window == 32768
    assert read(tmp_path, QWEN_25, model_type="mistral", sliding_window=None).sliding_window is None
    assert read(tmp_path, QWEN_25, model_type="llama").sliding_window is None


def test_num_parameters_of_published_models(tmp_path: Path) -> None:
    """A weight of an expert, a router or a norm after a sublayer forgotten or counted twice: the totals in the hub's
    safetensors indices."""
    assert num_parameters(read(tmp_path, GEMMA_3)) == 999_885_952
    assert num_parameters(read(tmp_path, PHI_4_MINI)) == 3_836_021_760
    mixtral = {"model_type": "mixtral", "vocab_size": 32000, "rope_scaling": None}
    assert num_parameters(read(tmp_path, LLAMA_31, **mixtral)) == 46_702_792_704
    qwen = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
    qwen |= {"num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False}
    assert num_parameters(read(tmp_path, QWEN_25, **qwen)) == 30_532_122_624
    assert num_parameters(read(tmp_path, QWEN_15_MOE)) == 14_315_784_192
    assert num_parameters(read(tmp_path, GPT_OSS_20B)) == 20_914_757_184
    gemma2 = {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    gemma2 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000, "hidden_act": ...}
    assert num_parameters(read(tmp_path, QWEN_25, **gemma2)) == 2_614_341_888
