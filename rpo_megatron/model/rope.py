"""What config.json says about rotary positions: base, stretching for long contexts, which numbers of a head turn.

No torch and no numpy. transformers 5 keeps everything in rope_parameters, transformers 4 in keys of their own
(rope_theta, rope_scaling, rope_local_base_freq, partial_rotary_factor); both are read. What we cannot compute exactly
as transformers does is refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from rpo_megatron.errors import UserError
from rpo_megatron.model.hf_config import HFConfig, HFRope

KINDS = ("default", "linear", "llama3", "longrope", "yarn")
NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor",),
    "yarn": ("factor",),
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts."""

    kind: Literal["llama3", "linear", "longrope", "yarn"]
    factor: float
    """Frequencies (or, for llama3 and yarn, the low ones) are divided by this."""
    low_freq_factor: float | None = None
    """llama3 only: wavelengths above original_max_positions / low_freq_factor are stretched fully."""
    high_freq_factor: float | None = None
    """llama3 only: wavelengths below original_max_positions / high_freq_factor are left alone."""
    original_max_positions: int | None = None
    """llama3, longrope and yarn: the context length of pretraining, in tokens."""
    factors: tuple[float, ...] | None = None
    """longrope only: what each frequency is divided by, in texts up to original_max_positions (`short_factor`)."""
    attention_factor: float = 1.0
    """longrope and yarn: rotated numbers of queries and keys are multiplied by this."""
    most_turns: float | None = None
    """yarn only (`beta_fast`): what turns more often within original_max_positions is left alone."""
    least_turns: float | None = None
    """yarn only (`beta_slow`): what turns less often is stretched fully."""
    whole_dimensions: bool = True
    """yarn only (`truncate`): both borders are rounded to dimensions."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    theta: float
    scaling: RopeScaling | None
    local_theta: float | None
    """Base in the layers with a window, where it is another one (and nothing is stretched); None where it is not."""
    fraction: float
    """Share of a head's numbers that are rotated, the first ones."""
    score_factor: float = 1.0
    """Of query . key, in families that read mscale_all_dim."""


def read_rope(config: HFConfig) -> Rope:
    """Raises UserError naming the key for a kind that is not supported and for numbers that a kind lacks."""
    raw, local_theta = _of_full_layers(config)
    rope = msgspec.convert(raw, type=HFRope)
    return Rope(
        theta=rope.rope_theta or config.rope_theta,
        scaling=_scaling(rope, config),
        local_theta=local_theta,
        fraction=rope.partial_rotary_factor or config.partial_rotary_factor or 1.0,
        score_factor=_mscale(rope.factor or 1.0, rope.mscale_all_dim or 0.0) ** 2,
    )


def _of_full_layers(config: HFConfig) -> tuple[Mapping[str, Any], float | None]:
    """(rope_parameters of the layers with full attention, base of the others). An old rope_scaling wins, as it does in
    transformers."""
    raw = config.rope_scaling or config.rope_parameters or {}
    if config.rope_local_base_freq is None:
        if any(isinstance(value, dict) for value in raw.values()):
            raise UserError("rope_parameters that differ from layer to layer are not supported")
        return raw, None
    per_kind = config.rope_parameters or {}
    unknown = [key for key in per_kind if key not in (FULL, SLIDING)]
    if unknown:
        raise UserError(f"rope_parameters.{unknown[0]} is not supported; supported are {FULL} and {SLIDING}")
    sliding = msgspec.convert(per_kind.get(SLIDING) or {}, type=HFRope)
    if (sliding.rope_type or sliding.type or "default") != "default":
        raise UserError(f"rope type '{sliding.rope_type or sliding.type}' is not supported in {SLIDING} layers")
    full = {**(per_kind.get(FULL) or {}), **(config.rope_scaling or {})}
    return full, sliding.rope_theta or config.rope_local_base_freq


def _scaling(rope: HFRope, config: HFConfig) -> RopeScaling | None:
    name = rope.rope_type or rope.type or "default"
    kind = "longrope" if name == "su" else name  # as the first Phi-3 files call it
    if kind not in KINDS:
        raise UserError(f"rope type '{kind}' is not supported; supported are {', '.join(KINDS)}")
    for key in NEEDED.get(kind, ()):
        if getattr(rope, key) is None:
            raise UserError(f"rope type '{kind}' needs '{key}', which is missing")
    original = (
        config.original_max_position_embeddings
        or rope.original_max_position_embeddings
        or config.max_position_embeddings
    )
    if kind == "longrope":
        return _longrope(rope, original, config.max_position_embeddings)
    if kind == "default":
        return None
    assert rope.factor is not None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope.factor)
    if kind == "yarn":
        return _yarn(rope, rope.factor, original)
    return RopeScaling(
        kind="llama3",
        factor=rope.factor,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        original_max_positions=original,
    )


def _yarn(rope: HFRope, factor: float, original: int) -> RopeScaling:
    """YaRN (arXiv 2309.00071), with transformers' reading of mscale, which DeepSeek added."""
    attention = rope.attention_factor
    if attention is None and rope.mscale and rope.mscale_all_dim:
        attention = _mscale(factor, rope.mscale) / _mscale(factor, rope.mscale_all_dim)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        attention_factor=_mscale(factor, 1.0) if attention is None else attention,
        most_turns=rope.beta_fast or 32.0,
        least_turns=rope.beta_slow or 1.0,
        whole_dimensions=rope.truncate,
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: HFRope, original: int, longest: int) -> RopeScaling:
    """LongRoPE (arXiv 2402.13753) has two sets of factors, and transformers takes the long one as soon as one text of a
    batch is longer than pretraining's were. A packed row would have to mix them; so texts are limited to that length
    (ModelShape.max_positions), where only the short set is ever used."""
    assert rope.short_factor is not None
    factor = rope.factor or longest / original
    attention = rope.attention_factor
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_positions=original,
        factors=tuple(rope.short_factor),
        attention_factor=attention,
    )
