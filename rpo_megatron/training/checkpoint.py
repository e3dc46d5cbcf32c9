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
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from rpo_megatron.distributed import Groups, barrier, gather_objects, on_leader
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import fsync, fsync_tree, sha256, write_json, write_text_atomically
from rpo_megatron.model import compat
from rpo_megatron.model.build import ScoringModel
from rpo_megatron.model.companions import copy_companions
from rpo_megatron.model.shape import VALUE_ARCHITECTURE, Head, ModelShape, read_shape
from rpo_megatron.model.source import CHECKPOINTS, FORMAT, HF, LATEST, SHARDS, STATE, Source, read_state
from rpo_megatron.model.table import SCORE
from rpo_megatron.model.weights import draw_value_head, load_hf

SHARDING = "fully_reshardable"
"""How the optimizer's state is cut: the only one of megatron's kinds that any layout can load."""
NOT_WEIGHTS = ("dtype", "pad_token")
"""Fields of ModelShape that say nothing about the weights."""
HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint knows besides tensors. Nothing in a step draws random numbers: (seed, step) is all of it."""

    step: int
    """Updates done."""
    consumed: int
    """Groups consumed."""
    groups_per_step: int
    """With the step it says which groups come next, so it may not change in the middle of a run."""
    seed: int
    precision: str
    data: str
    """Fingerprint of the training store."""
    reference: dict[str, str] | None
    """Identity of the reference, None for a method without one."""


def save(
    model: ScoringModel,
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
    staging = directory.with_name(f".{directory.name}.incomplete")
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
        "layout": {
            "tensor": groups.tp.size,
            "pipeline": groups.pp.size,
            "context": groups.cp.size,
            "expert": groups.ep.size,
            "data": groups.dp.size,
        },
        "megatron_core": megatron_version,
        "has_optimizer": optimizer is not None,
        "files": checksums,
    }
    on_leader(lambda: _complete(staging, directory, record))


def load(model: ScoringModel, optimizer: Any, *, directory: Path, expected: RunState, groups: Groups) -> RunState:
    """Restore weights and optimizer in place, and give the state of the run. Every rank must call this.

    `expected` is what the run would write now, at step 0: everything but step and consumed must agree. Raises
    UserError when it does not, or when files are damaged.
    """
    record = read_state(directory)
    _check_fits(directory, record, model, expected)
    _check_experts(directory, record["layout"].get("expert", 1), groups)
    _verify(directory, record, groups)
    sharded = _sharded_state(model, optimizer, groups, is_loading=True)
    loaded = _load(sharded, directory, StrictHandling.RAISE_ALL)
    model.load_state_dict(loaded["model"])
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    return RunState(**{name: record[name] for name in RunState.__dataclass_fields__})


def load_weights(model: ScoringModel, source: Source, groups: Groups, *, seed: int | None = None) -> None:
    """Fill a model from a Hugging Face directory or a checkpoint, cast to the model's precision.

    A language model may fill a reward model: its output layer stays behind, and the value head is drawn from `seed`.
    Raises UserError for that without a seed, and for a reward model where a language model is wanted.
    """
    head = read_shape(source.hf).head
    _check_head(source, head, model, may_draw=seed is not None)
    if source.kind == "huggingface":
        load_hf(model, str(source.path), groups, head=head)
    else:
        _load_checkpoint(model, source.path, groups, head=head)
    if head != model.shape.head:
        assert seed is not None
        draw_value_head(model, seed, groups)


def _check_head(source: Source, head: Head, model: ScoringModel, *, may_draw: bool) -> None:
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


def _load_checkpoint(model: ScoringModel, directory: Path, groups: Groups, *, head: Head) -> None:
    record = read_state(directory)
    _check_shape(directory, record, replace(model.shape, head=head))
    _verify(directory, record, groups)
    sharded = model.sharded_state_dict(metadata=_metadata(groups))
    if head == "lm":
        sharded.pop(SCORE, None)
    loaded = _load({"model": sharded}, directory, StrictHandling.RAISE_UNEXPECTED)["model"]
    left_alone = {name: tensor for name, tensor in model.state_dict().items() if name == SCORE and head == "lm"}
    model.load_state_dict({**loaded, **left_alone})


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
    return {"distrib_optim_sharding_type": SHARDING, "dp_cp_group": groups.replicas.group}


def _sharded_state(model: ScoringModel, optimizer: Any, groups: Groups, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata(groups)
    sharded: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"], is_loading=is_loading, metadata=metadata)
    return sharded


def _load(sharded: dict[str, Any], directory: Path, strict: StrictHandling) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(sharded, str(directory / SHARDS), strict=strict)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        raise UserError(f"{directory}: does not fit this model or is damaged: {error}") from error


def _check_fits(directory: Path, record: dict[str, Any], model: ScoringModel, expected: RunState) -> None:
    _check_shape(directory, record, model.shape)
    if not record["has_optimizer"]:
        raise UserError(f"{directory}: holds weights only and cannot be resumed; start from it with model.path")
    advice = {
        "groups_per_step": "set train.groups_per_step back",
        "precision": "set precision back",
        "seed": "set seed back",
        "data": "point data.train back at the store that the run began with",
        "reference": "set reference.path, precision and the store back to what the run began with",
    }
    for name, what in advice.items():
        there, here = record[name], getattr(expected, name)
        if there != here:
            raise UserError(
                f"{directory}: was written by a run with another {name} ({_difference(there, here)}); {what}, or start "
                f"a new run in another run_dir"
            )


def _check_experts(directory: Path, saved: int, groups: Groups) -> None:
    """megatron keeps two optimizers where experts are shared out over ranks and one where they are not, and cannot turn
    one kind of checkpoint into the other. Weights alone load anywhere."""
    if (saved > 1) != (groups.ep.size > 1):
        raise UserError(
            f"{directory}: its optimizer was saved with parallel.expert={saved}, which cannot be resumed with "
            f"parallel.expert={groups.ep.size}: either both are 1 or neither is; or start a new run from its weights "
            f"with model.path"
        )


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        return ", ".join(f"{name}: {before.get(name)} there, {now.get(name)} here" for name in names)
    return f"{before} there, {now} here"


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
    if staging.exists():
        shutil.rmtree(staging)  # left by a run that died while writing
    for name in (SHARDS, HF):
        (staging / name).mkdir(parents=True)
    copy_companions(companions, staging / HF, dtype=dtype, head=head)
    (staging / "config.yaml").write_text(config_text, encoding="utf-8")


def _complete(staging: Path, directory: Path, record: dict[str, Any]) -> None:
    write_json(staging / STATE, record)
    fsync_tree(staging)
    if directory.exists():
        shutil.rmtree(directory)  # of this step, and not the one that this run went on from
    os.rename(staging, directory)
    fsync(directory.parent)
