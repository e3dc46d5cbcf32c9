"""Checkpoints: megatron-core's distributed format inside a directory that is either complete or not there.

Saving (see model/source.py for the directory):
1. rank 0 makes `.step-N.incomplete` with config.yaml and hf/, and every rank writes its shards into it,
2. the ranks share the work of hashing all these files,
3. rank 0 adds state.json with the checksums, flushes, renames to `step-N`,
4. and only then points `latest` at it and removes the oldest.
A process killed at any moment leaves the previous checkpoint in force.

Loading checks that the checkpoint fits the run, then every checksum, then loads with megatron's strictest setting. Any
layout loads what any other wrote. A shard file is a pickle in part: load only checkpoints that you trust; weights are
exchanged as safetensors (`rpo export`).
"""

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from rpo_megatron import __version__
from rpo_megatron.distributed import Groups, barrier, gather_objects, on_leader
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import put_in_place, sha256, write_json, write_text_atomically
from rpo_megatron.model import compat
from rpo_megatron.model.adapter import Adapter
from rpo_megatron.model.build import Model
from rpo_megatron.model.companions import copy_companions
from rpo_megatron.model.lora import adapter_of, attach, merge
from rpo_megatron.model.lora_io import restore_adapter, sharded_adapter
from rpo_megatron.model.shape import VALUE_ARCHITECTURE, Head, ModelShape, read_shape
from rpo_megatron.model.source import CHECKPOINTS, FORMAT, HF, LATEST, SHARDS, STATE, Source, read_state
from rpo_megatron.model.table import SCORE
from rpo_megatron.model.weights import draw_value_head, load_hf
from rpo_megatron.training.optimizer import load_state
from rpo_megatron.training.resume import RunState, check_same, difference

INCOMPLETE, DISCARDED = ".incomplete", ".discarded"
"""How the names of directories end that are being written, and deleted."""
SHARDING = "fully_reshardable"
"""How the optimizer's state is cut: the only one of megatron's kinds that any layout can load."""
EXTRA_STATE = "_extra_state"
"""Of Transformer Engine's modules, and of some of megatron's, the end of a name: which module has one depends on the
kind of layers, with which a checkpoint has nothing to do."""
STRICT = {
    StrictHandling.RAISE_ALL: StrictHandling.RETURN_ALL,
    StrictHandling.RAISE_UNEXPECTED: StrictHandling.RETURN_UNEXPECTED,
}
"""What to ask megatron for, to raise for everything but extra states."""
NOT_WEIGHTS = ("dtype", "pad_token")
"""Fields of ModelShape that say nothing about the weights."""
HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def save(
    model: Model,
    optimizer: Any,
    *,
    directory: Path,
    state: RunState,
    config_text: str,
    companions: Path,
    groups: Groups,
) -> None:
    """Write a complete checkpoint at `directory`, or nothing. Every rank must call this.

    `optimizer` may be None (weights only); `companions` is the Hugging Face directory whose config and tokenizer go
    along.
    """
    staging = directory.with_name(f".{directory.name}{INCOMPLETE}")
    dtype, head = HF_DTYPES[state.precision], model.shape.head
    on_leader(lambda: _begin(staging, config_text, companions, dtype=dtype, head=head))
    dist_checkpointing.save(
        _sharded_state(model, optimizer, groups, is_loading=False),
        str(staging / SHARDS),
        compat.save_strategy(),
        content_metadata={"distrib_optim_sharding_type": SHARDING},
    )
    barrier()
    checksums = _checksums(staging, groups)
    record = {
        "format": FORMAT,
        **asdict(state),
        "model": asdict(model.shape),
        "adapter": _adapter_record(adapter_of(model)),
        "layout": {
            "tensor": groups.tp.size,
            "pipeline": groups.pp.size,
            "virtual": groups.virtual,
            "context": groups.cp.size,
            "expert": groups.ep.size,
            "data": groups.dp.size,
        },
        "rpo_megatron": __version__,
        "megatron_core": megatron_version,
        "has_optimizer": optimizer is not None,
        "files": checksums,
    }
    on_leader(lambda: _complete(staging, directory, record))


def load(model: Model, optimizer: Any, *, directory: Path, expected: RunState, groups: Groups) -> None:
    """Restore weights and optimizer in place. Every rank must call this.

    `expected` is what the run would write now, at step 0: everything but step and consumed must agree. Raises
    UserError when it does not, or when files are damaged.
    """
    check_fits(directory, shape=model.shape, adapter=adapter_of(model), expected=expected, groups=groups)
    _verify(directory, read_state(directory), groups)
    sharded = _sharded_state(model, optimizer, groups, is_loading=True)
    loaded = _load(sharded, directory, StrictHandling.RAISE_ALL)
    if adapter_of(model) is None:
        _restore(model, loaded["model"])
    else:
        restore_adapter(model, loaded["model"])
    load_state(optimizer, loaded["optimizer"])


def check_fits(
    directory: Path, *, shape: ModelShape, adapter: Adapter | None, expected: RunState, groups: Groups
) -> None:
    """Raises UserError, as `load` would, where the run of `expected`, which trains a model of this shape or an adapter
    of one, cannot go on from a checkpoint. Reads its state.json alone."""
    record = read_state(directory)
    _check_shape(directory, record, shape)
    _check_adapter(directory, record, adapter, expected)
    if not record["has_optimizer"]:
        raise UserError(f"{directory}: holds weights only and cannot be resumed; start from it with model.path")
    check_same(directory, record, expected)
    _check_experts(directory, record["layout"].get("expert", 1), groups)


def load_weights(model: Model, source: Source, groups: Groups, *, seed: int | None = None) -> None:
    """Fill a model from a Hugging Face directory or a checkpoint, cast to the model's precision.

    A language model may fill a reward model: its output layer stays behind, and the value head is drawn from `seed`.
    An adapter is merged into its base. Raises UserError for a value head without a seed, and for a reward model where a
    language model is wanted.
    """
    if source.adapter is not None:
        load_adapted(model, source, source.base(), groups, seed=seed)
        merge(model)
        return
    head = read_shape(source.hf).head
    _check_head(source, head, model, may_draw=seed is not None)
    if source.kind == "huggingface":
        load_hf(model, str(source.path), groups, head=head)
    else:
        _load_checkpoint(model, source.path, groups, head=head)
    if head != model.shape.head:
        assert seed is not None
        draw_value_head(model, seed, groups)


def load_adapted(model: Model, source: Source, base: Source, groups: Groups, *, seed: int | None = None) -> None:
    """Fill a model from the base of an adapter, and give it the adapter of the checkpoint `source`. Arguments and
    errors as those of load_weights; `base` is trusted to be the adapter's."""
    assert source.adapter is not None
    _check_head(source, read_shape(source.hf).head, model, may_draw=seed is not None)
    # A value head that the base lacks is in the checkpoint, if it is a reward model's.
    load_weights(model, base, groups, seed=0 if seed is None else seed)
    attach(model, Adapter.of(source.adapter))
    load_adapter(model, source, groups)


def load_adapter(model: Model, source: Source, groups: Groups) -> None:
    """Fill the adapter that a model has; a value head that the checkpoint lacks is left alone."""
    record = read_state(source.path)
    _verify(source.path, record, groups)
    sharded = sharded_adapter(model)
    if read_shape(source.hf).head == "lm":
        sharded.pop(SCORE, None)
    restore_adapter(model, _load({"model": sharded}, source.path, StrictHandling.RAISE_UNEXPECTED)["model"])


def _check_head(source: Source, head: Head, model: Model, *, may_draw: bool) -> None:
    if head == "value" and model.shape.head == "lm":
        raise UserError(
            f"{source.path}: is a reward model and has no output layer to take log-probabilities from; give a language "
            f"model"
        )
    if head == "lm" and model.shape.head == "value" and not may_draw:
        raise UserError(
            f"{source.path}: is no reward model: it has no value head; give one that an objective with a value head "
            f"has trained, or a Hugging Face ...{VALUE_ARCHITECTURE} with one label"
        )


def _load_checkpoint(model: Model, directory: Path, groups: Groups, *, head: Head) -> None:
    record = read_state(directory)
    _check_shape(directory, record, replace(model.shape, head=head))
    _verify(directory, record, groups)
    # In the state dict of several chunks, their numbers come before the names.
    drawn = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(SCORE) and head == "lm"}
    sharded = model.sharded_state_dict(metadata=_metadata(groups))
    sharded = {name: tensor for name, tensor in sharded.items() if name not in drawn}
    loaded = _load({"model": sharded}, directory, StrictHandling.RAISE_UNEXPECTED)["model"]
    _restore(model, {**loaded, **drawn})


def _restore(model: Model, loaded: dict[str, Any]) -> None:
    """Load weights. Of Transformer Engine's extra states, empty but for the scales of delayed scaling, those are taken
    that belong to the model's recipe; for others it keeps its own."""
    own = {name: state for name, state in model.state_dict().items() if name.endswith(EXTRA_STATE)}
    if not (model.config.fp8 and model.config.fp8_recipe == "delayed"):
        loaded = {name: tensor for name, tensor in loaded.items() if EXTRA_STATE not in name}
    with compat.pickled_scales():
        model.load_state_dict({**own, **loaded})


def make_latest(directory: Path, *, keep: int) -> None:
    """Point `latest` at a complete checkpoint, then remove all but the `keep` newest up to it. Later steps, from before
    somebody pointed `latest` back, are left alone."""
    write_text_atomically(directory.parent / LATEST, directory.name + "\n")
    so_far = sorted(path for path in directory.parent.glob("step-*") if path.is_dir() and path.name <= directory.name)
    for old in so_far[:-keep]:
        shutil.rmtree(old)


def step_directory(run_dir: str, step: int) -> Path:
    return Path(run_dir) / CHECKPOINTS / f"step-{step:08d}"


def _metadata(groups: Groups) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": SHARDING,
        # The first data rank alone puts its part of the optimizer together, in host memory; else all do, on the device
        # as well, for one of them to write it.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": groups.replicas.group,
    }


def _sharded_state(model: Model, optimizer: Any, groups: Groups, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata(groups)
    has_adapter = adapter_of(model) is not None
    weights = sharded_adapter(model) if has_adapter else model.sharded_state_dict(metadata=metadata)
    sharded: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"], is_loading=is_loading, metadata=metadata)
    return sharded


def _load(sharded: dict[str, Any], directory: Path, strict: StrictHandling) -> dict[str, Any]:
    try:
        loaded, *mismatches = dist_checkpointing.load(sharded, str(directory / SHARDS), strict=STRICT[strict])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        raise UserError(f"{directory}: does not fit this model or is damaged: {error}") from error
    different = sorted({key for keys in mismatches for key in keys if EXTRA_STATE not in key})
    if different:
        raise UserError(f"{directory}: does not fit this model, which lacks or adds {', '.join(different)}")
    return loaded


def _check_adapter(directory: Path, record: dict[str, Any], adapter: Adapter | None, expected: RunState) -> None:
    here = _adapter_record(adapter)
    if record.get("adapter") != here:
        raise UserError(
            f"{directory}: was written by a run with another adapter ({difference(record.get('adapter'), here)}); set "
            f"the section `lora` back, or start a new run in another run_dir"
        )
    if expected.base is not None and record["base"]["weights"] != expected.base["weights"]:
        raise UserError(
            f"{directory}: holds an adapter of other weights ({record['base']['path']}, "
            f"{record['base']['weights'][:12]}; here {expected.base['path']}, {expected.base['weights'][:12]}); set "
            f"model.path back, or start a new run in another run_dir"
        )


def _adapter_record(adapter: Adapter | None) -> dict[str, Any] | None:
    return None if adapter is None else asdict(adapter) | {"targets": list(adapter.targets)}


def _check_experts(directory: Path, saved: int, groups: Groups) -> None:
    """megatron keeps two optimizers where experts are shared out over ranks and one where they are not, and cannot turn
    one kind of checkpoint into the other. Weights alone load anywhere."""
    if (saved > 1) != (groups.ep.size > 1):
        raise UserError(
            f"{directory}: its optimizer was saved with parallel.expert={saved}, which cannot be resumed with "
            f"parallel.expert={groups.ep.size}: either both are 1 or neither is; or start a new run from its weights "
            f"with model.path"
        )


def _check_shape(directory: Path, record: dict[str, Any], shape: ModelShape) -> None:
    ours = json.loads(json.dumps(asdict(shape)))
    # What a checkpoint does not say was no choice yet when it was written.
    theirs = {field.name: field.default for field in fields(shape)} | record["model"]
    different = [name for name in ours if name not in NOT_WEIGHTS and theirs.get(name) != ours[name]]
    if different:
        listed = ", ".join(f"{name} is {theirs.get(name)} there, {ours[name]} here" for name in different)
        raise UserError(
            f"{directory}: holds another model: {listed}; use another run_dir or the model it was made from"
        )


def _checksums(directory: Path, groups: Groups) -> dict[str, str]:
    """sha256 of every file, each rank reading its share of them."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    mine = {name: sha256(directory / name) for name in names[groups.rank :: groups.world]}
    return {name: sha for part in gather_objects(mine) for name, sha in part.items()}


def _verify(directory: Path, record: dict[str, Any], groups: Groups) -> None:
    names = sorted(record["files"])
    mine = names[groups.rank :: groups.world]
    damaged = [n for n in mine if not (directory / n).is_file() or sha256(directory / n) != record["files"][n]]
    every = [name for part in gather_objects(damaged) for name in part]
    if every:
        raise UserError(
            f"{directory}: damaged or missing: {', '.join(every)}; restore them, or write the name of another "
            f"checkpoint into {directory.parent / LATEST}"
        )


def _begin(staging: Path, config_text: str, companions: Path, *, dtype: str, head: Head) -> None:
    _discard_unfinished(staging)
    for name in (SHARDS, HF):
        (staging / name).mkdir(parents=True)
    copy_companions(companions, staging / HF, dtype=dtype, head=head)
    (staging / "config.yaml").write_text(config_text, encoding="utf-8")


def _discard_unfinished(staging: Path) -> None:
    """Delete what runs left here that died while writing, this step or another, which may never be written again. It
    loses its name first, in one step: a process that writes it after all fails, and cannot complete what is half
    deleted."""
    left = {staging, staging.with_suffix(DISCARDED)}
    left |= {path for suffix in (DISCARDED, INCOMPLETE) for path in staging.parent.glob(f".step-*{suffix}")}
    for path in sorted(left):  # what is half deleted already comes before what takes its name
        if path.exists():
            shutil.rmtree(path.rename(path.with_suffix(DISCARDED)))


def _complete(staging: Path, directory: Path, record: dict[str, Any]) -> None:
    write_json(staging / STATE, record)
    if directory.exists():
        shutil.rmtree(directory)  # of this step, and not the one that this run went on from
    put_in_place(staging, directory)
