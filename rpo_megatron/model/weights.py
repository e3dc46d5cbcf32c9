"""Fill this rank's part of a model from a Hugging Face directory or from nothing, and gather it back for export."""

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from rpo_megatron.distributed import Groups, gather_objects
from rpo_megatron.model.build import Model
from rpo_megatron.model.chunks import chunks_of
from rpo_megatron.model.hf import check_accounted, load_shards, merge, stack_experts
from rpo_megatron.model.hf_io import HFReader
from rpo_megatron.model.shape import Head, ModelShape
from rpo_megatron.model.table import SCORE, Entry, entries, hf_tensors
from rpo_megatron.model.te_layers import canonical_name


def load_hf(model: Model, directory: str, groups: Groups, *, head: Head) -> None:
    """Stream the directory's tensors into the shards of the running layout.

    `head` is the one that the directory has; a value head that it lacks is left alone. Raises UserError when the files
    and the model do not account for each other tensor by tensor.
    """
    wanted = global_parameters(model)
    if head == "lm":
        wanted.pop(SCORE, None)
    with HFReader(directory) as reader:
        check_accounted(reader, replace(model.shape, head=head))
        load_shards(wanted, reader=reader, shape=model.shape, **_place(groups))


def draw_value_head(model: Model, seed: int, groups: Groups) -> None:
    """Fill the value head, on the stage that has it, as `load_random` would."""
    mine = {name: tensor for name, tensor in global_parameters(model).items() if name == SCORE}
    reader = _RandomTensors(model.shape, seed)
    load_shards(mine, reader=reader, shape=model.shape, **_place(groups))


def load_random(model: Model, seed: int, groups: Groups) -> None:
    """Normal(0, 0.02) weights, unit norms, zero biases: a function of (seed, tensor name), the same in every layout."""
    reader = _RandomTensors(model.shape, seed)
    load_shards(global_parameters(model), reader=reader, shape=model.shape, **_place(groups))


def _place(groups: Groups) -> dict[str, Any]:
    """Which shard of a weight is this rank's, for load_shards."""
    return {"tp_rank": groups.tp.rank, "tp_size": groups.tp.size, "etp": (groups.etp.rank, groups.etp.size)}


def global_parameters(model: Model) -> dict[str, torch.nn.Parameter]:
    """Parameters by the table's names: megatron's, with the layer's index in the whole model instead of in this chunk,
    and the expert's in the whole layer instead of on this rank."""
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = canonical_name(name).split(".", 3)
                layer = chunk.decoder.layers[int(local)]
                name = f"decoder.layers.{layer.layer_number - 1}.{_global_expert(layer, rest)}"
            named[name] = parameter
    return named


def _global_expert(layer: Any, name: str) -> str:
    """mlp.experts.local_experts.{local}.x.weight and, where a rank's experts are one module,
    mlp.experts.x.weight{local} -> mlp.experts.{in the whole layer}.x.weight; other names as they are."""
    single = re.fullmatch(r"mlp\.experts\.local_experts\.(?P<local>\d+)\.(?P<rest>.+)", name)
    found = single or re.fullmatch(r"mlp\.experts\.(?P<rest>.+\.weight)(?P<local>\d+)", name)
    if found is None:
        return name
    return f"mlp.experts.{layer.mlp.local_expert_indices[int(found['local'])]}.{found['rest']}"


def gather_hf(model: Model, groups: Groups) -> Iterator[tuple[str, torch.Tensor]]:
    """All Hugging Face tensors of the model, one megatron parameter at a time, whole and on the CPU of rank 0.

    Every rank must run the iterator to its end; the others get empty tensors. Peak memory is one parameter, or
    all experts of a layer where the files have one tensor for them.
    """
    return gather(global_parameters(model), entries(model.shape), model.shape, groups)


def gather(
    mine: Mapping[str, torch.Tensor], table: Iterable[Entry], shape: ModelShape, groups: Groups
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same for the weights of any table; `mine` are this rank's, by their names in it."""
    holders = gather_objects(
        _Holder(pp=groups.pp.rank, rank=groups.rank, tp=groups.tp.rank, etp=groups.etp.rank, names=frozenset(mine))
    )

    def merged() -> Iterator[tuple[Entry, dict[str, torch.Tensor]]]:
        for entry in table:
            owners = _owners(holders, entry)
            shard = mine[entry.name].detach().cpu() if groups.rank in owners else None
            shards = _send_to_leader(shard, owners, groups)
            yield entry, merge(entry, shards, shape) if groups.leads else dict.fromkeys(entry.tensors, torch.empty(0))

    yield from stack_experts(merged())


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """What a process holds, and where it stands."""

    pp: int
    rank: int
    tp: int
    etp: int
    names: frozenset[str]


def _owners(holders: list[_Holder], entry: Entry) -> list[int]:
    """Global ranks that hold the parameter's shards, in their order: of each shard, in the first stage that has it, the
    first process that has it."""
    first: dict[int, tuple[int, int]] = {}
    for holder in holders:
        if entry.name in holder.names:
            shard, place = holder.etp if entry.of_expert else holder.tp, (holder.pp, holder.rank)
            first[shard] = min(first.get(shard, place), place)
    return [first[shard][1] for shard in sorted(first)]


def _send_to_leader(shard: torch.Tensor | None, owners: list[int], groups: Groups) -> list[torch.Tensor]:
    """Point to point: the leader receives each owner's shard, the rest of the world does not take part."""
    if groups.leads:
        return [shard if owner == 0 and shard is not None else _receive(owner, groups) for owner in owners]
    if shard is not None:
        dist.send_object_list([(tuple(shard.shape), shard.dtype)], dst=0, device=groups.device)
        dist.send(shard.to(groups.device), dst=0)
    return []


def _receive(owner: int, groups: Groups) -> torch.Tensor:
    box: list[tuple[tuple[int, ...], torch.dtype]] = [((), torch.float32)]
    dist.recv_object_list(box, src=owner, device=groups.device)
    size, dtype = box[0]
    tensor = torch.empty(size, dtype=dtype, device=groups.device)
    dist.recv(tensor, src=owner)
    return tensor.cpu()


def generator_of(name: str, seed: int) -> torch.Generator:
    """What a tensor is drawn with, the same in every layout."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


class _RandomTensors:
    """Looks like an HFReader; every tensor is drawn when it is asked for."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.sizes = hf_tensors(shape)
        self.unit_norm = torch.ones if shape.norm == "rms" else torch.zeros
        self.seed = seed
        self.last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def read(self, name: str) -> torch.Tensor:
        size = self.sizes[name]
        if name.endswith("norm.weight"):
            return self.unit_norm(size)
        if name.endswith("bias"):
            return torch.zeros(size)
        if self.last[0] != name:  # each of a layer's experts asks for the tensor of all
            self.last = name, torch.randn(size, generator=generator_of(name, self.seed)) * 0.02
        return self.last[1]
