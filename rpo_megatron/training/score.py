"""`rpo score`: the reference's log-probability of every response, once, next to the stores (PREFIX.ref_logp.*).

Any layout may write it and any layout may read it. Memory stays bounded: a block of groups at a time goes through the
model, and rank 0 appends its numbers.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch

from rpo_megatron.config import RunConfig
from rpo_megatron.data.store import Store, write_reference
from rpo_megatron.distributed import Groups, barrier, start, stop, sum_over_world
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import ScoringModel
from rpo_megatron.training.evaluate import make_loader
from rpo_megatron.training.forward import run_logps, to_device
from rpo_megatron.training.reference import load_reference
from rpo_megatron.training.resolve import Plan, resolve

GROUPS_AT_A_TIME = 256


def score(config: RunConfig) -> None:
    """Score data.train and data.valid with the reference's weights."""
    groups = start(config.parallel)
    plan = resolve(config)
    if plan.reference == "none":
        raise UserError(f"objective.method={config.objective.method} reads no reference: there is nothing to score")
    model = load_reference(plan, groups)
    for store in plan.stores:
        _score_store(plan, store, model, groups)
    stop()


def _score_store(plan: Plan, store: Store, model: ScoringModel, groups: Groups) -> None:
    blocks = _scored_blocks(plan, store, model, groups)
    if groups.leads:
        began = time.perf_counter()
        try:
            write_reference(store, _by_group(store, blocks), identity=plan.reference_identity(store))
        except ValueError as error:
            raise UserError(
                f"{error}; the model in {plan.reference_source.path} gives no such numbers in {plan.config.precision}: "
                f"look at its weights, or try precision=fp32"
            ) from error
        seconds = time.perf_counter() - began
        print(
            f"scored {store.prefix}: {len(store):,} groups with {plan.reference_source.path} "
            f"(weights {plan.reference_fingerprint[:12]}, {plan.config.precision}) in {seconds:.1f}s "
            f"-> {store.prefix}.ref_logp.*",
            flush=True,
        )
    else:
        for _ in blocks:
            pass
    barrier()  # the others must not run ahead into a store that is still being written


def _scored_blocks(plan: Plan, store: Store, model: ScoringModel, groups: Groups) -> Iterator[np.ndarray]:
    """fp64 arrays of summed log-probs in store order, response after response; every rank must run this to its end."""
    loader = make_loader(plan, store, groups)
    for first in range(0, len(store), GROUPS_AT_A_TIME):
        count = min(GROUPS_AT_A_TIME, len(store) - first)
        counts = store.num_responses_D[first : first + count]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        rows = loader.sequential(first, count)
        logps = run_logps(model, [to_device(row, groups.device) for row in rows])
        block = torch.zeros(int(offsets[-1]), dtype=torch.float64, device=groups.device)
        if groups.speaks_for_data:
            for row, logp_GK in zip(rows, logps, strict=True):
                for g, group_id in enumerate(row.group_ids_G):
                    if group_id >= 0:
                        at, k = offsets[group_id - first], counts[group_id - first]
                        block[at : at + k] = logp_GK[g, :k]
        yield sum_over_world(block).cpu().numpy()


def _by_group(store: Store, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    counts = iter(store.num_responses_D)
    for block in blocks:
        while block.size:
            k = int(next(counts))
            yield block[:k]
            block = block[k:]
