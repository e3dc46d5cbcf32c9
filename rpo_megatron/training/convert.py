"""`rpo export` and `rpo import`: our checkpoints to and from Hugging Face directories, under any layout."""

from pathlib import Path

import torch

from rpo_megatron import config_io
from rpo_megatron.config import ParallelConfig
from rpo_megatron.config_verbs import ExportConfig, ImportConfig
from rpo_megatron.distributed import Groups, barrier, on_leader, start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import put_in_place
from rpo_megatron.model.build import DTYPES, Model, Precision, build
from rpo_megatron.model.companions import copy_companions
from rpo_megatron.model.hf_io import HFWriter
from rpo_megatron.model.layout import check_layout
from rpo_megatron.model.lora_io import write_peft
from rpo_megatron.model.shape import num_parameters, read_shape
from rpo_megatron.model.source import Source, find, read_state
from rpo_megatron.model.table import HF_EXPERT_BIAS
from rpo_megatron.model.weights import gather_hf
from rpo_megatron.training import checkpoint
from rpo_megatron.training.checkpoint import HF_DTYPES, RunState, load_adapted, load_weights
from rpo_megatron.training.parity import verify


def export(config: ExportConfig) -> None:
    """Write config, tokenizer, generation config and sharded safetensors that `transformers` loads."""
    groups = start(ParallelConfig(tensor=config.tensor, pipeline=config.pipeline))
    source = find(config.load)
    if source.kind != "checkpoint":
        raise UserError(f"'{config.load}' is a Hugging Face directory already; give a checkpoint or a run directory")
    _check_is_new(config.save)
    _check_format(config, source)
    precision = read_state(source.path)["precision"]
    shape = read_shape(source.hf)
    check_layout(shape, tensor=config.tensor, pipeline=config.pipeline)
    # Where the verification runs the model: without rounding, and experts ask for sequence parallelism.
    inside: Precision = "fp32" if config.verify else precision
    model = build(shape, precision=inside, sequence_parallel=config.tensor > 1, groups=groups)
    if config.format == "peft":
        _export_adapter(model, config, source, dtype=HF_DTYPES[precision], groups=groups)
        stop()
        return
    load_weights(model, source, groups)
    _round(model, DTYPES[precision])
    write_hf(model, config, source.hf, dtype=HF_DTYPES[precision], groups=groups)
    if groups.leads:
        print(f"exported {source.path} ({num_parameters(shape):,} parameters, {precision}) -> {config.save}")
    if config.verify:
        parity = verify(model, config.save, groups)
        if groups.leads:
            print(f"verified {config.save}: {parity}")
    stop()


def _round(model: Model, dtype: torch.dtype) -> None:
    """Weights to what their files can hold, which is what a verification compares: a base, and its sum with an adapter,
    are finer where the model is fp32 and the files are not."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def _check_format(config: ExportConfig, source: Source) -> None:
    if config.format == "peft" and source.adapter is None:
        raise UserError(
            f"format=peft: {source.path} is a whole model, without an adapter; export it with format=merged"
        )
    if config.format == "peft" and config.verify:
        raise UserError("verify=true opens a whole model with `transformers`; use it with format=merged")


def _export_adapter(model: Model, config: ExportConfig, source: Source, *, dtype: str, groups: Groups) -> None:
    base, directory = source.base(), Path(config.save)
    load_adapted(model, source, base, groups)
    staging = directory.with_name(f"{directory.name}.incomplete")
    on_leader(lambda: staging.mkdir(parents=True, exist_ok=True))
    write_peft(model, staging, groups, base=str(base.path), dtype=getattr(torch, dtype))
    on_leader(lambda: put_in_place(staging, directory))
    if groups.leads:
        print(f"exported the adapter {source.path} of {base.path} -> {config.save}")
        if base.kind == "checkpoint":
            print(
                f"PEFT needs this base as a Hugging Face directory: `rpo export {base.path} save=DIR`, and DIR as "
                f"base_model_name_or_path in adapter_config.json"
            )


def write_hf(model: Model, config: ExportConfig, companions: Path, *, dtype: str, groups: Groups) -> None:
    """Gather the model parameter by parameter and write it on rank 0, in `dtype` (torch's name)."""
    tensors = gather_hf(model, groups)
    if not groups.leads:
        for _ in tensors:
            pass
    else:
        with HFWriter(config.save, max_shard_bytes=int(config.max_shard_gb * 1e9)) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor if name.endswith(HF_EXPERT_BIAS) else tensor.to(getattr(torch, dtype)))
            copy_companions(companions, writer.staging, dtype=dtype, head=model.shape.head)
    barrier()  # all wait until the directory has its name


def import_(config: ImportConfig) -> None:
    """Write a weights-only checkpoint; `model.path` may point at it, under any layout."""
    groups = start(ParallelConfig(tensor=config.tensor, pipeline=config.pipeline))
    source = find(config.load)
    _check_is_new(config.save)
    directory = Path(config.save)
    shape = read_shape(source.hf)
    check_layout(shape, tensor=config.tensor, pipeline=config.pipeline)
    model = build(shape, precision=config.precision, sequence_parallel=False, groups=groups)
    load_weights(model, source, groups)
    state = RunState(step=0, consumed=0, groups_per_step=0, seed=0, precision=config.precision, data="", reference=None)
    checkpoint.save(
        model,
        None,
        directory=directory,
        state=state,
        config_text=config_io.dump(config),
        companions=source.hf,
        groups=groups,
    )
    if groups.leads:
        print(f"imported {source.path} ({num_parameters(shape):,} parameters, {config.precision}) -> {directory}")
    stop()


def _check_is_new(directory: str) -> None:
    if Path(directory).exists():
        raise UserError(f"save: '{directory}' exists already; give a directory that does not")
