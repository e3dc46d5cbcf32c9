"""What the processes of the tests of the heads do; one process gives the expected values with the same functions."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rpo_megatron.config import OptimizerConfig, ParallelConfig
from rpo_megatron.config_verbs import ExportConfig
from rpo_megatron.distributed import Groups, gather_objects, start
from rpo_megatron.model.build import ScoringModel, build, wrap
from rpo_megatron.model.scores import Scores
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import find
from rpo_megatron.model.weights import gather_hf
from rpo_megatron.training import checkpoint, convert
from rpo_megatron.training.checkpoint import load_weights
from rpo_megatron.training.optimizer import build_optimizer
from tests.checkpoints import run_state, save
from tests.model.rows import (
    Packed,
    kl_loss,
    load,
    outcome,
    random_rows,
    schedule,
    token_loss,
    value_loss,
    with_reference,
)
from tests.model.whole import whole


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A global batch, gathered: what must not depend on the layout."""

    numbers: list[list[float]]
    """By row: its values, or its token KLs followed by its log-probs."""
    gradients: dict[str, torch.Tensor]
    gradient_spread: float
    """Largest difference between ranks of the value head's gradient, where they have it."""
    grad_norm: float


def values(data: str, cases: list[tuple[str, ParallelConfig]]) -> list[Whole]:
    """Bradley-Terry of the reward model `data`/name under each (name, layout)."""
    return [_values(Path(data) / name, parallel) for name, parallel in cases]


def _values(directory: Path, parallel: ParallelConfig) -> Whole:
    groups = start(parallel)
    model = load(directory, groups, sequence_parallel=parallel.sequence)
    return _whole(model, _share(random_rows(8), groups), value_loss, groups)


def token_kls(data: str, cases: list[tuple[str, ParallelConfig]]) -> list[Whole]:
    """Token KL of the policy `data`/name and the reference `data`/reference under each (name, layout)."""
    return [_token_kls(Path(data), name, parallel) for name, parallel in cases]


def _token_kls(directory: Path, name: str, parallel: ParallelConfig) -> Whole:
    groups = start(parallel)
    policy, reference = (
        load(directory / which, groups, sequence_parallel=parallel.sequence) for which in (name, "reference")
    )
    rows = with_reference(_share(random_rows(8), groups), reference)
    return _whole(policy, rows, token_loss, groups)


def _share(rows: list[Packed], groups: Groups) -> list[Packed]:
    return rows[groups.dp.rank :: groups.dp.size]


def _whole(model: ScoringModel, rows: list[Packed], loss: Any, groups: Groups) -> Whole:
    result = outcome(model, rows, loss, groups)
    mine = [_numbers(packed, scores) for packed, scores in zip(rows, result.scores, strict=False)]
    parts = gather_objects((groups.dp.rank, mine) if groups.speaks_for_data else None)
    by_dp = [numbers for _, numbers in sorted(part for part in parts if part)]
    heads = [gradient for gradient in gather_objects(result.head_gradient) if gradient is not None]
    return Whole(
        numbers=[numbers for turn in zip(*by_dp, strict=True) for numbers in turn],
        gradients=result.gradients,
        gradient_spread=max((float((gradient - heads[0]).abs().max()) for gradient in heads), default=0.0),
        grad_norm=result.grad_norm,
    )


def _numbers(packed: Packed, scores: Scores) -> list[float]:
    if scores.value_GK is not None:
        return scores.value_GK[packed.valid()].flatten().tolist()
    assert scores.token_kl_N is not None
    assert scores.logp_N is not None
    return [*scores.token_kl_N.tolist(), *scores.logp_N.tolist()]


def equal_models(data: str, layouts: list[ParallelConfig]) -> list[tuple[float, float]]:
    """(largest token KL, largest gradient of its sum) with the reference equal to the policy, over all ranks."""
    results = []
    for parallel in layouts:
        groups = start(parallel)
        policy, reference = (load(Path(data) / "model", groups, sequence_parallel=parallel.sequence) for _ in range(2))
        rows = with_reference(_share(random_rows(8), groups), reference)
        result = outcome(policy, rows, kl_loss, groups)
        kls = [float(s.token_kl_N.abs().max()) for s in result.scores if s.token_kl_N is not None and len(s.token_kl_N)]
        gradients = [float(gradient.abs().max()) for gradient in result.gradients.values()]
        results.append((max(max(part, default=0.0) for part in gather_objects(kls)), max(gradients, default=0.0)))
    return results


# ------------------------------------------------------------------------------------------------ checkpoints


@dataclass(frozen=True, kw_only=True)
class Restored:
    weights: dict[str, torch.Tensor]
    """By Hugging Face name, whole; on the first rank."""
    values: list[list[float]]
    after_step: dict[str, torch.Tensor]
    """Weights after the optimizer, restored too, made one more step."""


def save_and_load(data: str, save: ParallelConfig, layouts: list[ParallelConfig]) -> list[Restored]:
    """Start a reward model from the language model `data`/lm, make one step, save `data`/saved and make another; then
    resume under each layout. Last, export `data`/exported over two tensor ranks and two stages."""
    results = [_save(Path(data), save), *(_load(Path(data), parallel) for parallel in layouts)]
    _export(Path(data) / "saved", Path(data) / "exported")
    return results


def _save(directory: Path, parallel: ParallelConfig) -> Restored:
    groups = start(parallel)
    model = _empty(directory / "lm", parallel, groups)
    load_weights(model, find(directory / "lm"), groups, seed=3)
    ddp = wrap(model)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), ddp, "fp32")
    _step(ddp, optimizer, groups)
    # What megatron calls where every data rank gets the whole of their optimizer, 12 bytes for each of its parameters.
    with mock.patch("torch.distributed.all_gather", side_effect=AssertionError("only one data rank writes it")):
        save(model, optimizer, directory=directory / "saved", companions=directory / "lm", groups=groups)
    return _restored(model, ddp, optimizer, groups)


def _load(directory: Path, parallel: ParallelConfig) -> Restored:
    groups = start(parallel)
    model = _empty(directory / "lm", parallel, groups)
    ddp = wrap(model)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), ddp, "fp32")
    checkpoint.load(model, optimizer, directory=directory / "saved", expected=run_state(), groups=groups)
    return _restored(model, ddp, optimizer, groups)


def _empty(hf: Path, parallel: ParallelConfig, groups: Groups) -> ScoringModel:
    shape = replace(read_shape(hf), head="value")
    return build(shape, precision="fp32", sequence_parallel=parallel.sequence, groups=groups)


def _step(ddp: Any, optimizer: Any, groups: Groups) -> None:
    ddp.zero_grad_buffer()
    rows = _share(random_rows(8), groups)
    schedule(
        ddp,
        rows,
        lambda packed, scores: (value_loss(packed, scores), packed.valid().sum(dtype=torch.int), {}),
        forward_only=False,
    )
    optimizer.step()


def _restored(model: ScoringModel, ddp: Any, optimizer: Any, groups: Groups) -> Restored:
    weights = whole(gather_hf(model, groups))
    rows = _share(random_rows(8), groups)
    with torch.no_grad():
        scores = schedule(model, rows, lambda _, scores: scores, forward_only=True, collect_non_loss_data=True)
    mine = [_numbers(packed, score) for packed, score in zip(rows, scores, strict=False)]
    parts = gather_objects((groups.dp.rank, mine) if groups.speaks_for_data else None)
    by_dp = [numbers for _, numbers in sorted(part for part in parts if part)]
    _step(ddp, optimizer, groups)
    values = [numbers for turn in zip(*by_dp, strict=True) for numbers in turn]
    return Restored(weights=weights, values=values, after_step=whole(gather_hf(model, groups)))


def starts(data: str, sources: list[str], layouts: list[ParallelConfig]) -> list[dict[str, torch.Tensor]]:
    """The weights of a reward model started from each language model, under each layout."""
    results = []
    for name in sources:
        for parallel in layouts:
            groups = start(parallel)
            source = find(Path(data) / name)
            model = _empty(source.hf, parallel, groups)
            load_weights(model, source, groups, seed=3)
            results.append(whole(gather_hf(model, groups)))
    return results


def exports(data: str, checkpoints: dict[str, str]) -> None:
    """{checkpoint: new Hugging Face directory} of `data`, over two tensor ranks and two stages."""
    for saved, exported in checkpoints.items():
        _export(Path(data) / saved, Path(data) / exported)


def _export(saved: Path, exported: Path) -> None:
    groups = start(ParallelConfig(tensor=2, pipeline=2))
    source = find(saved)
    model = build(read_shape(source.hf), precision="fp32", sequence_parallel=False, groups=groups)
    load_weights(model, source, groups)
    config = ExportConfig(load=str(saved), save=str(exported))
    convert.write_hf(model, config, source.hf, dtype="float32", groups=groups)
