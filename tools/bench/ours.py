"""A training step of ours as the benchmarks run it: rows built, reference, forward and backward; no optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.data.rows import build_row
from rpo_megatron.data.store import Group
from rpo_megatron.distributed import Groups
from rpo_megatron.model.build import Precision, ScoringModel, build, wrap
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.weights import load_hf, load_random
from rpo_megatron.objectives import objective
from rpo_megatron.objectives.statistics import Stats
from rpo_megatron.training.forward import Batch, run_logps, run_objective, to_device, with_reference_logps

BETA = 0.1
LOSS = ObjectiveConfig(method="dpo", beta=BETA, pair="best_worst")
"""Best and worst are the first and the last response of a group (see common.Data); with two responses, TRL's loss."""
SFT = ObjectiveConfig(method="sft", responses="all")
"""Where no reference is wanted."""


def load(
    directory: Path, ranks: Groups, *, precision: Precision = "fp32", sequence_parallel: bool = False
) -> ScoringModel:
    """This rank's part of the model in a Hugging Face directory; random weights where it holds only a config.json."""
    shape = read_shape(directory)
    model = build(shape, precision=precision, sequence_parallel=sequence_parallel, groups=ranks)
    if (directory / "model.safetensors").exists():
        load_hf(model, str(directory), ranks, head="lm")
    else:
        load_random(model, 0, ranks)
    return model


def batch_of(groups: Sequence[Group], *, share_prompt: bool, multiple: int = 1) -> Batch:
    """All groups in one row."""
    count = len(groups)
    row = build_row(groups, ids=np.arange(count), draws=np.zeros(count), multiple=multiple, share_prompt=share_prompt)
    return to_device(row, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Policy with gradient buffers, and the objective."""

    policy: ScoringModel
    model: Any
    loss: objective.Objective

    @classmethod
    def of(cls, policy: ScoringModel, loss: ObjectiveConfig) -> "Trainer":
        return cls(policy=policy, model=wrap(policy), loss=objective.build(loss))

    def step(
        self, groups: Sequence[Group], *, share_prompt: bool = True, reference: ScoringModel | None = None
    ) -> Stats:
        """Without `reference`, the groups hold its log-probabilities if the objective reads them. Gradients are left
        in the buffers."""
        batches = [batch_of(groups, share_prompt=share_prompt)]
        return self.backward(batches if reference is None else with_reference_logps(reference, batches))

    def backward(self, batches: list[Batch]) -> Stats:
        self.model.zero_grad_buffer()
        return run_objective(self.model, batches, self.loss, train=True)

    def output_gradient(self) -> torch.Tensor:
        """Of the last step, by the output layer's weight [V, H]."""
        gradient: torch.Tensor = self.policy.output_layer.weight.main_grad
        return gradient


def logps(model: ScoringModel, groups: Sequence[Group]) -> torch.Tensor:
    """Summed log-probabilities of the groups' responses [G, K]."""
    return run_logps(model, [batch_of(groups, share_prompt=True)])[0]


def mean_loss(stats: Stats) -> float:
    total, count = stats["loss"]
    return float(total) / float(count)


def with_stored_reference(groups: Sequence[Group], logp_GK: torch.Tensor) -> list[Group]:
    """The groups with the reference's log-probabilities, as a store that `rpo score` went over gives them."""
    return [replace(group, ref_logp=row.numpy()) for group, row in zip(groups, logp_GK, strict=True)]
