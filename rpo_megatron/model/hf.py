"""Hugging Face <-> megatron weights of the Llama family: one table, and a split and its inverse over tensor ranks.

    Hugging Face (model. ...)                  megatron                                             split
    embed_tokens.weight                        embedding.word_embeddings.weight                     vocab
    layers.i.input_layernorm.weight            decoder.layers.i.input_layernorm.weight              replicated
    layers.i.self_attn.{q,k,v}_proj.*          decoder.layers.i.self_attention.linear_qkv.*         qkv
    layers.i.self_attn.{q,k}_norm.weight       decoder.layers.i.self_attention.{q,k}_layernorm.*    replicated
    layers.i.self_attn.o_proj.weight           decoder.layers.i.self_attention.linear_proj.weight   input
    layers.i.post_attention_layernorm.weight   decoder.layers.i.pre_mlp_layernorm.weight            replicated
    layers.i.mlp.{gate,up}_proj.weight         decoder.layers.i.mlp.linear_fc1.weight               gated
    layers.i.mlp.down_proj.weight              decoder.layers.i.mlp.linear_fc2.weight               input
    norm.weight                                decoder.final_layernorm.weight                       replicated
    (no prefix) lm_head.weight                 output_layer.weight (absent when tied)               vocab
    (no prefix) score.weight                   score.weight (a reward model's, for lm_head)         replicated

Layers are numbered over the whole model, whatever the pipeline stage. Weights are [out, in].
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from rpo_megatron.errors import UserError
from rpo_megatron.model.hf_io import HFReader
from rpo_megatron.model.shape import ModelShape, padded_vocab

Split = Literal["replicated", "vocab", "qkv", "gated", "input"]
"""How one megatron tensor is made of Hugging Face ones and cut over T tensor ranks.

    replicated   every rank holds all of it
    vocab        rows, padded with zeros to `padded_vocab`, cut into T
    qkv          rows, interleaved per kv head as [its query heads, key, value]; whole kv heads go to a rank
    gated        rank r holds [its rows of gate; its rows of up]
    input        columns, cut into T
"""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
SCORE = HF_SCORE = "score.weight"
NOT_WEIGHTS = (".rotary_emb.inv_freq",)  # suffixes of buffers that old files carry and that config.json determines
FLOATS = ("F64", "F32", "F16", "BF16")
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table above."""

    name: str
    """megatron's name."""
    sources: Mapping[str, tuple[int, ...]]
    """Hugging Face's names in the order in which they are joined, each with its shape."""
    split: Split


# ------------------------------------------------------------------------------------------------ the table


def entries(shape: ModelShape) -> list[Entry]:
    """Every weight of the model, once, in the order of the forward pass."""
    vocab = (shape.vocab_size, shape.hidden_size)
    rows = [_entry(EMBEDDING, "vocab", {HF_EMBEDDING: vocab})]
    for i in range(shape.num_layers):
        rows += _layer(shape, i)
    rows.append(_entry("decoder.final_layernorm.weight", "replicated", {"model.norm.weight": (shape.hidden_size,)}))
    if shape.head == "value":
        rows.append(_entry(SCORE, "replicated", {HF_SCORE: (1, shape.hidden_size)}))
    elif not shape.tied_embeddings:
        rows.append(_entry(OUTPUT, "vocab", {HF_OUTPUT: vocab}))
    return rows


def _layer(shape: ModelShape, i: int) -> list[Entry]:
    mega, hf = f"decoder.layers.{i}.", f"model.layers.{i}."
    hidden, ffn, head = shape.hidden_size, shape.ffn_size, shape.head_dim
    q, kv = shape.num_heads * head, shape.num_kv_heads * head
    out = {f"{hf}self_attn.q_proj": q, f"{hf}self_attn.k_proj": kv, f"{hf}self_attn.v_proj": kv}
    attention, mlp = f"{mega}self_attention.", f"{mega}mlp."
    rows = [_entry(f"{mega}input_layernorm.weight", "replicated", {f"{hf}input_layernorm.weight": (hidden,)})]
    rows.append(_entry(f"{attention}linear_qkv.weight", "qkv", {f"{n}.weight": (o, hidden) for n, o in out.items()}))
    if shape.qkv_bias:
        rows.append(_entry(f"{attention}linear_qkv.bias", "qkv", {f"{n}.bias": (o,) for n, o in out.items()}))
    if shape.qk_norm:
        for x in "qk":
            source = {f"{hf}self_attn.{x}_norm.weight": (head,)}
            rows.append(_entry(f"{attention}{x}_layernorm.weight", "replicated", source))
    gate_up = {f"{hf}mlp.gate_proj.weight": (ffn, hidden), f"{hf}mlp.up_proj.weight": (ffn, hidden)}
    post_norm = {f"{hf}post_attention_layernorm.weight": (hidden,)}
    return [
        *rows,
        _entry(f"{attention}linear_proj.weight", "input", {f"{hf}self_attn.o_proj.weight": (hidden, q)}),
        _entry(f"{mega}pre_mlp_layernorm.weight", "replicated", post_norm),
        _entry(f"{mlp}linear_fc1.weight", "gated", gate_up),
        _entry(f"{mlp}linear_fc2.weight", "input", {f"{hf}mlp.down_proj.weight": (hidden, ffn)}),
    ]


def _entry(name: str, split: Split, sources: Mapping[str, tuple[int, ...]]) -> Entry:
    return Entry(name=name, split=split, sources=sources)


# ------------------------------------------------------------------------------------------------ split and join


def shard(entry: Entry, read: Callable[[str], Any], shape: ModelShape, *, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The part of a megatron tensor that one tensor rank holds, in the dtype of its source.

    `read(hf name)` gives something that slices like a tensor; only the slices this rank needs are taken.
    """
    if entry.split == "replicated":
        tp_rank, tp_size = 0, 1
    parts = [_share(entry, read(name), full, shape, tp_rank, tp_size) for name, full in entry.sources.items()]
    blocks = _blocks(entry, shape, tp_size)
    return torch.cat([part.unflatten(0, (blocks, -1)) for part in parts], dim=1).flatten(0, 1)


def merge(entry: Entry, shards: list[torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of a megatron tensor, from all its tensor ranks' parts in order: the inverse of
    `shard`, with vocabulary padding taken off. Of a replicated tensor the first rank's copy is used."""
    if entry.split == "replicated":
        shards = shards[:1]
    blocks = _blocks(entry, shape, len(shards))
    all_rows = sum(full[0] for full in entry.sources.values())
    block_rows = shards[0].shape[0] // blocks
    sizes = [block_rows * full[0] // all_rows for full in entry.sources.values()]
    parts = [[p.flatten(0, 1) for p in s.unflatten(0, (blocks, -1)).split(sizes, dim=1)] for s in shards]
    joined = [torch.cat(ranks, dim=_split_dim(entry)) for ranks in zip(*parts, strict=True)]
    return {name: tensor[: full[0]] for tensor, (name, full) in zip(joined, entry.sources.items(), strict=True)}


def _share(
    entry: Entry, source: Any, full: tuple[int, ...], shape: ModelShape, tp_rank: int, tp_size: int
) -> torch.Tensor:
    """Rank `tp_rank`'s contiguous share of one Hugging Face tensor; rows past its end are zeros."""
    if _split_dim(entry) == 1:
        width = full[1] // tp_size
        return source[:, tp_rank * width : (tp_rank + 1) * width]
    rows = (padded_vocab(shape) if entry.split == "vocab" else full[0]) // tp_size
    start, stop = (min(rank * rows, full[0]) for rank in (tp_rank, tp_rank + 1))
    share = source[start:stop]
    return F.pad(share, (0, 0, 0, rows - (stop - start))) if stop - start < rows else share


def _split_dim(entry: Entry) -> int:
    return 1 if entry.split == "input" else 0


def _blocks(entry: Entry, shape: ModelShape, tp_size: int) -> int:
    """Into how many blocks of rows a rank's part falls; inside a block come the sources one after the other."""
    return shape.num_kv_heads // tp_size if entry.split == "qkv" else 1


# ------------------------------------------------------------------------------------------------ loading


class TensorSource(Protocol):
    """An HFReader, or whatever else gives a tensor for a Hugging Face name."""

    def read(self, name: str) -> Any: ...


def load_shards(
    params: Mapping[str, torch.Tensor], *, reader: TensorSource, shape: ModelShape, tp_rank: int, tp_size: int
) -> None:
    """Fill `params` ({megatron name with the global layer number: this rank's tensor}) in place, one at a time, cast
    to their dtypes. `output_layer.weight` of a tied model, on the last pipeline stage, gets the embedding."""
    table = {entry.name: entry for entry in entries(shape)}
    table.setdefault(OUTPUT, replace(table[EMBEDDING], name=OUTPUT))
    assert params.keys() <= table.keys(), sorted(params.keys() - table.keys())
    with torch.no_grad():
        for name, param in params.items():
            local = shard(table[name], reader.read, shape, tp_rank=tp_rank, tp_size=tp_size)
            assert local.shape == param.shape, f"{name}: {tuple(param.shape)} is to be filled by {tuple(local.shape)}"
            param.copy_(local)


def check_accounted(reader: HFReader, shape: ModelShape) -> None:
    """Raise UserError unless the files hold exactly the tensors of the model, in the right shapes, in floats.

    A tied model's files may repeat the embedding as lm_head.weight, if it is the same.
    """
    needed = {name: full for entry in entries(shape) for name, full in entry.sources.items()}
    if shape.tied_embeddings and HF_OUTPUT in reader.tensors:
        needed[HF_OUTPUT] = needed[HF_EMBEDDING]
    found = {name: info for name, info in reader.tensors.items() if not name.endswith(NOT_WEIGHTS)}
    problems = {
        "missing": needed.keys() - found.keys(),
        f"not part of a {shape.family} model": found.keys() - needed.keys(),
        "of the wrong shape": [
            f"{name} (expected {list(full)}, found {list(found[name].shape)})"
            for name, full in needed.items()
            if name in found and found[name].shape != full
        ],
        f"not one of {', '.join(FLOATS)}": [f"{n} ({i.dtype})" for n, i in found.items() if i.dtype not in FLOATS],
    }
    lines = [f"{len(list(names))} {what}: {_shorten(names)}" for what, names in problems.items() if names]
    if lines:
        raise UserError(f"{reader.directory}: tensors do not match config.json -- " + "; ".join(lines))
    if HF_OUTPUT in needed and shape.tied_embeddings and not _equal(reader, HF_EMBEDDING, HF_OUTPUT):
        raise UserError(
            f"{reader.directory}: config.json says tie_word_embeddings=true, but {HF_OUTPUT} differs from "
            f"{HF_EMBEDDING}; set it to false, or remove {HF_OUTPUT} from the files"
        )


def _equal(reader: HFReader, name: str, other: str) -> bool:
    a, b = reader.read(name), reader.read(other)
    starts = range(0, reader.tensors[name].shape[0], ROWS_AT_A_TIME)
    return all(torch.equal(a[i : i + ROWS_AT_A_TIME], b[i : i + ROWS_AT_A_TIME]) for i in starts)


def _shorten(names: Iterable[str], *, limit: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (f", ... and {len(listed) - limit} more" if len(listed) > limit else "")
