"""Evaluation on the held-out store: the training objective and its statistics, forward only."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo_megatron.config import RunConfig
from rpo_megatron.data.loader import Loader
from rpo_megatron.data.store import Store
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import build
from rpo_megatron.model.source import Source, find, newest_checkpoint
from rpo_megatron.objectives import objective as objectives
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.objectives.statistics import Stats
from rpo_megatron.training.checkpoint import load_weights
from rpo_megatron.training.forward import merge_stats, run_objective, to_device
from rpo_megatron.training.metrics import Reducer, format_line
from rpo_megatron.training.reference import Fill, build_reference
from rpo_megatron.training.resolve import Plan, resolve

GROUPS_AT_A_TIME = 64
"""Groups that are packed together; bounds the memory of a long evaluation."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that an evaluation needs besides the model."""

    loader: Loader
    num_groups: int
    objective: Objective
    fill_reference: Fill
    groups: Groups

    def run(self, model: Any) -> Stats:
        """This rank's sums and counts over the store. Every rank must call this."""
        total: Stats = {}
        for first in range(0, self.num_groups, GROUPS_AT_A_TIME):
            rows = self.loader.sequential(first, min(GROUPS_AT_A_TIME, self.num_groups - first))
            batches = self.fill_reference([to_device(row, self.groups.device) for row in rows])
            total = merge_stats(total, run_objective(model, batches, self.objective, train=False))
        return total


def build_evaluation(plan: Plan, groups: Groups, *, objective: Objective, fill_reference: Fill) -> Evaluation:
    """Raises UserError without a held-out store."""
    store = plan.valid_store
    if store is None:
        raise UserError("data.valid: give the PREFIX of a held-out store to evaluate on")
    return Evaluation(
        loader=make_loader(plan, plan.with_reference(store), groups),
        num_groups=min(len(store), plan.config.evaluation.groups or len(store)),
        objective=objective,
        fill_reference=fill_reference,
        groups=groups,
    )


def make_loader(plan: Plan, store: Store, groups: Groups) -> Loader:
    config = plan.config
    return Loader(
        store,
        seed=config.seed,
        groups_per_step=config.train.groups_per_step,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
        packing=config.data.packing,
        dp_rank=groups.dp.rank,
        dp_size=groups.dp.size,
        multiple=plan.row_multiple,
    )


def evaluate_run(config: RunConfig) -> None:
    """`rpo eval`: prints the statistics as in a training log, and last, in full, as one line of JSON."""
    groups = start(config.parallel)
    plan = resolve(config)
    source = _evaluated(plan)
    if plan.valid_store is not None:
        plan.with_reference(plan.valid_store)  # refused before any weight is loaded
    objective = objectives.build(config.objective)
    fill_reference = build_reference(plan, groups)
    evaluation = build_evaluation(plan, groups, objective=objective, fill_reference=fill_reference)
    model = build(plan.shape, precision=config.precision, sequence_parallel=config.parallel.sequence, groups=groups)
    load_weights(model, source, groups)
    means = Reducer(groups)(evaluation.run(model)).means
    if groups.leads:
        print(f"evaluated {source.path} on {evaluation.num_groups} groups of {config.data.valid}")
        print(f"valid | {format_line(means)}")
        print(json.dumps({"weights": str(source.path), "groups": evaluation.num_groups, **means}))
    stop()


def _evaluated(plan: Plan) -> Source:
    wish = plan.config.evaluation.checkpoint
    if wish == "start":
        return plan.source
    if wish is not None:
        return find(wish)
    newest = newest_checkpoint(plan.config.run_dir)
    if newest is None:
        raise UserError(
            f"run_dir '{plan.config.run_dir}' has no checkpoint yet; train first, or evaluate the starting weights "
            f"with evaluation.checkpoint=start"
        )
    return Source(path=Path(newest), kind="checkpoint")
