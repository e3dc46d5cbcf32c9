"""Megatron's pipeline schedule, in the two forms that a run needs: with the objective, and for log-probabilities only.

1. `to_device` turns a MicroBatch (numpy) into a Batch (tensors on the rank's device).
2. The schedule calls `forward_step` for every batch and stage; the last stage gets log-probs [N].
3. On the last stage they are summed per response, [G, K], and handed to the objective, which gives losses [G].
4. The loss function answers (sum of losses, number of groups, statistics). Megatron adds up the counts over
   micro-batches and data-parallel ranks and divides the gradient once: the exact mean over the global batch.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.model.logprobs import response_logps
from rpo_megatron.model.row import Row, Segments
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.statistics import Stats


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on the device: what the model reads (`row`) and what the objective reads (the rest)."""

    row: Row
    length_GK: torch.Tensor
    reward_GK: torch.Tensor | None
    ref_logp_GK: torch.Tensor | None
    valid_GK: torch.Tensor
    draw_G: torch.Tensor

    def responses(self, logp_N: torch.Tensor) -> Responses:
        return Responses(
            # Summed in fp64, kept in fp32 like the reference: while the two models are equal, so are the numbers.
            logp_GK=response_logps(logp_N, self.length_GK).float(),
            length_GK=self.length_GK,
            ref_logp_GK=self.ref_logp_GK,
            reward_GK=self.reward_GK,
            valid_GK=self.valid_GK,
            draw_G=self.draw_G,
        )


def to_device(microbatch: MicroBatch, device: torch.device) -> Batch:
    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def optional(array: Any) -> torch.Tensor | None:
        return None if array is None else tensor(array)

    return Batch(
        row=Row(
            tokens_1T=tensor(microbatch.tokens_T)[None],
            positions_T=tensor(microbatch.positions_T),
            segments=Segments(lengths=microbatch.segments_S.tolist()),
            scored_position_N=tensor(microbatch.scored_position_N),
            scored_label_N=tensor(microbatch.scored_label_N),
        ),
        length_GK=tensor(microbatch.length_GK),
        reward_GK=optional(microbatch.reward_GK),
        ref_logp_GK=optional(microbatch.ref_logp_GK),
        valid_GK=tensor(microbatch.valid_GK),
        draw_G=tensor(microbatch.draw_G),
    )


def run_objective(model: Any, batches: list[Batch], objective: Objective, *, train: bool) -> Stats:
    """Forward (and backward if `train`) over a global batch's share of this rank.

    Gradients are left in the model's buffers, reduced and divided by the global number of groups. The statistics are
    this rank's sums; empty on every stage but the last.
    """

    def forward_step(rows: Iterator[Batch], stage: Any, *_: Any) -> tuple[torch.Tensor, Any]:
        batch = next(rows)
        return stage(batch.row), partial(_loss, batch, objective)

    collected = _schedule(model, batches, forward_step, forward_only=not train)
    return functools.reduce(merge_stats, collected, {})


def run_logps(model: Any, batches: list[Batch]) -> list[torch.Tensor]:
    """Summed log-probabilities fp64 [G, K] of each batch, without gradient; an empty list on all but the last stage."""

    def forward_step(rows: Iterator[Batch], stage: Any, *_: Any) -> tuple[torch.Tensor, Any]:
        batch = next(rows)
        return stage(batch.row), partial(_logps, batch)

    with torch.no_grad():
        return _schedule(model, batches, forward_step, forward_only=True, collect_non_loss_data=True)


def merge_stats(before: Stats, stats: Stats) -> Stats:
    """Add up sums and counts by name."""
    total = dict(before)
    for name, (value, count) in stats.items():
        old = total.get(name)
        total[name] = (value, count) if old is None else (old[0] + value, old[1] + count)
    return total


def with_reference(batches: list[Batch], logps: list[torch.Tensor]) -> list[Batch]:
    """The batches with the reference's log-probs in place (no-op on stages that never see them)."""
    if not logps:
        return batches
    return [replace(batch, ref_logp_GK=logp.float()) for batch, logp in zip(batches, logps, strict=True)]


def _loss(batch: Batch, objective: Objective, logp_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Stats]:
    losses_G, stats = objective(batch.responses(logp_N))
    count = batch.valid_GK.any(dim=1).sum(dtype=torch.int)
    total = losses_G.sum()
    return total.float(), count, {"loss": (total.detach(), count), **stats}


def _logps(batch: Batch, logp_N: torch.Tensor, *, non_loss_data: bool) -> torch.Tensor:
    return response_logps(logp_N, batch.length_GK)


def _schedule(model: Any, batches: list[Batch], forward_step: Any, **options: Any) -> list[Any]:
    """megatron's schedule for the current layout: plain accumulation, or 1F1B over pipeline stages."""
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].row.tokens_1T.shape[1],  # a hint only: rows have variable length
        micro_batch_size=1,
        **options,
    )
