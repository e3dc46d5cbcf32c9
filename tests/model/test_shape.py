"""config.json -> ModelShape, and the sizes that follow from it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.errors import UserError
from rpo_megatron.model.families import FAMILIES
from rpo_megatron.model.rope import RopeScaling
from rpo_megatron.model.shape import ModelShape, num_parameters, padded_vocab, read_shape

# meta-llama/Llama-3.1-8B as transformers 4 wrote it.
LLAMA_31: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_31_SHAPE = ModelShape(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    vocab_size=128256,
    tied_embeddings=False,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    ),
    qkv_bias=False,
    qk_norm=False,
    max_positions=131072,
    sliding_window=None,
    dtype="bfloat16",
)
# Qwen/Qwen2.5-0.5B: kv bias, tied, a window that is switched off.
QWEN_25 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


REWARD = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


def read(tmp_path: Path, config: dict[str, Any], **changes: Any) -> ModelShape:
    merged = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(merged))
    return read_shape(tmp_path)


def test_transformers_4_style(tmp_path: Path) -> None:
    """A field read from the wrong key of an old config."""
    assert read(tmp_path, LLAMA_31) == LLAMA_31_SHAPE


def test_transformers_5_style(tmp_path: Path) -> None:
    """rope_theta or the scaling lost when they moved into rope_parameters (a model that trains, but worse)."""
    rope = {**LLAMA_31["rope_scaling"], "rope_theta": 500000.0}
    new = {"rope_parameters": rope, "dtype": "bfloat16", "rope_scaling": ..., "rope_theta": ..., "torch_dtype": ...}
    assert read(tmp_path, LLAMA_31, **new) == LLAMA_31_SHAPE


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"phi3", "gemma3_text", "deepseek_v3"}))
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling"])
def test_agrees_with_transformers(tmp_path: Path, family: str, style: str) -> None:
    """Any value, in particular a default for a key left out, that transformers reads otherwise."""
    transformers = pytest.importorskip("transformers")
    bare = {k: LLAMA_31[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")}
    bare |= {"vocab_size": 509, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "model_type": family}
    bare |= {style: {"type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    bare |= {"max_window_layers": 1 if family == "qwen2_moe" else 0}  # windows above it, or up to it
    for changes in ({}, {"use_sliding_window": True}, {"head_dim": 64, "num_key_value_heads": 4, "rope_theta": 3.0}):
        ours = read(tmp_path, bare, **changes)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads or 32, head_dim)
        assert (ours.rope_theta, ours.rope_scaling) == (
            theirs.rope_parameters["rope_theta"],
            RopeScaling(kind="linear", factor=theirs.rope_parameters["factor"]),
        )
        assert ours.tied_embeddings == theirs.tie_word_embeddings
        assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or None)
        assert ours.rotary_dim == (head_dim // 2 if family == "nemotron" else None)
        assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
        assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
        if ours.experts is not None:
            count, chosen = ours.experts.count, ours.experts.per_token
            their_count = getattr(theirs, "num_local_experts", None) or theirs.num_experts
            assert (count, chosen) == (their_count, theirs.num_experts_per_tok)
            assert ours.experts.shared_ffn_size == getattr(theirs, "shared_expert_intermediate_size", 0)
            assert ours.experts.normalise == getattr(theirs, "norm_topk_prob", True)
            assert ours.experts.ffn_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)


def test_very_old_llama(tmp_path: Path) -> None:
    """Llama 1 configs, which lack kv heads, rope_theta, tie_word_embeddings and biases, refused or misread."""
    left_out = (
        "num_key_value_heads",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    )
    shape = read(tmp_path, LLAMA_31, **dict.fromkeys((*left_out, "torch_dtype"), ...))
    assert (shape.num_kv_heads, shape.rope_theta, shape.rope_scaling) == (32, 10000.0, None)
    assert (shape.tied_embeddings, shape.dtype) == (False, "float32")


def test_llama3_context_defaults_to_max_positions(tmp_path: Path) -> None:
    """A missing original_max_position_embeddings, which transformers takes from max_position_embeddings."""
    rope = {k: v for k, v in LLAMA_31["rope_scaling"].items() if k != "original_max_position_embeddings"}
    scaling = read(tmp_path, LLAMA_31, rope_scaling=rope).rope_scaling
    assert scaling is not None
    assert scaling.original_max_positions == 131072


def test_stories_model(shared: Path) -> None:
    """A file that transformers 5 really wrote: rope_parameters without scaling, dtype, an explicit head_dim."""
    shape = read_shape(shared / "models" / "stories260K")
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (5, 8, 4, 8)
    assert (shape.rope_theta, shape.rope_scaling, shape.dtype) == (10000.0, None, "float32")
    assert num_parameters(shape) == 260032


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_models_as_transformers_writes_them(tmp_path: Path, family: str) -> None:
    """A reward model taken for a language model (whose output layer is then missing), or a label count that
    transformers keeps under another key."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(family, num_labels=1, pad_token_id=3, vocab_size=16, **sizes)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert (read_shape(tmp_path).head, read_shape(tmp_path).pad_token) == ("value", 3)


def test_head_of_other_configs(tmp_path: Path) -> None:
    """A label count of an older file not found, a language model's idle label keys taken seriously, a padding token
    of -1, which stands for none, taken for the last word."""
    assert read(tmp_path, LLAMA_31, **REWARD).head == "value"
    assert read(tmp_path, LLAMA_31, **{**REWARD, "id2label": ..., "num_labels": 1}).head == "value"
    for architectures in (["LlamaForCausalLM"], [], None, ...):
        assert read(tmp_path, LLAMA_31, architectures=architectures, num_labels=2).head == "lm"
    assert [read(tmp_path, LLAMA_31, pad_token_id=pad).pad_token for pad in (0, 5, -1, None)] == [0, 5, None, None]


# ------------------------------------------------------------------------------------------------ refusals

DEEPSEEK = {"model_type": "deepseek_v3", "num_key_value_heads": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "deepseek_v2"},
            r"model_type 'deepseek_v2' .*\(.*groups of experts.*supported are llama, mistral",
        ),
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported; supported are llama, mistral"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": ...}, "model_type 'None'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*silu, gelu_pytorch_tanh, relu2"),
        ({"model_type": "gemma2", "hidden_act": "silu", "hidden_activation": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "1 layers, num_hidden_layers says 32"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["x"] * 32}, "layer_types 'x'.*supported"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8 experts"),
        (
            {"model_type": "nemotron", "partial_rotary_factor": 0.29, "rope_scaling": None},
            "0.29 of head_dim=128 is no even",
        ),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}}, "1 factors for 64 frequencies"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "'longrope' needs 'short_factor'"),
        ({"model_type": "gemma3_text", "rope_scaling": None, "rope_parameters": {"x": {}}}, "rope_parameters.x is not"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"type": "linear"}}},
            "in sliding_attention",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs 'factor'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'.*default, linear, llama3, longrope, yarn"),
        ({"model_type": "deepseek_v3"}, "num_key_value_heads=8 must be num_attention_heads"),
        ({**DEEPSEEK, "v_head_dim": 193}, "v_head_dim=193 is more than the 192 numbers of a key"),
        ({**DEEPSEEK, "qk_rope_head_dim": 63}, "qk_rope_head_dim=63"),
        ({**DEEPSEEK, "norm_topk_prob": False}, "norm_topk_prob=true"),
        ({**DEEPSEEK, "n_group": 7}, "n_group=7, topk_group=4: 8 of 256 experts"),
        ({**DEEPSEEK, "topk_group": 2}, "by its best two, megatron by its best 4"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs 'low_freq_factor'"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "layer to layer"),
        ({"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_hidden_layers": "32"}, r"Expected `int`, got `str` - at `\$.num_hidden_layers`"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 5}, "no multiple of 5 kv heads"),
        ({"num_attention_heads": 24}, "no head_dim"),
        ({**REWARD, "id2label": ...}, "LlamaForSequenceClassification with 2 labels"),
        ({**REWARD, "id2label": ..., "num_labels": 5}, "with 5 labels.*a reward model has 1"),
        ({**REWARD, "id2label": {"0": "bad", "1": "good"}}, "with 2 labels"),
    ],
)
def test_unsupported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A model that would load and compute something else than transformers does, or a message without the key."""
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, LLAMA_31, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_config_file_missing_or_malformed(tmp_path: Path) -> None:
    """A traceback instead of a message."""
    with pytest.raises(UserError, match="not a Hugging Face model directory"):
        read_shape(tmp_path / "nowhere")
    for text, message in (('{"model_type": ', "not valid JSON"), ("[1]", "JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_shape(tmp_path)


# ------------------------------------------------------------------------------------------------ sizes


def test_num_parameters_of_published_models(tmp_path: Path) -> None:
    """A weight forgotten or counted twice: the totals in the hub's safetensors indices."""
    assert num_parameters(LLAMA_31_SHAPE) == 8_030_261_248
    assert num_parameters(read(tmp_path, QWEN_25)) == 494_032_768
    # reward models: the output layer (or, tied, nothing) gives way to one row
    assert num_parameters(replace(LLAMA_31_SHAPE, head="value")) == 8_030_261_248 - 128256 * 4096 + 4096
    assert num_parameters(replace(read(tmp_path, QWEN_25), head="value")) == 494_032_768 + 896


@pytest.mark.parametrize(("vocab", "padded"), [(1, 128), (128, 128), (129, 256), (509, 512), (128256, 128256)])
def test_padded_vocab(vocab: int, padded: int) -> None:
    """Rounding down, or padding a multiple once more."""
    assert padded_vocab(replace(LLAMA_31_SHAPE, vocab_size=vocab)) == padded


def test_imports_no_torch() -> None:
    """`rpo config` waiting seconds for torch because a module under it imports torch or numpy."""
    code = "import sys, rpo_megatron.model.layout; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
