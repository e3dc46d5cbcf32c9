"""What a Hugging Face config.json says about a model, as numbers: read and counted.

No torch and no numpy: `rpo config` reads this before anything is loaded. Both spellings of
config.json are understood, that of transformers 4 (rope_theta, rope_scaling, torch_dtype) and that of transformers 5
(rope_parameters, dtype). What we cannot compute exactly as transformers does is refused by name.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from rpo_megatron.errors import UserError, nearest
from rpo_megatron.model.families import ACTIVATIONS, FAMILIES, REFUSED, Activation, Clamp, Family, Norm
from rpo_megatron.model.hf_config import HFConfig
from rpo_megatron.model.parts import Experts, Latent, read_experts, read_latent
from rpo_megatron.model.rope import Rope, RopeScaling, read_rope

VOCAB_MULTIPLE = 128
Head = Literal["lm", "value"]
"""`lm`: an output layer over the vocabulary. `value`: a reward model, one number per response."""
VALUE_ARCHITECTURE = "ForSequenceClassification"
"""How the names of transformers' reward model classes end."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    family: str
    """Hugging Face's model_type, a key of FAMILIES."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Need not be hidden_size / num_heads."""
    ffn_size: int
    vocab_size: int
    """As in the files; `padded_vocab` is what the model is built with."""
    tied_embeddings: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    sliding_window: int | None
    """Layers attend to this many last tokens, except for `full_layers`; None is full attention everywhere."""
    dtype: str
    """torch's name of the dtype that config.json declares; float32 where it declares none."""
    head: Head = "lm"
    pad_token: int | None = None
    """The token that transformers passes over when it looks for a response's last one (see heads.pooled_position)."""
    full_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that see everything although there is a `sliding_window`."""
    rotary_dim: int | None = None
    """How many numbers of a head are rotated, the first ones; None is all."""
    local_rope_theta: float | None = None
    """Base of rotary frequencies, which are then not stretched, in the layers with a window; None is `rope_theta`."""
    attention_scale: float | None = None
    """Factor of query . key; None is head_dim^-0.5."""
    attention_softcap: float | None = None
    """Attention scores s become softcap * tanh(s / softcap)."""
    logit_softcap: float | None = None
    """Logits, likewise."""
    activation: Activation = "silu"
    gated: bool = True
    norm: Norm = "rms"
    post_norms: bool = False
    """Attention and feed-forward layer each have a norm of their result, too."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of hidden_size."""
    experts: Experts | None = None
    latent: Latent | None = None
    further_layers: int = 0
    """Layers that the files may have beyond the last, which predict more than the next token: left out."""
    biases: bool = False
    """Every matrix of a layer has one, also the router's and the experts'."""
    sinks: bool = False
    """In attention's softmax every head has one more term, which is learned and has no value (model/sinks.py)."""
    clamp: Clamp | None = None
    """In place of silu(gate) * up."""

    @property
    def value_dim(self) -> int:
        """Of a head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    def window(self, layer: int) -> int | None:
        """How many last tokens layer `layer`, counted from 0, attends to; None is all."""
        return None if layer in self.full_layers else self.sliding_window

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer not in self.experts.dense_layers


# ------------------------------------------------------------------------------------------------ config.json


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json as it stands. Raises UserError if it is missing or is not a JSON object."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{path}' does not exist: '{directory}' is not a Hugging Face model directory") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold a JSON object, found a {type(config).__name__}")
    return config


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory, from its config.json alone.

    Raises UserError naming the key for a missing or malformed value, and for every architecture, activation, rotary
    kind, bias or quantisation that is not supported.
    """
    raw = read_config(directory)
    try:
        return _shape(raw)
    except (UserError, msgspec.ValidationError) as error:
        raise UserError(f"{Path(directory) / 'config.json'}: {error}") from None


def _shape(raw: dict[str, Any]) -> ModelShape:
    family = _family(raw)
    config = msgspec.convert(_renamed({**family.defaults, **raw}, family), type=HFConfig)
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act '{config.hidden_act}' is not supported; supported are {', '.join(ACTIVATIONS)}")
    num_kv_heads = config.num_key_value_heads or config.num_attention_heads
    if config.num_attention_heads % num_kv_heads:
        raise UserError(f"num_attention_heads={config.num_attention_heads} is no multiple of {num_kv_heads} kv heads")
    rope, full, latent = read_rope(config), _full_layers(config, family), read_latent(config, family)
    head_dim = _head_dim(config) if latent is None else latent.plain_dim + latent.rotary_dim
    scale = None if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar**-0.5
    return ModelShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        qkv_bias=family.qkv_bias and config.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=_max_positions(config, rope),
        sliding_window=config.sliding_window if len(full) < config.num_hidden_layers else None,
        dtype=config.dtype or config.torch_dtype or "float32",
        head=_head(config),
        pad_token=config.pad_token_id if (config.pad_token_id or 0) >= 0 else None,
        full_layers=full if len(full) < config.num_hidden_layers else (),
        rotary_dim=_rotary_dim(head_dim, rope, family) if latent is None else latent.rotary_dim,
        local_rope_theta=rope.local_theta,
        attention_scale=scale if latent is None else rope.score_factor * head_dim**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        logit_softcap=config.final_logit_softcapping,
        activation=ACTIVATIONS[config.hidden_act],
        gated=family.gated,
        norm=family.norm,
        post_norms=family.post_norms,
        scaled_embedding=family.scaled_embedding,
        biases=family.biases,
        sinks=family.sinks,
        clamp=None if config.swiglu_limit is None else Clamp(limit=config.swiglu_limit, alpha=config.swiglu_alpha),
        experts=read_experts(config, family),
        latent=latent,
        further_layers=config.num_nextn_predict_layers,
    )


def _renamed(raw: dict[str, Any], family: Family) -> dict[str, Any]:
    """With the keys that have a name of the family's own under those of HFConfig."""
    own = {ours: raw[theirs] for theirs, ours in family.renamed.items() if raw.get(theirs) is not None}
    if raw.get("use_sliding_window") is False and raw.get("sliding_window") == 0:  # so transformers writes Qwen2-MoE's
        own["sliding_window"] = None
    return {**raw, **own}


def _head_dim(config: HFConfig) -> int:
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size={config.hidden_size} is no multiple of num_attention_heads={config.num_attention_heads}, "
            "and there is no head_dim"
        )
    return config.head_dim or config.hidden_size // config.num_attention_heads


def _rotary_dim(head_dim: int, rope: Rope, family: Family) -> int | None:
    if rope.fraction != 1.0 and not family.partial_rotary:
        raise UserError("partial_rotary_factor other than 1 is not supported: all of head_dim must be rotated")
    size = int(head_dim * rope.fraction)
    if size < 1 or size % 2:
        raise UserError(f"partial_rotary_factor={rope.fraction} of head_dim={head_dim} is no even number of dimensions")
    factors = rope.scaling.factors if rope.scaling is not None else None
    if factors is not None and len(factors) != size // 2:
        raise UserError(f"short_factor has {len(factors)} factors for {size // 2} frequencies")
    return None if size == head_dim else size


def _max_positions(config: HFConfig, rope: Rope) -> int:
    if rope.scaling is not None and rope.scaling.kind == "longrope":
        assert rope.scaling.original_max_positions is not None
        return min(config.max_position_embeddings, rope.scaling.original_max_positions)
    return config.max_position_embeddings


def _full_layers(config: HFConfig, family: Family) -> tuple[int, ...]:
    """Layers that attend to everything."""
    sliding = set(family.sliding(config) if config.sliding_window is not None else ())
    return tuple(i for i in range(config.num_hidden_layers) if i not in sliding)


def _head(config: HFConfig) -> Head:
    if not (config.architectures and config.architectures[0].endswith(VALUE_ARCHITECTURE)):
        return "lm"
    labels = len(config.id2label or {}) or config.num_labels or 2  # transformers writes no key for 2
    if labels != 1:
        raise UserError(
            f"{config.architectures[0]} with {labels} labels (id2label, num_labels) is not supported: a reward model "
            f"has 1"
        )
    return "value"


def _family(raw: dict[str, Any]) -> Family:
    name = str(raw.get("model_type"))
    if name not in FAMILIES:
        why = f" ({REFUSED[name]})" if name in REFUSED else ""
        hint = "" if why else nearest(name, FAMILIES)
        raise UserError(f"model_type '{name}' is not supported{why}; supported are {', '.join(FAMILIES)}{hint}")
    family = FAMILIES[name]
    refused = [key for key in family.must_be_false if raw.get(key)]
    refused += [key for key in family.must_be_true if not raw.get(key, True)]
    if refused:
        raise UserError(f"{refused[0]}={json.dumps(raw[refused[0]])} is not supported for {name}")
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            raise UserError(f"{key}: quantised weights cannot be trained; {family.unquantise}")
    return family


# ------------------------------------------------------------------------------------------------ sizes that follow


def padded_vocab(shape: ModelShape) -> int:
    """Vocabulary rows the model is built with: the next multiple of 128 whatever the layout, so that a checkpoint
    loads under any tensor parallel size that divides it."""
    return math.ceil(shape.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def num_parameters(shape: ModelShape) -> int:
    """Trained numbers, without vocabulary padding; tied embeddings count once."""
    norm = shape.hidden_size * (2 if shape.norm == "layer1p" else 1)
    norms = (4 if shape.post_norms else 2) * norm + (2 * shape.head_dim if shape.qk_norm else 0)
    layers = shape.num_layers * (_attention(shape) + norms)
    layers += sum(_feed_forward(shape, layer) for layer in range(shape.num_layers))
    embedding = shape.vocab_size * shape.hidden_size
    head = shape.hidden_size if shape.head == "value" else 0 if shape.tied_embeddings else embedding
    return embedding + layers + norm + head


def _attention(shape: ModelShape) -> int:
    """Trained numbers of a layer's attention; of its norms, those inside latent attention."""
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    latent, hidden = shape.latent, shape.hidden_size
    if latent is None:
        biases = (query + 2 * key_value if shape.qkv_bias else 0) + hidden * shape.biases
        return hidden * (2 * query + 2 * key_value) + biases + shape.num_heads * shape.sinks
    made = query * (hidden if latent.query_rank is None else latent.query_rank)
    made += shape.num_heads * (latent.kv_rank * (latent.plain_dim + latent.value_dim) + hidden * latent.value_dim)
    return made + hidden * latent.width + (latent.query_rank or 0) + latent.kv_rank


def _feed_forward(shape: ModelShape, layer: int) -> int:
    """Trained numbers of a layer's feed-forward part."""
    per_column = (3 if shape.gated else 2) * shape.hidden_size + 2 * shape.biases
    if not shape.has_experts(layer):
        return per_column * shape.ffn_size
    experts = shape.experts
    assert experts is not None
    shared = per_column * experts.shared_ffn_size + shape.hidden_size * experts.shared_gate
    beside = shape.hidden_size + (shape.hidden_size + 1) * shape.biases  # the router; biases of its and of the result
    return experts.count * (per_column * experts.ffn_size + beside) + shared
