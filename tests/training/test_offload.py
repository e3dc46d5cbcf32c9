"""Runs with Adam's moments in host memory and many small buckets, and runs without, go on from each other's
checkpoints."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rpo_megatron.config import ObjectiveConfig, OptimizerConfig, ParallelConfig
from rpo_megatron.data.rows import build_row
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.model import compat
from rpo_megatron.model.build import build, wrap
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import find
from rpo_megatron.objectives import objective
from rpo_megatron.training import checkpoint
from rpo_megatron.training.adam import FusedLayoutAdam
from rpo_megatron.training.forward import Batch, run_objective, to_device
from rpo_megatron.training.offload import OffloadedAdam
from rpo_megatron.training.optimizer import build_optimizer, choose_optimizer
from rpo_megatron.training.step import gather_weights
from tests import tiny
from tests.checkpoints import run_state, save
from tools.bench.common import Data


class Run:
    def __init__(self, directory: Path, groups: Groups, *, offload: bool) -> None:
        self.policy: Any = build(read_shape(directory), precision="bf16", sequence_parallel=False, groups=groups)
        checkpoint.load_weights(self.policy, find(directory), groups)
        # A norm is added up by shards, and those are cut by buckets: no clipping, or the last bit differs.
        self.model = wrap(self.policy, overlap=offload, bucket_size=1000 if offload else None)
        self.optimizer = build_optimizer(OptimizerConfig(lr=1e-2, offload=offload, clip_norm=0), self.model, "bf16")

    def steps(self, rows: list[Batch], count: int) -> list[torch.Tensor]:
        """The weights after so many steps."""
        loss = objective.build(ObjectiveConfig(method="sft", responses="all"))
        for _ in range(count):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            run_objective(self.model, rows, loss, train=True)
            self.optimizer.step()
        gather_weights(self.model)
        return [parameter.detach().clone() for parameter in self.policy.parameters()]


@pytest.mark.parametrize("first", [False, True])
def test_checkpoints_are_exchangeable(tmp_path: Path, first: bool) -> None:
    """Catches moments that are saved before they are back, loaded to where nobody looks for them, or kept under other
    names; numbers of the parameters behind a bucket's padding that are saved as those of others; and an optimizer that
    is not the one that was asked for."""
    tiny.write_model(tmp_path / "model")
    groups = start(ParallelConfig())
    made = Data(groups=4, responses=2, prompt=6, shortest=3, longest=9).make(vocab=131)
    row = build_row(made, ids=np.arange(4), draws=np.zeros(4), multiple=1, share_prompt=True)
    rows = [to_device(row, groups.device)]
    writer = Run(tmp_path / "model", groups, offload=first)
    writer.steps(rows, 2)
    saved, state = tmp_path / "saved", run_state("bf16")
    save(
        writer.policy,
        writer.optimizer,
        directory=saved,
        companions=tmp_path / "model",
        groups=groups,
        precision="bf16",
    )
    reader = Run(tmp_path / "model", groups, offload=not first)
    checkpoint.load(reader.policy, reader.optimizer, directory=saved, expected=state, groups=groups)
    inner = [getattr(run.optimizer, "chained_optimizers", [run.optimizer])[0].optimizer for run in (writer, reader)]
    kinds = [isinstance(optimizer, OffloadedAdam) for optimizer in inner]
    assert kinds == [first, not first]
    for one, other in zip(writer.steps(rows, 2), reader.steps(rows, 2), strict=True):
        assert torch.equal(one, other)
    stop()


def test_offloading_first_hides_no_other_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process whose first optimizer is offloaded, and whose next one takes that for megatron's own."""
    from megatron.core import optimizer as package

    monkeypatch.setattr(compat, "fused_adam", functools.cache(compat.fused_adam.__wrapped__))
    monkeypatch.setattr(package, "USING_PYTORCH_OPTIMIZER", True)
    monkeypatch.setattr(package, "Adam", torch.optim.AdamW)
    compat.use_optimizer(choose_optimizer(OptimizerConfig(lr=1.0, offload=True)))
    assert choose_optimizer(OptimizerConfig(lr=1.0)) is FusedLayoutAdam
