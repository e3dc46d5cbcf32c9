"""What the processes of the parallel tests do. The same functions run in one process to give the expected values."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rpo_megatron.config import RunConfig
from rpo_megatron.distributed import Groups, gather_objects, start
from rpo_megatron.model import products
from rpo_megatron.model.build import wrap
from rpo_megatron.model.chunks import chunks_of
from rpo_megatron.model.products import onednn_is_faster
from rpo_megatron.model.router import take_seen
from rpo_megatron.model.weights import gather_hf
from rpo_megatron.objectives import objective as objectives
from rpo_megatron.objectives.responses import Responses
from rpo_megatron.training.evaluate import make_loader
from rpo_megatron.training.forward import run_logps, run_objective, run_responses, to_device
from rpo_megatron.training.metrics import METRICS_FILE, Reducer
from rpo_megatron.training.optimizer import build_optimizer
from rpo_megatron.training.policy import build_policy, load_start
from rpo_megatron.training.reference import build_reference
from rpo_megatron.training.resolve import resolve
from rpo_megatron.training.signals import StopSignals
from rpo_megatron.training.train import build_run, train_loop
from tests.model.te_stand_in import stand_in
from tests.model.whole import reduce_whole_gradients, whole_gradients
from tests.tiny import run_config


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    context: int = 1
    expert: int = 1
    virtual: int = 1

    def overrides(self) -> list[str]:
        names = ("tensor", "pipeline", "context", "expert", "virtual")
        sequence = f"parallel.sequence={str(self.sequence).lower()}"
        return [*(f"parallel.{name}={getattr(self, name)}" for name in names), sequence]

    def __str__(self) -> str:
        context = f"cp{self.context}" * (self.context > 1) + f"ep{self.expert}" * (self.expert > 1)
        virtual = f"v{self.virtual}" * (self.virtual > 1)
        return f"tp{self.tensor}pp{self.pipeline}{virtual}{context}{'sp' if self.sequence else ''}"


ONE = Layout()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One global batch: what must not depend on the layout."""

    means: dict[str, float]
    grad_norm: float
    logps: dict[int, list[float]]
    """Group id -> summed log-probability of each response; of a reward model its value."""
    gradients: dict[str, torch.Tensor]
    """By Hugging Face name, whole; empty on all ranks but the first."""
    messages: Counter[torch.dtype]
    """That this rank exchanged with other pipeline stages, sent and received."""
    row_lengths: list[int]
    """Tokens of the rows that this rank reads."""


def outcomes(data: str, cases: list[tuple[Layout, list[str]]], *, other_products: bool = False) -> list[Outcome]:
    """The first global batch under each (layout, overrides), with stand-ins where Transformer Engine is asked for.
    `other_products`: with the linear layers that this processor does not get (model/linear.py)."""
    onednn = onednn_is_faster() != other_products and torch.backends.mkldnn.is_available()
    with stand_in(), mock.patch.object(products, "onednn_is_faster", return_value=onednn):
        return [_outcome(run_config(Path(data), *layout.overrides(), *overrides)) for layout, overrides in cases]


def _outcome(config: RunConfig) -> Outcome:
    groups = start(config.parallel)
    plan = resolve(config)
    policy = build_policy(plan, groups, shape=plan.shape)
    load_start(policy, plan, groups)
    model = wrap(policy)
    optimizer = build_optimizer(config.optimizer, model, config.precision)
    reduce_whole_gradients(policy)
    rows = make_loader(plan, plan.train_store, groups).step(0).rows
    batches = build_reference(plan, groups)([to_device(row, groups.device, cp=groups.cp) for row in rows])
    with _messages() as messages:
        logps = by_group(rows, run_responses(model, batches, number), groups)
        model.zero_grad_buffer()
        stats = run_objective(model, batches, objectives.build(config.objective), train=True)
    means = Reducer(groups)(stats, seen_LX=take_seen(chunks_of(model))).means
    gradients = whole_gradients(policy.parameters(), lambda: gather_hf(policy, groups))
    _, grad_norm, _ = optimizer.step()
    return Outcome(
        means=means,
        grad_norm=float(grad_norm),
        logps=logps,
        gradients=gradients,
        messages=messages,
        row_lengths=[row.tokens_T.size for row in rows],
    )


@contextmanager
def _messages() -> Iterator[Counter[torch.dtype]]:
    """Counts the tensors that go between pipeline stages meanwhile."""
    counts: Counter[torch.dtype] = Counter()
    exchange = torch.distributed.batch_isend_irecv

    def counting(operations: list[Any]) -> Any:
        counts.update(operation.tensor.dtype for operation in operations)
        return exchange(operations)

    torch.distributed.batch_isend_irecv = counting
    try:
        yield counts
    finally:
        torch.distributed.batch_isend_irecv = exchange


def kept_for_backward(data: str, overrides: list[str]) -> int:
    """How many numbers (of tensors that are not weights) one micro-batch leaves for its backward pass."""
    config = run_config(Path(data), *overrides)
    groups = start(config.parallel)
    plan = resolve(config)
    policy = build_policy(plan, groups, shape=plan.shape)
    load_start(policy, plan, groups)
    row = make_loader(plan, plan.train_store, groups).step(0).rows[0]
    weights = {parameter.data_ptr() for parameter in policy.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(to_device(row, groups.device).row)
    return sum(kept.values())


def number(responses: Responses) -> torch.Tensor:
    return responses.logp_GK if responses.value_GK is None else responses.value_GK


def by_group(rows: list[Any], logps: list[torch.Tensor], groups: Groups) -> dict[int, list[float]]:
    mine = {}
    for row, logp_GK in zip(rows, logps, strict=True) if groups.speaks_for_data else ():
        for g, group_id in enumerate(row.group_ids_G):
            if group_id >= 0:
                mine[int(group_id)] = logp_GK[g][torch.from_numpy(row.valid_GK[g])].tolist()
    return {group: values for part in gather_objects(mine) for group, values in part.items()}


def largest_log_ratio(batches: list[Any], logps: list[torch.Tensor], groups: Groups) -> float:
    """|policy - reference| over all responses of all ranks; 0 without a reference."""
    mine = [
        float((logp_GK - batch.ref_logp_GK)[batch.valid_GK].abs().max())
        for batch, logp_GK in zip(batches, logps, strict=False)  # none on stages before the last
        if batch.ref_logp_GK is not None and batch.valid_GK.any() and groups.speaks_for_data
    ]
    return max(max(part, default=0.0) for part in gather_objects(mine))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Log-probs of a block of groups, without gradients."""

    logps: dict[int, list[float]]
    largest_log_ratio: float
    """Over all responses, in nats: |policy - reference| as the objective sees them."""


def score_blocks(cases: list[tuple[RunConfig, int]]) -> list[Scored]:
    """The first `n` groups of the training store under each (config, n)."""
    return [_score_block(config, count) for config, count in cases]


def _score_block(config: RunConfig, count: int) -> Scored:
    groups = start(config.parallel)
    plan = resolve(config)
    policy = build_policy(plan, groups, shape=plan.shape)
    load_start(policy, plan, groups)
    rows = make_loader(plan, plan.with_reference(plan.train_store), groups).sequential(0, count)
    batches = build_reference(plan, groups)([to_device(row, groups.device, cp=groups.cp) for row in rows])
    logps = run_logps(policy, batches)
    return Scored(logps=by_group(rows, logps, groups), largest_log_ratio=largest_log_ratio(batches, logps, groups))


def train_losses(configs: list[RunConfig]) -> dict[str, list[float]]:
    """Whole runs, one after the other: method -> loss of every step."""
    return {config.objective.method: _train_losses(config) for config in configs}


def _train_losses(config: RunConfig) -> list[float]:
    run = build_run(resolve(config), start(config.parallel))
    train_loop(run, StopSignals())
    run.metrics.close()
    lines = (Path(config.run_dir) / METRICS_FILE).read_text().splitlines() if run.groups.leads else []
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]
