"""Fill a model's adapters from nothing or from PEFT's files, gather them for export, and shard them for checkpoints.

Of a reward model the value head goes with them: it is trained, and the base has none or another.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from safetensors.torch import load_file, save_file

from rpo_megatron.distributed import Groups
from rpo_megatron.model.adapter import IN, Adapter, adapter_entries
from rpo_megatron.model.hf import TensorSource, shard
from rpo_megatron.model.lora import adapter_of, adapter_parameters
from rpo_megatron.model.peft_format import PREFIX, WEIGHTS, peft_tensors, write_config
from rpo_megatron.model.shape import ModelShape
from rpo_megatron.model.table import SCORE, Entry, entries
from rpo_megatron.model.weights import gather


def draw(model: Any, seed: int, groups: Groups) -> None:
    """PEFT's start: A uniform in +-1 / sqrt(in) (kaiming_uniform_ with a = sqrt(5)), B zero. A function of (seed,
    tensor name), the same in every layout."""
    _fill(model, _Drawn(model.shape, _adapter(model), seed), groups, names=_own_names(model))


def load_peft(model: Any, directory: str | Path, groups: Groups) -> None:
    """From a directory that read_peft has checked. A value head that it lacks is left as it is."""
    tensors = load_file(Path(directory) / WEIGHTS)
    source = _Tensors({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    names = _own_names(model) | ({SCORE} if SCORE in source.tensors else set())
    _fill(model, source, groups, names=names)


def write_peft(model: Any, directory: Path, groups: Groups, *, base: str, dtype: torch.dtype) -> None:
    """adapter_config.json and adapter_model.safetensors, by rank 0; `base` is what PEFT shall find the base under."""
    tensors = dict(gather_adapter(model, groups))
    if groups.leads:
        write_config(directory, _adapter(model), base=base, shape=model.shape)
        whole = {f"{PREFIX}{name}": tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        save_file(whole, directory / WEIGHTS, metadata={"format": "pt"})


def gather_adapter(model: Any, groups: Groups) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the adapter by PEFT's names without PREFIX, as weights.gather_hf gives a model's."""
    # B of gate and up: rows under rows
    mine = {name: parameter.detach().flatten(0, -2) for name, parameter in adapter_parameters(model).items()}
    return gather(mine, _table(model).values(), model.shape, groups)


def sharded_adapter(model: Any) -> dict[str, Any]:
    """For megatron's distributed checkpoints: names and cuts know neither stages nor chunks."""
    named = adapter_parameters(model)
    axes = {name: p.partition_dim for name, p in named.items() if getattr(p, "tensor_model_parallel", False)}
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(dict(named), "", axes)
    return sharded


def restore_adapter(model: Any, loaded: Mapping[str, torch.Tensor]) -> None:
    """What megatron read for sharded_adapter, into its place."""
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name in loaded:
                parameter.copy_(loaded[name])


def _fill(model: Any, source: TensorSource, groups: Groups, *, names: set[str]) -> None:
    table = _table(model)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name in names:
                local = shard(table[name], source.read, model.shape, tp_rank=groups.tp.rank, tp_size=groups.tp.size)
                parameter.copy_(local.reshape(parameter.shape))


def _table(model: Any) -> dict[str, Entry]:
    rows = adapter_entries(model.shape, _adapter(model))
    return {entry.name: entry for entry in [*rows, *(row for row in entries(model.shape) if row.name == SCORE)]}


def _own_names(model: Any) -> set[str]:
    return {entry.name for entry in adapter_entries(model.shape, _adapter(model))}


def _adapter(model: Any) -> Adapter:
    adapter = adapter_of(model)
    assert adapter is not None
    return adapter


class _Tensors:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class _Drawn:
    """Looks like a file; every tensor is drawn when it is asked for."""

    def __init__(self, shape: ModelShape, adapter: Adapter, seed: int) -> None:
        self.sizes = peft_tensors(shape, adapter)
        self.seed = seed

    def read(self, name: str) -> torch.Tensor:
        size = self.sizes[name]
        if not name.endswith(f"{IN}.weight"):
            return torch.zeros(size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        return (2 * torch.rand(size, generator=generator) - 1) / math.sqrt(size[1])
