"""The keys of config.json that we read, as transformers 4 and transformers 5 spell them. No torch and no numpy."""

from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(gt=0)]


class HFRope(msgspec.Struct, kw_only=True):
    """The dict under rope_parameters (transformers 5) or rope_scaling (transformers 4)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: list[float] | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: float | None = None


class HFConfig(msgspec.Struct, kw_only=True):
    """The keys of config.json that we read; a default is the one that families share unless their row says other."""

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
    rope_local_base_freq: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Count | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool = False
    sliding_window_pattern: Count = 6
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    num_local_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count | None = None
    norm_topk_prob: bool = True
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: Count = 1
    shared_expert_intermediate_size: Count = 5632
    qkv_bias: bool = True
    q_lora_rank: Count | None = None
    kv_lora_rank: Count | None = None
    qk_nope_head_dim: Count | None = None
    qk_rope_head_dim: Count | None = None
    v_head_dim: Count | None = None
    rope_interleave: bool = True
    first_k_dense_replace: int = 0
    n_shared_experts: Count = 1
    n_group: Count = 1
    topk_group: Count = 1
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
