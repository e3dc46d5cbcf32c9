"""Evaluation on the held-out store: the training objective and its statistics, and how well the model's own notion of
reward (the implicit reward of a policy, the value of a reward model) ranks the responses. Forward only."""

import json
from dataclasses import dataclass
from typing import Any

from rpo_megatron.config import RunConfig
from rpo_megatron.data.loader import Loader
from rpo_megatron.data.store import Store
from rpo_megatron.distributed import Groups, on_leader, start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.objectives import objective as objectives
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.objectives.statistics import Stats
from rpo_megatron.training import describe
from rpo_megatron.training.forward import merge_stats, run_objective, to_device
from rpo_megatron.training.loaders import make_loader
from rpo_megatron.training.metrics import Reducer, format_line, format_table
from rpo_megatron.training.policy import choose_weights, load_policy, progress
from rpo_megatron.training.reference import Fill, build_reference
from rpo_megatron.training.resolve import Plan, resolve
from rpo_megatron.training.score import make_reference
from rpo_megatron.training.sidecar import to_make

GROUPS_AT_A_TIME = 64
"""Groups of each data-parallel rank that are packed together; bounds the memory of a long evaluation."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that an evaluation needs besides the model."""

    loader: Loader
    num_groups: int
    data: str
    """Fingerprint of the held-out store."""
    fill_reference: Fill
    groups: Groups

    def run(self, model: Any, objective: Objective) -> Stats:
        """This rank's sums and counts over the store. Every rank must call this."""
        total: Stats = {}
        block = GROUPS_AT_A_TIME * self.groups.dp.size
        for first in range(0, self.num_groups, block):
            rows = self.loader.sequential(first, min(block, self.num_groups - first))
            batches = self.fill_reference([to_device(row, self.groups.device, cp=self.groups.cp) for row in rows])
            total = merge_stats(total, run_objective(model, batches, objective, train=False))
        return total


def build_evaluation(plan: Plan, groups: Groups, *, fill_reference: Fill) -> Evaluation:
    """`fill_reference` completes the batches, as in training."""
    store = held_out(plan)
    return Evaluation(
        loader=make_loader(plan, plan.with_reference(store), groups),
        num_groups=min(len(store), plan.config.evaluation.groups or len(store)),
        data=store.fingerprint,
        fill_reference=fill_reference,
        groups=groups,
    )


def held_out(plan: Plan) -> Store:
    """Raises UserError without one."""
    if plan.valid_store is None:
        raise UserError("data.valid: give the PREFIX of a held-out store to evaluate on")
    return plan.valid_store


def evaluate_run(config: RunConfig) -> None:
    """`rpo eval`: prints a table of the statistics, the line of a training log, and last, in full, a line of JSON."""
    groups = start(config.parallel)
    plan = resolve(config)
    weights = choose_weights(plan, key="evaluation.checkpoint", wish=config.evaluation.checkpoint)
    make_reference(plan, groups, on_leader(lambda: to_make(plan, [held_out(plan)])))
    objective = objectives.build(config.objective).at(progress(plan, weights))
    model = load_policy(plan, weights, groups)
    evaluation = build_evaluation(plan, groups, fill_reference=build_reference(plan, groups, policy=model))
    means = Reducer(groups)(evaluation.run(model, objective)).means
    if groups.leads:
        path = weights.source.path
        print(f"evaluated {path} on {evaluation.num_groups} groups of {config.data.valid}")
        print(f"rewards: {describe.rewards(plan)}")
        print(format_table(means))
        print(f"valid | {format_line(means)}")
        print(json.dumps({"weights": str(path), "groups": evaluation.num_groups, **means}))
    stop()
