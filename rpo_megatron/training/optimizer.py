"""Megatron's distributed Adam over one DDP model, and the learning rate as a function of the step."""

import math
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from rpo_megatron.config import OptimizerConfig
from rpo_megatron.model import compat
from rpo_megatron.model.build import DTYPES, Precision
from rpo_megatron.training.adam import FusedLayoutAdam


def build_optimizer(config: OptimizerConfig, model: DistributedDataParallel, precision: Precision) -> Any:
    """fp32 master weights and moments, sharded over the data-parallel ranks."""
    if not compat.has_fused_adam():
        compat.use_optimizer(FusedLayoutAdam)
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
    return get_megatron_optimizer(settings, [model])


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


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
