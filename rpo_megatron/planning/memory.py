"""Memory of one rank at the peak of a step, term by term, in bytes.

1. What is always there: weights, fp32 gradients, fp32 master weights and Adam's moments (split over the data-parallel
   ranks), a resident reference.
2. What a micro-batch keeps for its backward, times the micro-batches in flight: in 1F1B stage i of p holds those of
   p - i of them (Narayanan et al., arXiv 2104.04473, section 2.2), interleaved more (model/interleaving.py).
3. What exists for a moment: tiles of the output layer, the gradient of a layer's largest weight on its way into the
   fp32 buffer, the tensors of one layer's backward. Logits of a whole row never exist.
4. What is not ours: CUDA, NCCL, and what the allocator loses. Assumptions, in OVERHEAD.

2 is counted tensor by tensor as our layers keep them (tests/planning/test_activations.py holds it against what torch
saves); megatron's own report (megatron/training/theoretical_memory_usage.py) describes LayerNorm, GELU and dropout
instead. t: tensor ranks, T: tokens of a row on one context rank, w: bytes of a number.
"""

from dataclasses import dataclass, replace
from typing import Literal

from rpo_megatron.model.interleaving import passes_in_flight, rows_in_turn
from rpo_megatron.model.shape import padded_vocab
from rpo_megatron.planning.hardware import GIB
from rpo_megatron.planning.layout import Layout, Numbers, adapter_widths, layers_of, rank_numbers, trained_numbers
from rpo_megatron.planning.models import Model, count_trained

Precision = Literal["fp32", "bf16"]
Reference = Literal["none", "stored", "resident", "resident_fp8", "offloaded", "base"]
COMPUTED: tuple[Reference, ...] = ("resident", "resident_fp8", "offloaded", "base")
"""Those that run in every step. `base` is a policy without its adapter."""
WIDTH: dict[Precision, int] = {"fp32": 4, "bf16": 2}
TILE_BYTES = 128 * 2**20
"""Of the output layer's fp32 logits; that of model/vocab.py on a GPU."""
PIECE_BYTES = 64 * 2**20
"""Of a share of its weight's gradient; that of model/products.py on a GPU."""
KEPT_LOGITS = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Bytes of them that are kept for backward where kernels.keep_logits_mib does not say; those of model/logprobs.py."""
SINK_NUMBERS = 8
"""By which a head is wider for them; that of model/sinks.py."""
CONTEXT_BYTES = 1.25 * GIB
"""CUDA's context, cuBLAS's workspace, kernels. An assumption."""
COMMUNICATOR_BYTES = 0.25 * GIB
"""NCCL's buffers for each axis of the layout with more than one rank. An assumption."""
ALLOCATOR_SHARE = 0.05
"""Of the activations: what the caching allocator cannot use. An assumption."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementations decide what backward needs."""

    joined_keys: bool
    """Attention joins the prompt's keys and values to each response's, and then the results of all segments."""
    forgets: bool = True
    """What norms and gates make for matrices is not kept (model/forgetful.py); Transformer Engine's layers keep it."""
    fp8: bool = False
    """Matrices keep their inputs in FP8, and FP8 copies of their weights, as they are and transposed."""
    kept_logits: float = 0.0
    """Bytes of each micro-batch for tiles of logits that backward need not make again."""


CPU = Kernels(joined_keys=False, kept_logits=KEPT_LOGITS["cpu"])
GPU = Kernels(joined_keys=True, kept_logits=KEPT_LOGITS["cuda"])
"""What our layers run today; see model/attention.py, model/layers.py and model/build.py."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A micro-batch."""

    tokens: float
    scored: float
    repeated: float = 0.0
    """With shared prompts: what the tokens would be without."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the memory of a layout depends on besides the layout."""

    model: Model
    precision: Precision
    reference: Reference
    kernels: Kernels
    row: Row
    microbatches: int
    """Of a data-parallel rank in a step."""
    offloaded_moments: bool = False
    """Adam's moments are in host memory (optimizer.offload)."""


Terms = dict[str, float]


def stage_memory(setting: Setting, layout: Layout, stage: int) -> Terms:
    """Bytes by name, in the order in which they are allocated; their sum is the peak."""
    numbers, width = rank_numbers(setting.model, layout, stage), WIDTH[setting.precision]
    kept = Kept.of(setting, layout)
    in_flight = _in_flight(setting, layout, stage)
    layers = layers_of(setting.model, layout.pipeline, stage, layout.virtual)
    again = {"none": kept, "mlp": kept.without_feed_forward(), "full": kept.input_alone()}[layout.recompute]
    attention = layers.total * in_flight * again.attention
    other = in_flight * (layers.total * again.rest + layers.dense * again.dense + layers.expert * again.experts)
    ends = in_flight * _ends(setting, layout, stage)
    head = _head(setting, layout) if stage == layout.pipeline - 1 else 0.0
    moment = _moment(setting, layout, kept)
    trained = trained_numbers(setting.model, layout, stage)
    beside = 0.0 if trained is numbers else trained.total * width
    terms = {
        "weights": numbers.total * width + 2 * numbers.matrices * setting.kernels.fp8 + beside,
        "gradients": trained.total * 4,
        "optimizer": optimizer_bytes(setting, layout, stage),
        "reference": _resident_reference(setting, numbers),
        "attention": attention,
        "activations": other + ends,
        "head": head,
        "working": moment,
    }
    # It has the step's room to itself, before the first forward. The optimizer's update needs none.
    room = attention + other + ends + head + moment
    terms["reference"] += max(0.0, _offloaded_reference(setting, layout, stage) - room)
    axes = sum(size > 1 for size in (layout.tensor, layout.context, layout.data, layout.pipeline, layout.expert))
    terms["overhead"] = CONTEXT_BYTES + axes * COMMUNICATOR_BYTES + ALLOCATOR_SHARE * (attention + other + ends)
    return terms


def _in_flight(setting: Setting, layout: Layout, stage: int) -> float:
    """Micro-batches whose whole way through a rank would keep as much as is kept; of several chunks, the mean."""
    pipeline, virtual = layout.pipeline, layout.virtual
    passes = passes_in_flight(stage, pipeline=pipeline, virtual=virtual, num_rows=setting.microbatches)
    return passes / virtual


def rows_at_the_end(*, pipeline: int, virtual: int, num_rows: int) -> int:
    """Micro-batches, at most, that have left the last stage's last layer and not yet come back. They do so one by one,
    but for a last turn of the chunks that is shorter than the others: each pass that a chunk of it lacks lets the last
    chunk's begin so much earlier, while the backward passes of the turn before are still going on."""
    if virtual == 1:
        return 1
    turn = rows_in_turn(num_rows, pipeline)
    rest = num_rows % turn
    return max(1, min(rest, (virtual - 1) * (turn - rest) + 1))


def worst_stage(setting: Setting, layout: Layout) -> tuple[int, Terms]:
    """The pipeline stage that needs most: the first (most micro-batches in flight), the one after it (perhaps a layer
    more) or the last (the output layer)."""
    stages = sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})
    memory = {stage: stage_memory(setting, layout, stage) for stage in stages}
    return max(memory.items(), key=lambda item: sum(item[1].values()))


def optimizer_bytes(setting: Setting, layout: Layout, stage: int) -> float:
    """Master weights (where the weights are not fp32 themselves) and two moments, in fp32, split over the shards."""
    numbers = trained_numbers(setting.model, layout, stage)
    each = (0 if setting.precision == "fp32" else 4) + 8 * (not setting.offloaded_moments)
    return each * (numbers.dense / layout.shards + numbers.expert / layout.expert_shards)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Bytes of a checkpoint."""

    disk: float
    """All of it: weights in their precision, master weights and moments."""
    host: float
    """Of host memory on the fullest rank while it is resumed from: in megatron's fully_reshardable format every
    data-parallel rank reads all of its model part's optimizer (get_parameter_state_dp_zero in distrib_optimizer.py). To
    write it, the first data-parallel rank alone needs as much."""


def checkpoint_bytes(model: Model, layout: Layout, precision: Precision) -> Checkpoint:
    stages = {0, layout.pipeline - 1, min(1, layout.pipeline - 1)}
    most = max(trained_numbers(model, layout, stage).total for stage in stages)
    return Checkpoint(disk=count_trained(model) * (WIDTH[precision] + 12), host=12 * most)


# ------------------------------------------------------------------------------------------------ for the backward


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What one layer keeps of one micro-batch, bytes."""

    attention: float
    rest: float
    """Norms and the input of attention's first matrix."""
    dense: float
    """The feed-forward of a layer without experts,"""
    experts: float
    """and of one with."""
    input: float
    """Of what is computed again: a layer, or its feed-forward."""

    @property
    def largest(self) -> float:
        return self.attention + self.rest + max(self.dense, self.experts)

    def without_feed_forward(self) -> "Kept":
        return replace(self, dense=self.input, experts=self.input)

    def input_alone(self) -> "Kept":
        return replace(self, attention=0.0, rest=0.0, dense=self.input, experts=self.input)

    @classmethod
    def of(cls, setting: Setting, layout: Layout) -> "Kept":
        shape, kernels, w, t = setting.model.shape, setting.kernels, WIDTH[setting.precision], layout.tensor
        tokens = setting.row.tokens / layout.context
        whole = tokens / t if layout.sequence else tokens  # of what every tensor rank would hold
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        result = shape.num_heads * shape.value_dim
        # query, key, the result, a log-sum-exp per head, and the values: a view of query-key-value, or a copy
        values = query + 2 * key if kernels.joined_keys else key + shape.qk_norm * (query + 2 * key)
        padded = shape.value_dim != shape.head_dim  # attend_padded: values, and the result with and without zeros
        if shape.latent is not None:  # a view of what is made of c_kv, or a copy
            made = shape.num_heads * (shape.latent.plain_dim + shape.value_dim)
            values = query + result if padded else made if kernels.joined_keys else result
        attention = tokens / t * (w * (query + key + values + query) + 4 * shape.num_heads)
        if kernels.joined_keys:
            attention += w / t * (tokens * (0 if padded else query) + setting.row.repeated / layout.context * 2 * key)
            attention = _sink_keys(setting, layout) if shape.sinks else attention
        attention += tokens / t * query * kernels.fp8
        norms = (4 if shape.post_norms else 2) * whole * _norm(setting, shape.hidden_size)
        norms += tokens / t * _head_norms(setting) + whole * _latent_norms(setting)
        into = whole * _input_width(setting) * shape.hidden_size
        forgotten = kernels.forgets and shape.latent is None
        return cls(
            attention=attention,
            rest=norms + (0 if forgotten else into) + _adapters(setting, layout),
            dense=(0 if kernels.forgets else into) + tokens / t * _dense_columns(setting) * shape.ffn_size,
            experts=into + _experts(setting, layout, tokens),
            input=whole * w * shape.hidden_size,
        )


def _sink_keys(setting: Setting, layout: Layout) -> float:
    """Of attention that sees a sink as a key (model/sinks.py): wider copies, each in place of what it copies."""
    shape, w = setting.model.shape, WIDTH[setting.precision]
    tokens, repeated = setting.row.tokens / layout.context, setting.row.repeated / layout.context
    of_query = (
        w * (3 * shape.head_dim + 2 * SINK_NUMBERS) + 4
    )  # query, result, and the result without them; log-sum-exp
    of_key = 2 * w * (shape.head_dim + SINK_NUMBERS)
    return (tokens * shape.num_heads * of_query + (repeated or tokens) * shape.num_kv_heads * of_key) / layout.tensor


def _input_width(setting: Setting) -> int:
    """Bytes of a number of what goes into a matrix. Without its own gradient the matrix keeps nothing, but its adapter
    does, and multiplies in the model's precision."""
    return 1 if setting.kernels.fp8 and setting.model.adapter is None else WIDTH[setting.precision]


def _adapters(setting: Setting, layout: Layout) -> float:
    """Of a layer: what is between A and B for each token, and B spread out where megatron joins matrices (LoraLayer's
    `wide`). Matrices without an adapter keep nothing of their own; they are counted as if they had one."""
    widths = adapter_widths(setting.model)
    numbers = setting.row.tokens / layout.context * widths.narrow + widths.spread / layout.tensor
    return WIDTH[setting.precision] * numbers


def _norm(setting: Setting, size: int) -> float:
    """Of a row of `size` numbers."""
    return WIDTH[setting.precision] * size + (8.0 if setting.model.shape.norm == "layer1p" else 4.0)


def _head_norms(setting: Setting) -> float:
    """Norms of query and key. The key that goes in is a view of query-key-value, which is counted with the values."""
    shape, width = setting.model.shape, WIDTH[setting.precision]
    if not shape.qk_norm:
        return 0.0
    heads = (shape.num_heads + shape.num_kv_heads) * _norm(setting, shape.head_dim)
    return heads - width * shape.num_kv_heads * shape.head_dim


def _latent_norms(setting: Setting) -> float:
    """Norms inside latent attention, and their results, which go into matrices; the part of the key beside what is
    normed is kept with it."""
    latent, width = setting.model.shape.latent, WIDTH[setting.precision]
    if latent is None:
        return 0.0
    sizes = [latent.kv_rank] if latent.query_rank is None else [latent.kv_rank, latent.query_rank]
    return sum(_norm(setting, n) + width * n for n in sizes) + width * latent.rotary_dim


def _dense_columns(setting: Setting) -> float:
    """The same of a layer without experts, which forgets what silu gates."""
    if setting.kernels.forgets and _gated_by_silu(setting):
        return 2 * WIDTH[setting.precision]
    return _columns(setting)


def _gated_by_silu(setting: Setting) -> bool:
    return setting.model.shape.gated and setting.model.shape.activation == "silu"


def _columns(setting: Setting) -> float:
    """Bytes per token and feed-forward column: gate and up, and the input of the last matrix; where it is not silu that
    gates (model/swiglu.py) also the activation of the gate, and up once more. Without a gate: its input and its
    result."""
    w, last = WIDTH[setting.precision], _input_width(setting)
    if not setting.model.shape.gated:
        return w + last
    return (2 if _gated_by_silu(setting) else 4) * w + last


def _experts(setting: Setting, layout: Layout, tokens: float) -> float:
    """Routing is taken as even, so that a rank computes as many token-expert pairs as it sends. A pair has its input,
    its inside (what goes into the last matrix twice: before and after the expert's share of the token) and where it
    came from; the router has its scores and choices."""
    shape, experts, w = setting.model.shape, setting.model.shape.experts, WIDTH[setting.precision]
    if experts is None:
        return 0.0
    inside = (_columns(setting) + w) * experts.ffn_size / layout.tensor
    # Split over the tensor ranks, an expert sees the tokens of all of them; whole, those of one.
    pair = (w * shape.hidden_size + 20) / (1 if layout.expert == 1 else layout.tensor) + inside
    chosen = tokens * (experts.per_token * pair + 12 * experts.count / layout.tensor)
    shared = tokens / layout.tensor * _columns(setting) * experts.shared_ffn_size
    gate = tokens / layout.tensor * w * (shape.hidden_size + 1) * experts.shared_gate  # its input, and it: a product
    return chosen + shared + gate


def _ends(setting: Setting, layout: Layout, stage: int) -> float:
    """Of a micro-batch, what a stage keeps for all its layers (cosines and sines), the first before and the last after
    them."""
    shape, w = setting.model.shape, WIDTH[setting.precision]
    tokens, scored = setting.row.tokens / layout.context, setting.row.scored / layout.context
    bases = 1 if shape.local_rope_theta is None else 2
    kept = bases * w * tokens * (shape.rotary_dim or shape.head_dim) + (8 * tokens if stage == 0 else 0.0)
    if stage == layout.pipeline - 1:
        whole = tokens / layout.tensor if layout.sequence else tokens
        kept += whole * _norm(setting, shape.hidden_size)
        if shape.head == "lm":  # hidden states that predict; positions, labels, maximum, sum and logit of each
            kept += scored * (w * shape.hidden_size + 8 + 8 + 12)
    return kept


# ------------------------------------------------------------------------------------------------ for a moment


def _head(setting: Setting, layout: Layout) -> float:
    """Tiles of the output layer: fp32 logits, as much again in temporaries, and a tile's share of the weight's
    gradient; those that are kept for each row on its way; and the gradient of the hidden states."""
    shape, w = setting.model.shape, WIDTH[setting.precision]
    if shape.head != "lm":
        return 0.0
    words = min(padded_vocab(shape) / layout.tensor, TILE_BYTES / 4 / 1024)
    logits = setting.row.scored / layout.context * w * padded_vocab(shape) / layout.tensor
    tile = 2 * TILE_BYTES + min(w * words * shape.hidden_size, PIECE_BYTES)
    rows = rows_at_the_end(pipeline=layout.pipeline, virtual=layout.virtual, num_rows=setting.microbatches)
    kept = rows * min(setting.kernels.kept_logits, logits)
    return tile + kept + setting.row.scored * w * shape.hidden_size


def _moment(setting: Setting, layout: Layout, kept: Kept) -> float:
    """The gradient of a layer's largest weight before it is added to the buffer (those of embedding and output layer
    are added part by part), and what one layer's backward holds: the tensors of its inside (for a layer that is
    computed again, also all that it keeps)."""
    shape, w, t = setting.model.shape, WIDTH[setting.precision], layout.tensor
    columns = max(shape.experts.ffn_size, shape.experts.shared_ffn_size) if shape.experts else shape.ffn_size
    matrix = (2 if shape.gated else 1) * columns * shape.hidden_size / t
    again = {"none": 0.0, "mlp": max(kept.dense, kept.experts), "full": kept.largest}[layout.recompute]
    gradient = w * matrix if setting.model.adapter is None else 0.0
    return gradient + _inside(setting, layout) + again


def _inside(setting: Setting, layout: Layout) -> float:
    """Of one layer at a time: residual, norm and result, and the widest tensors of the feed-forward."""
    shape = setting.model.shape
    experts = shape.experts.per_token * shape.experts.ffn_size if shape.experts else 0
    tokens = setting.row.tokens / layout.context
    return (
        WIDTH[setting.precision] * tokens * (3 * shape.hidden_size + 4 * max(experts, shape.ffn_size) / layout.tensor)
    )


def _resident_reference(setting: Setting, numbers: Numbers) -> float:
    width = WIDTH[setting.precision]
    if setting.reference == "resident":
        return numbers.total * width + 2 * numbers.matrices * setting.kernels.fp8
    if setting.reference == "resident_fp8":
        return numbers.matrices + (numbers.total - numbers.matrices) * width
    return 0.0


def _offloaded_reference(setting: Setting, layout: Layout, stage: int) -> float:
    """What it needs while it is on the device; without gradient, a layer keeps nothing."""
    if setting.reference != "offloaded":
        return 0.0
    numbers = rank_numbers(setting.model, layout, stage)
    return numbers.total * WIDTH[setting.precision] + _inside(setting, layout)
