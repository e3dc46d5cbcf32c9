"""Fill this rank's part of a model from a Hugging Face directory or from nothing, and gather it back for export."""

import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist

from rpo_megatron.distributed import Groups, gather_objects
from rpo_megatron.model.build import ScoringModel
from rpo_megatron.model.hf import SCORE, Entry, check_accounted, entries, load_shards, merge
from rpo_megatron.model.hf_io import HFReader
from rpo_megatron.model.shape import Head, ModelShape
from rpo_megatron.model.te_layers import canonical_name


def load_hf(model: ScoringModel, directory: str, groups: Groups, *, head: Head) -> None:
    """Stream the directory's tensors into the shards of the running layout.

    `head` is the one that the directory has; a value head that it lacks is left alone. Raises UserError when the files
    and the model do not account for each other tensor by tensor.
    """
    wanted = global_parameters(model)
    if head == "lm":
        wanted.pop(SCORE, None)
    with HFReader(directory) as reader:
        check_accounted(reader, replace(model.shape, head=head))
        load_shards(wanted, reader=reader, shape=model.shape, tp_rank=groups.tp.rank, tp_size=groups.tp.size)


def draw_value_head(model: ScoringModel, seed: int, groups: Groups) -> None:
    """Fill the value head, on the stage that has it, as `load_random` would."""
    mine = {name: tensor for name, tensor in global_parameters(model).items() if name == SCORE}
    reader = _RandomTensors(model.shape, seed)
    load_shards(mine, reader=reader, shape=model.shape, tp_rank=groups.tp.rank, tp_size=groups.tp.size)


def load_random(model: ScoringModel, seed: int, groups: Groups) -> None:
    """Normal(0, 0.02) weights, unit norms, zero biases: a function of (seed, tensor name), the same in every layout."""
    reader = _RandomTensors(model.shape, seed)
    load_shards(
        global_parameters(model), reader=reader, shape=model.shape, tp_rank=groups.tp.rank, tp_size=groups.tp.size
    )


def global_parameters(model: ScoringModel) -> dict[str, torch.nn.Parameter]:
    """Parameters by megatron's name, with the layer's index in the whole model instead of in this stage."""
    named: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = canonical_name(name).split(".", 3)
            name = f"decoder.layers.{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
        named[name] = parameter
    return named


def gather_hf(model: ScoringModel, groups: Groups) -> Iterator[tuple[str, torch.Tensor]]:
    """All Hugging Face tensors of the model, one megatron parameter at a time, whole and on the CPU of rank 0.

    Every rank must run the iterator to its end; the others get empty tensors. Peak memory is one parameter.
    """
    mine = global_parameters(model)
    stages = gather_objects((groups.rank, groups.pp.rank, groups.replicas.rank, groups.tp.rank, sorted(mine)))
    for entry in entries(model.shape):
        owners = _owners(stages, entry)
        shard = mine[entry.name].detach().cpu() if groups.rank in owners else None
        shards = _send_to_leader(shard, owners, groups)
        tensors = merge(entry, shards, model.shape) if groups.leads else dict.fromkeys(entry.sources, torch.empty(0))
        yield from tensors.items()


def _owners(stages: list[tuple[int, int, int, int, list[str]]], entry: Entry) -> list[int]:
    """Global ranks that hold the parameter's shards, in TP order: first stage that has it, first replica."""
    holding = [(pp, tp, rank) for rank, pp, replica, tp, names in stages if replica == 0 and entry.name in names]
    first_stage = min(pp for pp, _, _ in holding)
    return [rank for pp, _, rank in sorted(holding) if pp == first_stage]


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


class _RandomTensors:
    """Looks like an HFReader; every tensor is drawn when it is asked for."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.sizes = {name: size for entry in entries(shape) for name, size in entry.sources.items()}
        self.seed = seed

    def read(self, name: str) -> torch.Tensor:
        size = self.sizes[name]
        if name.endswith("norm.weight"):
            return torch.ones(size)
        if name.endswith(".bias"):
            return torch.zeros(size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        return torch.randn(size, generator=generator) * 0.02
