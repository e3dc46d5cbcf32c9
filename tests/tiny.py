"""Tiny models and stores for tests: made in the test, no download, no tokenizer needed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rpo_megatron.config import RunConfig
from rpo_megatron.config_io import load
from rpo_megatron.data.manifest import TokenizerInfo
from rpo_megatron.data.writer import StoreWriter
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.table import hf_tensors

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 131,  # odd, so that the vocabulary is padded
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "hidden_act": ..., "tie_word_embeddings": True, "pad_token_id": 0}
YARN = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 0.5},
    **{"mscale": 1.0, "mscale_all_dim": 0.7},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mixtral": {"model_type": "mixtral", **EXPERTS},
    "qwen2": QWEN2,
    "qwen3": {**QWEN3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3_moe": {
        **{"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
    },
    "qwen2_moe": {
        **{"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 24, "mlp_only_layers": [2], "use_sliding_window": True},
        **{"sliding_window": 7, "max_window_layers": 2},
    },
    "deepseek_v3": {
        **{"model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_shared_experts": 2},
        **{"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
        **{"q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10},
        **{"routed_scaling_factor": 1.5, "rope_scaling": YARN, "rms_norm_eps": 1e-3},
    },
    "gpt_oss": {
        **{"model_type": "gpt_oss", "head_dim": 16, **EXPERTS, "sliding_window": 7, "swiglu_limit": 0.5},
        **{"rope_scaling": {**YARN, "truncate": False}},
    },
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "nemotron": {"model_type": "nemotron", "norm_eps": 1e-5, "hidden_act": "relu2", "head_dim": 8},
    "gemma2": {
        **{"model_type": "gemma2", "sliding_window": 7, **GEMMA},
        **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    },
    "gemma3_text": {
        **{"model_type": "gemma3_text", "sliding_window": 7, "sliding_window_pattern": 2, **GEMMA},
        **{"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    },
}
"""One model of each family, with what the family has beyond the others made to matter: a soft-cap or window that is
never reached would hide a mistake. Keys of ... are left out."""


def write_model(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face directory with random fp32 weights, large enough that attention and logits are far from flat."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in hf_tensors(read_shape(directory)).items():
        noise = torch.randn(size, generator=generator)
        tensors[name] = 1 + 0.1 * noise if name.endswith("norm.weight") else 0.15 * noise
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_store(
    prefix: Path,
    *,
    num_groups: int,
    seed: int = 0,
    max_responses: int = 4,
    rewards: bool = True,
    columns: tuple[str, ...] = (),
    source_column: str | None = None,
) -> str:
    """Random groups of 2 to `max_responses` responses, with rewards in [0, 1], further columns likewise, and a source
    column that is 1 for every other response."""
    rng = np.random.default_rng(seed)
    info = TokenizerInfo(path="none", fingerprints={}, vocab_size=LLAMA["vocab_size"], bos_id=1, eos_id=2)
    with StoreWriter(str(prefix), tokenizer=info) as writer:
        for _ in range(num_groups):
            k = int(rng.integers(2, max_responses + 1))
            writer.add(
                rng.integers(3, 131, size=rng.integers(2, 12)),
                [rng.integers(3, 131, size=rng.integers(1, 14)) for _ in range(k)],
                rng.random(k).astype(np.float32) if rewards else None,
                {name: rng.random(k).astype(np.float32) for name in columns}
                | ({source_column: np.arange(k) % 2} if source_column else {}),
            )
        writer.finish()
    return str(prefix)


def run_config(directory: Path, *overrides: str) -> RunConfig:
    """A small fp32 run on the model and store in `directory` (model/, train), made if they are not there."""
    if not (directory / "model" / "config.json").exists():
        write_model(directory / "model")
    if not (directory / "train.json").exists():
        write_store(directory / "train", num_groups=12)
    base = [
        f"run_dir={directory / 'run'}",
        f"model.path={directory / 'model'}",
        f"data.train={directory / 'train'}",
        "data.tokens_per_microbatch=96",
        "objective.method=rpo_bwd",
        "objective.beta=0.5",
        "objective.eta=3.0",
        "optimizer.lr=0.01",
        "train.steps=3",
        "train.groups_per_step=6",
        "precision=fp32",
        "logging.tensorboard=false",
    ]
    return load(RunConfig, None, [*base, *overrides])
