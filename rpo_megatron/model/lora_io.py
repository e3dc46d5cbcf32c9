"""Fill a model's adapters from nothing or from PEFT's files, gather them for export, and shard them for checkpoints.

Of a reward model the value head goes with them: it is trained, and the base has none or another.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from safetensors.torch import load_file, save_file

from rpo_megatron.distributed import Groups
from rpo_megatron.model.adapter import LORA_A, Adapter, adapter_entries
from rpo_megatron.model.hf import shard
from rpo_megatron.model.lora import adapter_of, adapter_parameters
from rpo_megatron.model.peft_format import PREFIX, WEIGHTS, write_config
from rpo_megatron.model.table import SCORE, Entry, entries
from rpo_megatron.model.weights import gather, generator_of


def draw(model: Any, seed: int, groups: Groups) -> None:
    """PEFT's start: A uniform in +-1 / sqrt(in) (kaiming_uniform_ with a = sqrt(5)), B zero. A function of (seed,
    tensor name), the same in every layout."""
    sizes = {name: size for entry in _own_entries(model) for name, size in entry.tensors.items()}

    def drawn(name: str) -> torch.Tensor:
        size = sizes[name]
        if not name.endswith(f"{LORA_A}.weight"):
            return torch.zeros(size)
        return (2 * torch.rand(size, generator=generator_of(name, seed)) - 1) / math.sqrt(size[1])

    _fill(model, _own_entries(model), drawn, groups)


def load_peft(model: Any, directory: str | Path, groups: Groups) -> None:
    """From a directory that read_peft has checked. A value head that it lacks is left as it is."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(Path(directory) / WEIGHTS).items()}
    found = [entry for entry in _entries(model) if entry.tensors.keys() <= tensors.keys()]
    _fill(model, found, tensors.__getitem__, groups)


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
    return gather(mine, _entries(model), model.shape, groups)


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


def _fill(model: Any, rows: list[Entry], read: Callable[[str], torch.Tensor], groups: Groups) -> None:
    """Those of the rows that this rank has a part of; `read` as hf.shard's."""
    parameters = adapter_parameters(model)
    with torch.no_grad():
        for entry in rows:
            if entry.name in parameters:
                local = shard(entry, read, model.shape, tp_rank=groups.tp.rank, tp_size=groups.tp.size)
                parameters[entry.name].copy_(local.reshape(parameters[entry.name].shape))


def _own_entries(model: Any) -> list[Entry]:
    return adapter_entries(model.shape, _adapter(model))


def _entries(model: Any) -> list[Entry]:
    """With a reward model's value head."""
    return [*_own_entries(model), *(entry for entry in entries(model.shape) if entry.name == SCORE)]


def _adapter(model: Any) -> Adapter:
    adapter = adapter_of(model)
    assert adapter is not None
    return adapter
