"""Whole runs with and without communication behind computation."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from rpo_megatron.config import RunConfig
from rpo_megatron.distributed import start
from rpo_megatron.model.source import find
from rpo_megatron.model.weights import gather_hf
from rpo_megatron.training.checkpoint import load_weights, step_directory
from rpo_megatron.training.metrics import METRICS_FILE
from rpo_megatron.training.policy import build_policy
from rpo_megatron.training.resolve import resolve
from rpo_megatron.training.signals import StopSignals
from rpo_megatron.training.step import gather_weights
from rpo_megatron.training.train import build_run, train_loop
from tests.model.whole import whole


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The end of a run; empty on all ranks but the first."""

    losses: list[float]
    """Of training steps and evaluations, in order."""
    weights: dict[str, torch.Tensor]
    saved: dict[str, torch.Tensor]
    """Those of the checkpoint after step 3."""
    num_buckets: int
    """Groups of gradients that are reduced one by one."""


def trained(configs: list[RunConfig]) -> list[Trained]:
    return [_trained(config) for config in configs]


def _trained(config: RunConfig) -> Trained:
    run = build_run(resolve(config), start(config.parallel))
    assert train_loop(run, StopSignals())
    run.metrics.close()
    gather_weights(run.model)
    policy = build_policy(run.plan, run.groups, shape=run.plan.shape)
    load_weights(policy, find(step_directory(config.run_dir, 3)), run.groups)
    lines = (Path(config.run_dir) / METRICS_FILE).read_text().splitlines() if run.groups.leads else []
    return Trained(
        losses=[json.loads(line)["loss"] for line in lines],
        weights=whole(gather_hf(run.model.module, run.groups)),
        saved=whole(gather_hf(policy, run.groups)),
        num_buckets=len(run.model.bucket_groups),
    )
