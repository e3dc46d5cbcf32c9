"""Checkpoints of models that no run has trained."""

from pathlib import Path
from typing import Any

from rpo_megatron.distributed import Groups
from rpo_megatron.model.build import Model
from rpo_megatron.training import checkpoint
from rpo_megatron.training.resume import RunState


def run_state(precision: str = "fp32") -> RunState:
    """Of a run about which nothing matters but this."""
    return RunState(step=1, consumed=1, groups_per_step=1, seed=0, precision=precision, data="none", reference=None)


def save(
    model: Model, optimizer: Any = None, *, directory: Path, companions: Path, groups: Groups, precision: str = "fp32"
) -> None:
    """A checkpoint at `directory`, with the config and tokenizer of `companions`; `run_state(precision)` resumes it."""
    checkpoint.save(
        model,
        optimizer,
        directory=directory,
        state=run_state(precision),
        config_text="",
        companions=companions,
        groups=groups,
    )
