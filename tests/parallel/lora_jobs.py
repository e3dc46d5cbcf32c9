"""What the processes of the tests of adapters do; one process gives the expected values with the same functions."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from rpo_megatron.config import RunConfig
from rpo_megatron.distributed import on_leader, start
from rpo_megatron.model.build import wrap
from rpo_megatron.model.lora import adapter_parameters
from rpo_megatron.model.lora_io import gather_adapter
from rpo_megatron.model.table import HF_SCORE
from rpo_megatron.model.weights import gather_hf
from rpo_megatron.objectives import objective as objectives
from rpo_megatron.training.forward import run_objective, run_responses, to_device
from rpo_megatron.training.loaders import make_loader
from rpo_megatron.training.metrics import Reducer
from rpo_megatron.training.optimizer import build_optimizer
from rpo_megatron.training.policy import build_policy, load_start
from rpo_megatron.training.reference import build_reference
from rpo_megatron.training.resolve import resolve
from rpo_megatron.training.signals import StopSignals
from rpo_megatron.training.train import build_run, train_loop
from tests.model.whole import reduce_whole_gradients, whole, whole_gradients
from tests.parallel.jobs import Layout, by_group, largest_log_ratio, number
from tests.tiny import run_config


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One global batch: what must not depend on the layout."""

    means: dict[str, float]
    grad_norm: float
    logps: dict[int, list[float]]
    largest_log_ratio: float
    """At the start: |policy - reference|."""
    gradients: dict[str, torch.Tensor]
    after_step: dict[str, torch.Tensor]
    """Both by PEFT's names, whole; empty on all ranks but the first."""
    base_is_untouched: bool


def outcomes(data: str, cases: list[tuple[Layout, list[str]]]) -> list[Outcome]:
    """The first global batch under each (layout, overrides)."""
    return [_outcome(run_config(Path(data), *layout.overrides(), *overrides)) for layout, overrides in cases]


def _outcome(config: RunConfig) -> Outcome:
    groups = start(config.parallel)
    plan = resolve(config)
    policy = build_policy(plan, groups, shape=plan.shape)
    load_start(policy, plan, groups)
    before = whole(gather_hf(policy, groups))
    model = wrap(policy)
    optimizer = build_optimizer(config.optimizer, model, config.precision)
    reduce_whole_gradients(policy)
    rows = make_loader(plan, plan.train_store, groups).step(0).rows
    batches = [to_device(row, groups.device, cp=groups.cp) for row in rows]
    batches = build_reference(plan, groups, policy=policy)(batches)
    numbers = run_responses(model, batches, number)
    model.zero_grad_buffer()
    stats = run_objective(model, batches, objectives.build(config.objective), train=True)
    means = Reducer(groups)(stats).means
    gradients = whole_gradients(adapter_parameters(policy).values(), lambda: gather_adapter(policy, groups))
    _, grad_norm, _ = optimizer.step()
    after = whole(gather_hf(policy, groups))
    return Outcome(
        means=means,
        grad_norm=float(grad_norm),
        logps=by_group(rows, numbers, groups),
        largest_log_ratio=largest_log_ratio(batches, numbers, groups),
        gradients=gradients,
        after_step=whole(gather_adapter(policy, groups)),
        base_is_untouched=all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name != HF_SCORE),
    )


def runs(data: str, cases: list[tuple[Layout, str, str | None, list[str]]]) -> list[dict[str, torch.Tensor]]:
    """The adapters after whole runs under each (layout, name of the run, name of the run to go on from, overrides)."""
    return [_run(Path(data), *case) for case in cases]


def _run(
    directory: Path, layout: Layout, name: str, after: str | None, overrides: list[str]
) -> dict[str, torch.Tensor]:
    config = run_config(directory, *layout.overrides(), f"run_dir={directory / name}", *overrides)
    groups = start(config.parallel)
    if after is not None:
        on_leader(lambda: str(shutil.copytree(directory / after, directory / name)))
    run = build_run(resolve(config), groups)
    train_loop(run, StopSignals())
    run.metrics.close()
    return whole(gather_adapter(run.model.module, groups))
