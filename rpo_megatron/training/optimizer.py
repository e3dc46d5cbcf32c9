"""Megatron's distributed Adam over a model in DDP, and the learning rate as a function of the step."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from rpo_megatron.config import OptimizerConfig
from rpo_megatron.model import compat
from rpo_megatron.model.build import DTYPES, Precision
from rpo_megatron.model.chunks import chunks_of
from rpo_megatron.training.adam import FusedLayoutAdam
from rpo_megatron.training.offload import OffloadedAdam


def choose_optimizer(config: OptimizerConfig) -> type[torch.optim.Optimizer]:
    """Ours where moments are offloaded; else what megatron finds, Transformer Engine's FusedAdam or apex's; else ours
    with torch's fused update. All have the same formulas and write the same checkpoints."""
    return OffloadedAdam if config.offload else compat.fused_adam() or FusedLayoutAdam


def describe_optimizer(config: OptimizerConfig) -> str:
    """For the run's header."""
    chosen = choose_optimizer(config)
    owners = {"transformer_engine": "Transformer Engine's", "apex": "apex's"}
    owner = owners.get(chosen.__module__.split(".")[0], "torch's")
    return f"{owner} fused Adam" + ", its moments in host memory" * config.offload


def build_optimizer(config: OptimizerConfig, model: Any, precision: Precision) -> Any:
    """fp32 master weights and moments, sharded over the data-parallel ranks."""
    compat.use_optimizer(choose_optimizer(config))
    compat.clip_in_place()
    compat.save_buckets_in_place()
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr,  # the schedule is ours; megatron's own is not used
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_norm,
        bf16=precision == "bf16",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(settings, chunks_of(model))


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of step `step` (counted from 0) of `num_steps`.

    Linear from lr / warmup_steps up to lr over the warm-up, then constant, or half a cosine that reaches min_lr at the
    last step. A pure function, so a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def load_state(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Master weights, moments and the count of updates come from a checkpoint; every knob stays as this run has it.

    Megatron would take Adam's constants from the checkpoint as well, and from 0.17 on it knows a group of parameters by
    its largest and smallest learning rate: with another one it would find none. And what it saves of groups is what the
    first process has: no count for those that are empty there, as those of experts where its layers have none.
    """
    own = [{name: value for name, value in group.items() if name in _KNOBS} for group in optimizer.param_groups]
    limits = {name: own[0][name] for name in ("max_lr", "min_lr") if name in own[0]}
    groups = list(_param_groups(loaded))
    updates = {group["step"] for group in groups if "step" in group}
    assert len(updates) < 2, "all groups are updated together"
    for group in groups:
        group |= limits
        if updates:
            group["step"] = max(updates)
    with torch.no_grad():
        optimizer.load_state_dict(loaded)
    for group, knobs in zip(optimizer.param_groups, own, strict=True):
        group |= knobs


_KNOBS = ("lr", "max_lr", "min_lr", "weight_decay", "betas", "eps")
"""Entries of a group of parameters that come from the config."""


def _param_groups(tree: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """All of a state dict: one optimizer's, or those of several under their numbers."""
    for name, value in tree.items():
        if name == "param_groups":
            yield from value
        elif isinstance(value, dict):
            yield from _param_groups(value)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
