"""One optimizer step, and what its gradient was like. Nothing here waits for the device."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import Groups
from rpo_megatron.errors import UserError
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.objectives.statistics import Stats
from rpo_megatron.training.forward import Batch, run_objective
from rpo_megatron.training.optimizer import set_learning_rate
from rpo_megatron.training.profile import Profiler

Norm: TypeAlias = float | torch.Tensor
"""Where megatron leaves it: on the device with Transformer Engine from megatron-core 0.17 on, else on the host."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    stats: Stats
    """This rank's sums and counts, on the device; empty on all but the last pipeline stage."""
    grad_norm: Norm
    """Global norm before clipping."""


def train_step(
    model: Any, optimizer: Any, batches: list[Batch], objective: Objective, *, lr: float, profiler: Profiler
) -> StepResult:
    """Forward, backward, clip, update. A gradient that is not finite is for GradientNorms to find."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    stats = run_objective(model, batches, objective, train=True)
    set_learning_rate(optimizer, lr)
    with profiler.phase("optimizer"):
        _, grad_norm, _ = optimizer.step()
    return StepResult(stats=stats, grad_norm=grad_norm)


def overlaps(parallel: ParallelConfig, groups: Groups) -> bool:
    """Whether data-parallel communication runs behind computation. On CPUs the two would only share the cores."""
    on_its_own = groups.device.type == "cuda" and groups.dp.size * groups.cp.size > 1
    return on_its_own if parallel.overlap is None else parallel.overlap


def gather_weights(model: Any) -> None:
    """Every rank has all updated weights. With parallel.overlap they are gathered only by the next forward, and whoever
    else reads them (a checkpoint) must ask for it."""
    if model.ddp_config.overlap_param_gather:
        with torch.no_grad():
            model.start_param_sync(force_sync=True)


class GradientNorms:
    """The gradients of a run are finite, or it stops before they can reach a checkpoint.

    A norm that is on the host already is looked at in its step. One on the device is not fetched: that would make every
    step wait for the device to get there. It is looked at with all others when a number is wanted anyway, to log it,
    and before a checkpoint is written.
    """

    def __init__(self) -> None:
        self._unseen: list[tuple[int, Norm]] = []
        self._latest = 0.0

    def add(self, step: int, norm: Norm) -> None:
        """Raises UserError as `latest`, if that is known without waiting."""
        self._unseen.append((step, norm))
        if not isinstance(norm, torch.Tensor):
            self.latest()

    def latest(self) -> float:
        """The norm of the last step.

        Raises UserError when it or an earlier one is not finite.
        """
        for step, norm in self._unseen:
            self._latest = float(norm)
            if not math.isfinite(self._latest):
                raise UserError(
                    f"the gradient norm of step {step} is {self._latest}: the run diverged and is stopped before "
                    f"anything of it is saved; go on from the last checkpoint with a smaller optimizer.lr, or look for "
                    f"broken rewards with `rpo inspect`"
                )
        self._unseen.clear()
        return self._latest
