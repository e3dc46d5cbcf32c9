"""What a Hugging Face config.json says about a model, as numbers: read, checked against a layout, counted.

No torch and no numpy: `rpo config` reads this to check a layout before anything is loaded. Both spellings of
config.json are understood, that of transformers 4 (rope_theta, rope_scaling, torch_dtype) and that of transformers 5
(rope_parameters, dtype). What we cannot compute exactly as transformers does is refused by name.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from rpo_megatron.errors import UserError, nearest
from rpo_megatron.model.families import FAMILIES, Family, HFConfig, HFRope

VOCAB_MULTIPLE = 128
Head = Literal["lm", "value"]
"""`lm`: an output layer over the vocabulary. `value`: a reward model, one number per response."""
VALUE_ARCHITECTURE = "ForSequenceClassification"
"""How the names of transformers' reward model classes end."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts."""

    kind: Literal["llama3", "linear"]
    factor: float
    """Frequencies (or, for llama3, the low ones) are divided by this."""
    low_freq_factor: float | None = None
    """llama3 only: wavelengths above original_max_positions / low_freq_factor are stretched fully."""
    high_freq_factor: float | None = None
    """llama3 only: wavelengths below original_max_positions / high_freq_factor are left alone."""
    original_max_positions: int | None = None
    """llama3 only: the context length of pretraining, in tokens."""


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
    """Every layer attends to this many last tokens; None is full attention."""
    dtype: str
    """torch's name of the dtype that config.json declares; float32 where it declares none."""
    head: Head = "lm"
    pad_token: int | None = None
    """The token that transformers passes over when it looks for a response's last one (see heads.pooled_position)."""


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
    config = msgspec.convert({**family.defaults, **raw}, type=HFConfig)
    if config.hidden_act != "silu":
        raise UserError(f"hidden_act '{config.hidden_act}' is not supported; supported is silu")
    num_kv_heads = config.num_key_value_heads or config.num_attention_heads
    if config.num_attention_heads % num_kv_heads:
        raise UserError(f"num_attention_heads={config.num_attention_heads} is no multiple of {num_kv_heads} kv heads")
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size={config.hidden_size} is no multiple of num_attention_heads={config.num_attention_heads}, "
            "and there is no head_dim"
        )
    theta, scaling = _rope(config)
    return ModelShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=config.max_position_embeddings,
        sliding_window=family.window(config),
        dtype=config.dtype or config.torch_dtype or "float32",
        head=_head(config),
        pad_token=config.pad_token_id if (config.pad_token_id or 0) >= 0 else None,
    )


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
        hint = nearest(name, FAMILIES)
        raise UserError(f"model_type '{name}' is not supported; supported are {', '.join(FAMILIES)}{hint}")
    for key in FAMILIES[name].must_be_false:
        if raw.get(key):
            raise UserError(f"{key}=true is not supported for {name}: only models without these biases are")
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            raise UserError(f"{key}: quantised weights cannot be trained; use the unquantised model")
    return FAMILIES[name]


def _rope(config: HFConfig) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). transformers 5 keeps both in rope_parameters; an old rope_scaling wins, as it does there."""
    raw = config.rope_scaling or config.rope_parameters or {}
    if any(isinstance(value, dict) for value in raw.values()):
        raise UserError("rope_parameters that differ from layer to layer are not supported")
    rope = msgspec.convert(raw, type=HFRope)
    theta = rope.rope_theta or config.rope_theta
    kind = rope.rope_type or rope.type or "default"
    if (rope.partial_rotary_factor or config.partial_rotary_factor or 1.0) != 1.0:
        raise UserError("partial_rotary_factor other than 1 is not supported: all of head_dim must be rotated")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(f"rope type '{kind}' is not supported; supported are default, linear, llama3")
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    for key in needed:
        if getattr(rope, key) is None:
            raise UserError(f"rope type '{kind}' needs '{key}', which is missing")
    assert rope.factor is not None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=rope.factor)
    return theta, RopeScaling(
        kind="llama3",
        factor=rope.factor,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        original_max_positions=config.original_max_position_embeddings
        or rope.original_max_position_embeddings
        or config.max_position_embeddings,
    )


# ------------------------------------------------------------------------------------------------ sizes that follow


def padded_vocab(shape: ModelShape) -> int:
    """Vocabulary rows the model is built with: the next multiple of 128 whatever the layout, so that a checkpoint
    loads under any tensor parallel size that divides it."""
    return math.ceil(shape.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def num_parameters(shape: ModelShape) -> int:
    """Trained numbers, without vocabulary padding; tied embeddings count once."""
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = shape.hidden_size * (2 * query + 2 * key_value)
    biases = (query + 2 * key_value) if shape.qkv_bias else 0
    norms = 2 * shape.hidden_size + (2 * shape.head_dim if shape.qk_norm else 0)
    layer = attention + biases + norms + 3 * shape.hidden_size * shape.ffn_size
    embedding = shape.vocab_size * shape.hidden_size
    head = shape.hidden_size if shape.head == "value" else 0 if shape.tied_embeddings else embedding
    return embedding + shape.num_layers * layer + shape.hidden_size + head


def check_layout(shape: ModelShape, *, tensor: int, pipeline: int, context: int = 1) -> None:
    """Raise UserError, with the nearest sizes that work, if the model cannot be split over tensor x pipeline x context
    ranks."""
    split = {
        "heads": shape.num_heads,
        "kv heads": shape.num_kv_heads,
        "feed-forward columns": shape.ffn_size,
        "rows of the padded vocabulary": padded_vocab(shape),
    }
    _check_divides("parallel.tensor", tensor, split)
    _check_divides("parallel.context", context, {"heads of a tensor rank": shape.num_heads // tensor})
    kv_heads = shape.num_kv_heads // tensor
    if kv_heads % context and context % kv_heads:
        raise UserError(
            f"parallel.context={context} and the {kv_heads} kv heads of a tensor rank: one must be a multiple of the "
            f"other; take another parallel.context or parallel.tensor"
        )
    if not 1 <= pipeline <= shape.num_layers:
        raise UserError(f"parallel.pipeline={pipeline} must be from 1 to the model's {shape.num_layers} layers")


def stage_layers(shape: ModelShape, pipeline: int) -> tuple[int, ...]:
    """Layers of each pipeline stage. When they cannot be equal, all stages between the first and the last are (which is
    what megatron offers), the slowest stage is as small as possible, and the last, which also has the output layer, is
    the smallest."""

    def split(middle: int) -> tuple[int, ...]:
        ends = shape.num_layers - (pipeline - 2) * middle
        return (ends - ends // 2, *[middle] * (pipeline - 2), ends // 2)

    if pipeline == 1:
        return (shape.num_layers,)
    candidates = [split(middle) for middle in range(1, shape.num_layers + 1)]
    return min((stages for stages in candidates if min(stages) > 0), key=lambda stages: (max(stages), stages[-1]))


def _check_divides(key: str, size: int, counts: Mapping[str, int]) -> None:
    broken = [f"{count} {what}" for what, count in counts.items() if size < 1 or count % size]
    if not broken:
        return
    common = math.gcd(*counts.values())
    works = [n for n in range(1, common + 1) if common % n == 0]
    below, above = [n for n in works if n < size][-1:], [n for n in works if n > size][:1]
    raise UserError(
        f"{key}={size} does not divide the model's {', '.join(broken)}; "
        f"nearest that works: {' or '.join(map(str, below + above))}"
    )
