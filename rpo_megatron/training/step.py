"""One optimizer step."""

import math
from dataclasses import dataclass
from typing import Any

from rpo_megatron.errors import UserError
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.objectives.statistics import Stats
from rpo_megatron.training.forward import Batch, run_objective
from rpo_megatron.training.optimizer import set_learning_rate


@dataclass(frozen=True, kw_only=True)
class StepResult:
    stats: Stats
    """This rank's sums and counts, on the device; empty on all but the last pipeline stage."""
    grad_norm: float
    """Global norm before clipping."""


def train_step(model: Any, optimizer: Any, batches: list[Batch], objective: Objective, *, lr: float) -> StepResult:
    """Forward, backward, clip, update.

    Raises UserError when the gradient is not finite: the run stops before such an update can reach a checkpoint.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    stats = run_objective(model, batches, objective, train=True)
    set_learning_rate(optimizer, lr)
    _, grad_norm, _ = optimizer.step()
    grad_norm = float(grad_norm or 0.0)
    if not math.isfinite(grad_norm):
        raise UserError(
            f"the gradient norm is {grad_norm}: the run diverged and is stopped before anything is saved; go on from "
            f"the last checkpoint with a smaller optimizer.lr, or look for broken rewards with `rpo inspect`"
        )
    return StepResult(stats=stats, grad_norm=grad_norm)
