"""Every weight of a model: its name in megatron, what it is made of in Hugging Face files, how ranks share it.

    Hugging Face (model. ...)                     megatron                                             split
    embed_tokens.weight                           embedding.word_embeddings.weight                     vocab
    layers.i.input_layernorm.*                    decoder.layers.i.input_layernorm.*                   replicated
    layers.i.self_attn.{q,k,v}_proj.*             decoder.layers.i.self_attention.linear_qkv.*         qkv
    layers.i.self_attn.{q,k}_norm.weight          decoder.layers.i.self_attention.{q,k}_layernorm.*    replicated
    layers.i.self_attn.o_proj.weight              decoder.layers.i.self_attention.linear_proj.weight   input
    layers.i.post_attention_layernorm.*           decoder.layers.i.pre_mlp_layernorm.*                 replicated
    layers.i.mlp.{gate,up}_proj.weight            decoder.layers.i.mlp.linear_fc1.weight               gated
    layers.i.mlp.down_proj.weight                 decoder.layers.i.mlp.linear_fc2.weight               input
    norm.*                                        decoder.final_layernorm.*                            replicated
    (no prefix) lm_head.weight                    output_layer.weight (absent when tied)               vocab
    (no prefix) score.weight                      score.weight (a reward model's, for lm_head)         replicated

    where gate and up are one (Phi), and query, key and value:
    layers.i.self_attn.qkv_proj.weight            ... linear_qkv.weight                                qkv
    layers.i.mlp.gate_up_proj.weight              ... linear_fc1.weight                                gated
    without a gate (Nemotron):
    layers.i.mlp.up_proj.weight                   ... linear_fc1.weight                                rows
    with norms after the sublayers (Gemma 2, 3):
    layers.i.post_attention_layernorm.weight      decoder.layers.i.self_attn_bda.norm.weight           replicated
    layers.i.pre_feedforward_layernorm.weight     decoder.layers.i.pre_mlp_layernorm.weight            replicated
    layers.i.post_feedforward_layernorm.weight    decoder.layers.i.mlp_bda.norm.weight                 replicated
    with experts (Mixtral; Qwen's names in families.py):
    layers.i.block_sparse_moe.gate.weight         decoder.layers.i.mlp.router.weight                   replicated
    layers.i.block_sparse_moe.experts.e.{w1,w3}.* decoder.layers.i.mlp.experts.e.linear_fc1.weight     gated
    layers.i.block_sparse_moe.experts.e.w2.weight decoder.layers.i.mlp.experts.e.linear_fc2.weight     input
    and one that computes every token (Qwen2-MoE):
    layers.i.mlp.shared_expert.{gate,up}_proj.*   decoder.layers.i.mlp.shared_experts.linear_fc1.weight gated
    layers.i.mlp.shared_expert.down_proj.weight   decoder.layers.i.mlp.shared_experts.linear_fc2.weight input
    layers.i.mlp.shared_expert_gate.weight        decoder.layers.i.mlp.shared_experts.gate_weight      replicated
    DeepSeek-V3's is called shared_experts, and its router has a bias:
    layers.i.mlp.gate.e_score_correction_bias     decoder.layers.i.mlp.router.expert_bias              replicated
    with latent attention (DeepSeek-V3), in decoder.layers.i.self_attention. ...
    layers.i.self_attn.q_a_proj.weight            linear_q_down_proj.weight                            replicated
    layers.i.self_attn.q_a_layernorm.weight       q_layernorm.weight                                   replicated
    layers.i.self_attn.q_b_proj.weight            linear_q_up_proj.weight                              rows
    layers.i.self_attn.q_proj.weight              linear_q_proj.weight (for these three)               rows
    layers.i.self_attn.kv_a_proj_with_mqa.weight  linear_kv_down_proj.weight                           replicated
    layers.i.self_attn.kv_a_layernorm.weight      kv_layernorm.weight                                  replicated
    layers.i.self_attn.kv_b_proj.weight           linear_kv_up_proj.weight                             rows
    with sinks, and biases everywhere (GPT-OSS):
    layers.i.self_attn.sinks                      decoder.layers.i.self_attention.core_attention.sinks rows
    layers.i.self_attn.o_proj.bias                decoder.layers.i.self_attention.linear_proj.bias     replicated
    layers.i.mlp.router.{weight,bias}             decoder.layers.i.mlp.router.{weight,bias}            replicated
    layers.i.mlp.experts.gate_up_proj, ..._bias   decoder.layers.i.mlp.experts.e.linear_fc1.*          gated
    layers.i.mlp.experts.down_proj                decoder.layers.i.mlp.experts.e.linear_fc2.weight     input
    layers.i.mlp.experts.down_proj_bias           decoder.layers.i.mlp.experts.e.linear_fc2.bias       replicated

Layers are numbered over the whole model, whatever the pipeline stage, and experts over the whole layer, whatever the
rank that has them. Weights are [out, in].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rpo_megatron.model.families import FAMILIES
from rpo_megatron.model.shape import ModelShape

Split = Literal["replicated", "vocab", "rows", "qkv", "gated", "input"]
"""How one megatron tensor is made of Hugging Face ones and cut over T tensor ranks.

    replicated   every rank holds all of it
    vocab        rows, padded with zeros to `padded_vocab`, cut into T
    rows         rows, cut into T
    qkv          rows, interleaved per kv head as [its query heads, key, value]; whole kv heads go to a rank
    gated        rank r holds [its rows of gate; its rows of up]
    input        columns, cut into T
"""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
SCORE = HF_SCORE = "score.weight"
HF_EXPERT_BIAS = "e_score_correction_bias"
"""How the name of a router's bias ends. It is fp32 whatever the model's precision, and not trained."""


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Where rows are in a tensor of all experts of a layer: [expert, in, out], or of biases [expert, out]."""

    expert: int
    count: int
    step: int
    """Every so manieth output is one of them, from Part.first_row on."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive rows of a Hugging Face tensor, or all of it."""

    tensor: str
    shape: tuple[int, ...]
    """Of these rows."""
    first_row: int = 0
    stacked: Stacked | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the tensor that these rows, and those before them, are part of."""
        rows, *columns = self.shape
        if self.stacked is None:
            return self.first_row + rows, *columns
        return self.stacked.count, *columns, rows * self.stacked.step


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table above."""

    name: str
    """megatron's name."""
    parts: tuple[Part, ...]
    """In the order in which they are joined."""
    split: Split

    @property
    def of_expert(self) -> bool:
        """It belongs to one expert: split, and found, where experts are."""
        return ".mlp.experts." in self.name

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """The Hugging Face tensors, whole, with their shapes. No tensor but stacked ones is part of two entries."""
        return {part.tensor: part.whole for part in self.parts}


def hf_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model in Hugging Face's form, with its shape, in the order of the forward pass."""
    return {name: size for entry in entries(shape) for name, size in entry.tensors.items()}


def entries(shape: ModelShape) -> list[Entry]:
    """Every weight of the model, once, in the order of the forward pass."""
    vocab = (shape.vocab_size, shape.hidden_size)
    rows = [_entry(EMBEDDING, "vocab", {HF_EMBEDDING: vocab})]
    for i in range(shape.num_layers):
        rows += _layer(shape, i)
    rows += _norm(shape, "decoder.final_layernorm", "model.norm")
    if shape.head == "value":
        rows.append(_entry(SCORE, "replicated", {HF_SCORE: (1, shape.hidden_size)}))
    elif not shape.tied_embeddings:
        rows.append(_entry(OUTPUT, "vocab", {HF_OUTPUT: vocab}))
    return rows


def _layer(shape: ModelShape, i: int) -> list[Entry]:
    mega, hf = f"decoder.layers.{i}.", f"model.layers.{i}."
    rows = _norm(shape, f"{mega}input_layernorm", f"{hf}input_layernorm")
    attention = _attention if shape.latent is None else _latent_attention
    rows += attention(shape, f"{mega}self_attention.", f"{hf}self_attn.")
    if shape.post_norms:
        rows += _norm(shape, f"{mega}self_attn_bda.norm", f"{hf}post_attention_layernorm")
        rows += _norm(shape, f"{mega}pre_mlp_layernorm", f"{hf}pre_feedforward_layernorm")
    else:
        rows += _norm(shape, f"{mega}pre_mlp_layernorm", f"{hf}post_attention_layernorm")
    rows += _experts(shape, f"{mega}mlp.", hf) if shape.has_experts(i) else _dense(shape, f"{mega}mlp.", f"{hf}mlp.")
    if shape.post_norms:
        rows += _norm(shape, f"{mega}mlp_bda.norm", f"{hf}post_feedforward_layernorm")
    return rows


def _norm(shape: ModelShape, mega: str, hf: str) -> list[Entry]:
    parameters = ("weight", "bias") if shape.norm == "layer1p" else ("weight",)
    return [_entry(f"{mega}.{p}", "replicated", {f"{hf}.{p}": (shape.hidden_size,)}) for p in parameters]


def _attention(shape: ModelShape, mega: str, hf: str) -> list[Entry]:
    hidden, head = shape.hidden_size, shape.head_dim
    out = {"q": shape.num_heads * head, "k": shape.num_kv_heads * head, "v": shape.num_kv_heads * head}
    if FAMILIES[shape.family].fused:
        rows = [_fused(f"{mega}linear_qkv.weight", "qkv", f"{hf}qkv_proj.weight", [(n, hidden) for n in out.values()])]
    else:
        sources = {f"{hf}{x}_proj.weight": (n, hidden) for x, n in out.items()}
        rows = [_entry(f"{mega}linear_qkv.weight", "qkv", sources)]
    if shape.qkv_bias:
        rows.append(_entry(f"{mega}linear_qkv.bias", "qkv", {f"{hf}{x}_proj.bias": (n,) for x, n in out.items()}))
    for x in "qk" if shape.qk_norm else "":
        rows.append(_entry(f"{mega}{x}_layernorm.weight", "replicated", {f"{hf}{x}_norm.weight": (head,)}))
    if shape.sinks:
        rows.append(_entry(f"{mega}core_attention.sinks", "rows", {f"{hf}sinks": (shape.num_heads,)}))
    rows.append(_entry(f"{mega}linear_proj.weight", "input", {f"{hf}o_proj.weight": (hidden, out["q"])}))
    if shape.biases:
        rows.append(_entry(f"{mega}linear_proj.bias", "replicated", {f"{hf}o_proj.bias": (hidden,)}))
    return rows


def _latent_attention(shape: ModelShape, mega: str, hf: str) -> list[Entry]:
    latent, hidden, heads = shape.latent, shape.hidden_size, shape.num_heads
    assert latent is not None

    def row(ours: str, split: Split, theirs: str, *size: int) -> Entry:
        return _entry(f"{mega}{ours}.weight", split, {f"{hf}{theirs}.weight": size})

    query, q_rank, kv_rank = heads * shape.head_dim, latent.query_rank, latent.kv_rank
    if q_rank is None:
        rows = [row("linear_q_proj", "rows", "q_proj", query, hidden)]
    else:
        rows = [
            row("linear_q_down_proj", "replicated", "q_a_proj", q_rank, hidden),
            row("q_layernorm", "replicated", "q_a_layernorm", q_rank),
            row("linear_q_up_proj", "rows", "q_b_proj", query, q_rank),
        ]
    made = heads * (latent.plain_dim + latent.value_dim)
    return [
        *rows,
        row("linear_kv_down_proj", "replicated", "kv_a_proj_with_mqa", kv_rank + latent.rotary_dim, hidden),
        row("kv_layernorm", "replicated", "kv_a_layernorm", kv_rank),
        row("linear_kv_up_proj", "rows", "kv_b_proj", made, kv_rank),
        row("linear_proj", "input", "o_proj", hidden, heads * latent.value_dim),
    ]


def _dense(shape: ModelShape, mega: str, hf: str) -> list[Entry]:
    up, down = (shape.ffn_size, shape.hidden_size), (shape.hidden_size, shape.ffn_size)
    fc1 = f"{mega}linear_fc1.weight"
    if not shape.gated:
        first = _entry(fc1, "rows", {f"{hf}up_proj.weight": up})
    elif FAMILIES[shape.family].fused:
        first = _fused(fc1, "gated", f"{hf}gate_up_proj.weight", [up, up])
    else:
        first = _entry(fc1, "gated", {f"{hf}gate_proj.weight": up, f"{hf}up_proj.weight": up})
    return [first, _entry(f"{mega}linear_fc2.weight", "input", {f"{hf}down_proj.weight": down})]


def _experts(shape: ModelShape, mega: str, hf: str) -> list[Entry]:
    experts, names = shape.experts, FAMILIES[shape.family].experts
    assert experts is not None
    assert names is not None
    up, down = (experts.ffn_size, shape.hidden_size), (shape.hidden_size, experts.ffn_size)
    router = f"{hf}{names.block}.{names.router}"
    rows = [_entry(f"{mega}router.weight", "replicated", {f"{router}.weight": (experts.count, shape.hidden_size)})]
    if experts.biased:
        bias = {f"{router}.{HF_EXPERT_BIAS}": (experts.count,)}
        rows.append(_entry(f"{mega}router.expert_bias", "replicated", bias))
    if shape.biases:
        rows.append(_entry(f"{mega}router.bias", "replicated", {f"{router}.bias": (experts.count,)}))
    if names.stacked:
        return rows + _stacked_experts(shape, f"{mega}experts.", f"{hf}{names.block}.experts.")
    for e in range(experts.count):
        inside, source = f"{mega}experts.{e}.", f"{hf}{names.block}.experts.{e}."
        gate_up = {f"{source}{names.gate}.weight": up, f"{source}{names.up}.weight": up}
        rows.append(_entry(f"{inside}linear_fc1.weight", "gated", gate_up))
        rows.append(_entry(f"{inside}linear_fc2.weight", "input", {f"{source}{names.down}.weight": down}))
    if experts.shared_ffn_size:
        inside, source = f"{mega}shared_experts.", f"{hf}{names.block}.{names.shared}"
        rows += _dense(replace(shape, ffn_size=experts.shared_ffn_size), inside, f"{source}.")
    if experts.shared_gate:
        rows.append(_entry(f"{inside}gate_weight", "replicated", {f"{source}_gate.weight": (1, shape.hidden_size)}))
    return rows


def _stacked_experts(shape: ModelShape, mega: str, hf: str) -> list[Entry]:
    """One kind of weight after the other, so that a tensor's experts follow one another."""
    experts = shape.experts
    assert experts is not None
    inside, outside = experts.ffn_size, shape.hidden_size
    kinds: list[tuple[str, Split, str, tuple[int, ...], int]] = [
        ("linear_fc1.weight", "gated", "gate_up_proj", (inside, outside), 2),
        ("linear_fc1.bias", "gated", "gate_up_proj_bias", (inside,), 2),
        ("linear_fc2.weight", "input", "down_proj", (outside, inside), 1),
        ("linear_fc2.bias", "replicated", "down_proj_bias", (outside,), 1),
    ]
    rows = []
    for name, split, tensor, size, step in kinds:
        for e in range(experts.count):
            place = Stacked(expert=e, count=experts.count, step=step)
            parts = [Part(tensor=f"{hf}{tensor}", shape=size, first_row=i, stacked=place) for i in range(step)]
            rows.append(Entry(name=f"{mega}{e}.{name}", split=split, parts=tuple(parts)))
    return rows


def _entry(name: str, split: Split, tensors: Mapping[str, tuple[int, ...]]) -> Entry:
    parts = tuple(Part(tensor=tensor, shape=shape) for tensor, shape in tensors.items())
    return Entry(name=name, split=split, parts=parts)


def _fused(name: str, split: Split, tensor: str, shapes: list[tuple[int, int]]) -> Entry:
    """Of parts that lie one under the other in one tensor."""
    starts = [sum(rows for rows, _ in shapes[:i]) for i in range(len(shapes))]
    parts = [Part(tensor=tensor, shape=s, first_row=start) for s, start in zip(shapes, starts, strict=True)]
    return Entry(name=name, split=split, parts=tuple(parts))
