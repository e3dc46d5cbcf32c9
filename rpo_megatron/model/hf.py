"""Hugging Face <-> megatron weights: a split and its inverse over tensor ranks, for every row of table.py."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from rpo_megatron.errors import UserError
from rpo_megatron.model.accounting import describe, mismatches
from rpo_megatron.model.hf_io import HFReader
from rpo_megatron.model.shape import ModelShape, padded_vocab
from rpo_megatron.model.table import EMBEDDING, HF_EMBEDDING, HF_OUTPUT, OUTPUT, Entry, Part, entries, hf_tensors

NOT_WEIGHTS = (".rotary_emb.inv_freq",)  # suffixes of buffers that old files carry and that config.json determines
FLOATS = ("F64", "F32", "F16", "BF16")
ROWS_AT_A_TIME = 4096

# ------------------------------------------------------------------------------------------------ split and join


def shard(entry: Entry, read: Callable[[str], Any], shape: ModelShape, *, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The part of a megatron tensor that one tensor rank holds, in the dtype of its source.

    `read(hf name)` gives something that slices like a tensor; only the slices this rank needs are taken.
    """
    if entry.split == "replicated":
        tp_rank, tp_size = 0, 1
    shares = [_share(entry, read(part.tensor), part, shape, tp_rank, tp_size) for part in entry.parts]
    blocks = _blocks(entry, shape, tp_size)
    return torch.cat([share.unflatten(0, (blocks, -1)) for share in shares], dim=1).flatten(0, 1)


def merge(entry: Entry, shards: list[torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of a megatron tensor, from all its tensor ranks' parts in order: the inverse of
    `shard`, with vocabulary padding taken off. Of a replicated tensor the first rank's copy is used. What is stacked is
    one expert's; see `stack_experts`."""
    if entry.split == "replicated":
        shards = shards[:1]
    blocks = _blocks(entry, shape, len(shards))
    all_rows = sum(part.shape[0] for part in entry.parts)
    block_rows = shards[0].shape[0] // blocks
    sizes = [block_rows * part.shape[0] // all_rows for part in entry.parts]
    cut = [[p.flatten(0, 1) for p in s.unflatten(0, (blocks, -1)).split(sizes, dim=1)] for s in shards]
    joined: dict[str, list[torch.Tensor]] = {}
    for part, ranks in zip(entry.parts, zip(*cut, strict=True), strict=True):
        rows = torch.cat(ranks, dim=_split_dim(entry))[: part.shape[0]]
        joined.setdefault(part.tensor, []).append(rows)
    if entry.parts[0].stacked is not None:
        return {name: torch.stack(rows, 1).flatten(0, 1).movedim(0, -1) for name, rows in joined.items()}
    return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in joined.items()}


def stack_experts(
    merged: Iterable[tuple[Entry, dict[str, torch.Tensor]]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors from what `merge` gives for the table's entries, in their order: a layer's experts wait for one
    another where the files have one tensor for all."""
    waiting: dict[str, list[torch.Tensor]] = {}
    for entry, tensors in merged:
        place = entry.parts[0].stacked
        for name, tensor in tensors.items():
            if place is None:
                yield name, tensor
                continue
            waiting.setdefault(name, []).append(tensor)
            if len(waiting[name]) == place.count:
                yield name, torch.stack(waiting.pop(name))


def _share(entry: Entry, source: Any, part: Part, shape: ModelShape, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Rank `tp_rank`'s contiguous share of a part; rows past its end are zeros."""
    if part.stacked is not None:
        outputs = source[part.stacked.expert].movedim(-1, 0)
        source, part = outputs[part.first_row :: part.stacked.step], replace(part, first_row=0)
    if _split_dim(entry) == 1:
        width = part.shape[1] // tp_size
        return source[:, tp_rank * width : (tp_rank + 1) * width]
    rows = (padded_vocab(shape) if entry.split == "vocab" else part.shape[0]) // tp_size
    start, stop = (part.first_row + min(rank * rows, part.shape[0]) for rank in (tp_rank, tp_rank + 1))
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
    params: Mapping[str, torch.Tensor],
    *,
    reader: TensorSource,
    shape: ModelShape,
    tp_rank: int,
    tp_size: int,
    etp: tuple[int, int] | None = None,
) -> None:
    """Fill `params` ({megatron name with the global layer number: this rank's tensor}) in place, one at a time, cast
    to their dtypes. `output_layer.weight` of a tied model, on the last pipeline stage, gets the embedding. `etp` is
    (rank, size) for the weights of experts, where they are split otherwise than the rest."""
    table = {entry.name: entry for entry in entries(shape)}
    table.setdefault(OUTPUT, replace(table[EMBEDDING], name=OUTPUT))
    assert params.keys() <= table.keys(), sorted(params.keys() - table.keys())
    with torch.no_grad():
        for name, param in params.items():
            rank, size = etp if etp is not None and table[name].of_expert else (tp_rank, tp_size)
            local = shard(table[name], reader.read, shape, tp_rank=rank, tp_size=size)
            assert local.shape == param.shape, f"{name}: {tuple(param.shape)} is to be filled by {tuple(local.shape)}"
            # Weights kept in FP8 say that they are bf16: rounded to that first, they are what the policy computes with.
            param.copy_(local.to(param.dtype))


def check_accounted(reader: HFReader, shape: ModelShape) -> None:
    """Raise UserError unless the files hold exactly the tensors of the model, in the right shapes, in floats.

    A tied model's files may repeat the embedding as lm_head.weight, if it is the same.
    """
    needed = hf_tensors(shape)
    if shape.tied_embeddings and HF_OUTPUT in reader.tensors:
        needed[HF_OUTPUT] = needed[HF_EMBEDDING]
    beyond = tuple(f"model.layers.{shape.num_layers + i}." for i in range(shape.further_layers))
    found = {
        name: info
        for name, info in reader.tensors.items()
        if not name.endswith(NOT_WEIGHTS) and not name.startswith(beyond)
    }
    problems = mismatches({n: i.shape for n, i in found.items()}, needed, owner=f"a {shape.family} model")
    no_floats = sorted(f"{n} ({i.dtype})" for n, i in found.items() if i.dtype not in FLOATS)
    wrong = describe({**problems, f"not one of {', '.join(FLOATS)}": no_floats})
    if wrong:
        raise UserError(f"{reader.directory}: tensors do not match config.json -- {wrong}")
    if HF_OUTPUT in needed and shape.tied_embeddings and not _equal(reader, HF_EMBEDDING, HF_OUTPUT):
        raise UserError(
            f"{reader.directory}: config.json says tie_word_embeddings=true, but {HF_OUTPUT} differs from "
            f"{HF_EMBEDDING}; set it to false, or remove {HF_OUTPUT} from the files"
        )


def _equal(reader: HFReader, name: str, other: str) -> bool:
    a, b = reader.read(name), reader.read(other)
    starts = range(0, reader.tensors[name].shape[0], ROWS_AT_A_TIME)
    return all(torch.equal(a[i : i + ROWS_AT_A_TIME], b[i : i + ROWS_AT_A_TIME]) for i in starts)
