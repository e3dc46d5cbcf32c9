"""`rpo score`: a number for every response, written next to the stores of a run.

    rpo score run.yaml                    log-probabilities of the frozen reference (PREFIX.ref_logp.*)
    rpo score run.yaml --with value       a reward model's values, as a column that `rewards.columns` can name
    rpo score run.yaml --with implicit    a policy's implicit reward, likewise
    rpo score run.yaml --with logp        a policy's log-probabilities, likewise

Any layout may write it and any layout may read it. Memory stays bounded: a block of groups at a time goes through the
model, and rank 0 appends its numbers. The stores need no rewards for any of this.

With reference.mode=stored, whoever reads the first kind makes it where it is missing (sidecar.py): `rpo train`, `rpo
eval` and `--with implicit` all run `make_reference`.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rpo_megatron.config import RunConfig
from rpo_megatron.data.manifest import COLUMN_NAME, REWARD
from rpo_megatron.data.store import Store
from rpo_megatron.data.writer import write_column, write_reference
from rpo_megatron.distributed import Groups, barrier, on_leader, start, stop, sum_over_world
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import locked
from rpo_megatron.model.shape import read_shape
from rpo_megatron.objectives import objective as objectives
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.objectives.responses import Responses
from rpo_megatron.training import adapters
from rpo_megatron.training.checks import check_config
from rpo_megatron.training.forward import policy_logps, run_responses, to_device
from rpo_megatron.training.loaders import make_loader
from rpo_megatron.training.policy import Weights, choose_weights, load_policy
from rpo_megatron.training.reference import Fill, build_reference, load_reference, without_reference
from rpo_megatron.training.resolve import Plan
from rpo_megatron.training.sidecar import State, to_make

GROUPS_AT_A_TIME = 256
"""Of each data-parallel rank; bounds memory."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model, what to take from it for each response, and where that goes."""

    model: Any
    fill_reference: Fill
    function: Callable[[Responses], torch.Tensor]
    open: Callable[[Store], Store]
    """The store as the function needs it."""
    write: Callable[[Store, Iterable[np.ndarray]], None]
    suffix: str
    """Of the files that are written."""
    path: Path
    fingerprint: str


def score(config: RunConfig) -> None:
    """Score data.train and data.valid."""
    groups = start(config.parallel)
    check_config(config)
    plan = Plan(config=config)
    plan.check_models()
    if config.score.what == "reference":
        _check_reference_wish(plan)
        score_reference(plan, groups, plan.stores)
    else:
        scorer = _column_scorer(plan, groups)
        for store in _once(plan.stores):
            _score_store(plan, store, scorer, groups)
    stop()


def score_reference(plan: Plan, groups: Groups, stores: Sequence[Store]) -> None:
    """Write the log-probabilities of the frozen reference next to stores of the run. Its weights are gone from memory
    when this returns. Every rank must call this.

    Raises UserError, before a weight is loaded, where nothing can be written and where another process is at it.
    """
    with contextlib.ExitStack() as locks:

        def lock() -> None:
            for store in _once(stores):
                _lock(locks, store)

        on_leader(lock)
        scorer = _reference_scorer(plan, groups)
        for store in _once(stores):
            _score_store(plan, store, scorer, groups)
        del scorer
    gc.collect()  # megatron's modules refer to each other in circles
    torch.cuda.empty_cache()


def make_reference(plan: Plan, groups: Groups, missing: dict[str, State]) -> None:
    """Score the stores that lack the stored reference, as `to_make` found them, while there is no other model in
    memory. Every rank must call this."""
    why = {"missing": "is missing", "outdated": "was made for tokens that are no longer there"}
    if not missing:
        return
    if groups.leads:
        for prefix, state in missing.items():
            print(f"{prefix}.ref_logp {why[state]}: one pass over it with the reference comes first", flush=True)
    score_reference(plan, groups, [store for store in plan.stores if store.prefix in missing])


def _once(stores: Sequence[Store]) -> list[Store]:
    """Data that is trained on and held out at once is still one store."""
    return list({Path(store.prefix).resolve(): store for store in stores}.values())


def _lock(locks: contextlib.ExitStack, store: Store) -> None:
    """One process at a time writes next to a store: two would write into the same temporary file."""
    path = Path(f"{store.prefix}.ref_logp.lock")
    try:
        locks.enter_context(locked(path))
    except BlockingIOError:
        raise UserError(
            f"another process is writing the reference's log-probabilities of '{store.prefix}' (it holds {path}); "
            f"start again when it is done, or use reference.mode=resident"
        ) from None
    except OSError as error:
        raise UserError(
            f"the log-probabilities of the reference belong next to '{store.prefix}', where nothing can be written "
            f"({path}: {error.strerror}); use reference.mode=resident, or copy the store to a directory of yours"
        ) from None


def _check_reference_wish(plan: Plan) -> None:
    config = plan.config
    if plan.reference == "none":
        raise UserError(
            f"objective.method={config.objective.method} reads no reference: there is nothing to score; for a column "
            f"of numbers say which: `--with value`, `--with implicit` or `--with logp`"
        )
    for key, value in (("column", config.score.column), ("checkpoint", config.score.checkpoint)):
        if value is not None:
            raise UserError(f"score.{key} is not used by score.what=reference; remove it, or say `--with value`")


def _reference_scorer(plan: Plan, groups: Groups) -> Scorer:
    return Scorer(
        model=load_reference(plan, groups),
        fill_reference=without_reference,
        function=policy_logps,
        open=_as_it_is,
        write=lambda store, values: write_reference(store, values, identity=plan.reference_identity(store)),
        suffix="ref_logp",
        path=plan.reference_source.path,
        fingerprint=plan.reference_fingerprint,
    )


def _column_scorer(plan: Plan, groups: Groups) -> Scorer:
    config = plan.config
    objective = objectives.build(config.objective)
    name = config.score.column or config.score.what
    _check_wish(plan, objective, name=name)
    weights = choose_weights(plan, key="score.checkpoint", wish=config.score.checkpoint)
    _check_head(plan, weights)
    compares = config.score.what == "implicit" and "ref_logp" in plan.reads
    if compares:
        make_reference(plan, groups, on_leader(lambda: to_make(plan, plan.stores)))
    identity = _identity(plan, weights, compares=compares)
    model = load_policy(plan, weights, groups)
    return Scorer(
        model=model,
        fill_reference=build_reference(plan, groups, policy=model) if compares else without_reference,
        function=policy_logps if config.score.what == "logp" else objective.implicit,
        open=plan.with_reference if compares else _as_it_is,
        write=lambda store, values: write_column(store, name, values, identity=identity),
        suffix=f"column.{name}",
        path=weights.source.path,
        fingerprint=identity["weights"],
    )


def _check_wish(plan: Plan, objective: Objective, *, name: str) -> None:
    what, method = plan.config.score.what, f"objective.method={objective.name}"
    is_reward_model = "value" in plan.reads
    if what == "value" and not is_reward_model:
        raise UserError(
            f"score.what=value needs the run of a reward model, {method} trains a policy; its own notion of reward is "
            f"`--with implicit`"
        )
    if what != "value" and is_reward_model:
        raise UserError(f"score.what={what} needs a policy, {method} trains a reward model: `--with value`")
    if what == "implicit" and objective.reward is None:
        raise UserError(f"score.what=implicit: {method} has no implicit reward; `--with logp` works for any policy")
    if not COLUMN_NAME.fullmatch(name) or name == REWARD:
        raise UserError(
            f"score.column: '{name}' cannot name a column: give letters, digits, _ and -, and not '{REWARD}', which is "
            f"the data's own"
        )


def _check_head(plan: Plan, weights: Weights) -> None:
    """A value head that would be drawn is one that nobody trained."""
    drawn = weights.starting and plan.config.model.init == "random"
    if plan.config.score.what == "value" and (drawn or read_shape(weights.source.hf).head != "value"):
        raise UserError(
            f"{weights.source.path}: is no reward model that was trained: there are no values to write; train it "
            f"first, or name one with score.checkpoint"
        )


def _identity(plan: Plan, weights: Weights, *, compares: bool) -> dict[str, str]:
    """What the numbers depend on. No layout: they are the same under any."""
    return {
        "what": plan.config.score.what,
        "weights": weights.source.fingerprint(),
        **({"adapter": adapters.fingerprint(plan.config.lora)} if weights.starting and plan.adapter else {}),
        **({"reference": plan.reference_fingerprint} if compares else {}),
        "precision": plan.precision,
        "method": plan.config.objective.method,
        **{f"objective.{name}": str(value) for name, value in plan.knobs.items()},
    }


def _as_it_is(store: Store) -> Store:
    return store


def _score_store(plan: Plan, store: Store, scorer: Scorer, groups: Groups) -> None:
    blocks = _scored_blocks(plan, scorer.open(store), scorer, groups)
    if groups.leads:
        began = time.perf_counter()
        try:
            scorer.write(store, _by_group(store, blocks))
        except ValueError as error:
            raise UserError(
                f"{error}; the model in {scorer.path} gives no such numbers in {plan.config.precision}: look at its "
                f"weights, or try precision=fp32"
            ) from error
        seconds = time.perf_counter() - began
        print(
            f"scored {store.prefix}: {len(store):,} groups with {scorer.path} (weights {scorer.fingerprint[:12]}, "
            f"{plan.config.precision}) in {seconds:.1f}s -> {store.prefix}.{scorer.suffix}.*",
            flush=True,
        )
    else:
        for _ in blocks:
            pass
    barrier()  # the others must not run ahead into a store that is still being written


def _scored_blocks(plan: Plan, store: Store, scorer: Scorer, groups: Groups) -> Iterator[np.ndarray]:
    """fp64 arrays of numbers in store order, response after response; every rank must run this to its end."""
    loader = make_loader(plan, store, groups)
    size = GROUPS_AT_A_TIME * groups.dp.size
    for first in range(0, len(store), size):
        count = min(size, len(store) - first)
        counts = store.num_responses_D[first : first + count]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        rows = loader.sequential(first, count)
        batches = scorer.fill_reference([to_device(row, groups.device, cp=groups.cp) for row in rows])
        numbers = run_responses(scorer.model, batches, scorer.function)
        block = torch.zeros(int(offsets[-1]), dtype=torch.float64, device=groups.device)
        if groups.speaks_for_data:
            for row, number_GK in zip(rows, numbers, strict=True):
                for g, group_id in enumerate(row.group_ids_G):
                    if group_id >= 0:
                        at, k = offsets[group_id - first], counts[group_id - first]
                        block[at : at + k] = number_GK[g, :k]
        yield sum_over_world(block).cpu().numpy()


def _by_group(store: Store, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    counts = iter(store.num_responses_D)
    for block in blocks:
        while block.size:
            k = int(next(counts))
            yield block[:k]
            block = block[k:]
