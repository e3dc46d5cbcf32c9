"""The model families we train: the keys of config.json that we read, and what differs from one model_type to the next.

A new family of the Llama kind is a row of FAMILIES. No torch and no numpy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from rpo_megatron.errors import UserError

Count = Annotated[int, msgspec.Meta(gt=0)]


class HFRope(msgspec.Struct, kw_only=True):
    """The dict under rope_parameters (transformers 5) or rope_scaling (transformers 4)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: float | None = None


class HFConfig(msgspec.Struct, kw_only=True):
    """The keys of config.json that we read; a default is the one all supported families share."""

    model_type: str
    architectures: list[str] | None = None
    id2label: dict[str, Any] | None = None
    num_labels: int | None = None
    pad_token_id: int | None = None
    num_hidden_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Count
    vocab_size: Count
    max_position_embeddings: Count
    rms_norm_eps: float
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    dtype: str | None = None
    torch_dtype: str | None = None
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Count | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None


def _full_attention(config: HFConfig) -> int | None:
    return None


def _same_window_everywhere(config: HFConfig) -> int | None:
    return config.sliding_window


def _window_of_upper_layers(config: HFConfig) -> int | None:
    """Qwen's rule: only with use_sliding_window, and only from layer max_window_layers on."""
    if not config.use_sliding_window or config.sliding_window is None:
        return None
    layers = range(config.num_hidden_layers)
    kinds = config.layer_types or [("full", "sliding")[i >= config.max_window_layers] + "_attention" for i in layers]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return config.sliding_window
    raise UserError(
        f"use_sliding_window is true with max_window_layers={config.max_window_layers}: layers that mix full and "
        "sliding attention are not supported; supported are all layers full, or all layers sliding"
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes one model_type from the others."""

    class_prefix: str
    """Of the names of transformers' classes, e.g. Llama in LlamaForCausalLM."""
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Callable[[HFConfig], int | None] = _full_attention
    must_be_false: tuple[str, ...] = ()
    """Keys of config.json that this family reads and that we support only when they are false."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json leaves out."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(class_prefix="Llama", must_be_false=("attention_bias", "mlp_bias")),
    "mistral": Family(
        class_prefix="Mistral",
        window=_same_window_everywhere,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        class_prefix="Qwen2",
        qkv_bias=True,
        window=_window_of_upper_layers,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        class_prefix="Qwen3",
        qk_norm=True,
        window=_window_of_upper_layers,
        must_be_false=("attention_bias",),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    ),
}
