"""Megatron's pipeline schedule, in the two forms that a run needs: with the objective, and to look at the scores only.

1. `to_device` turns a MicroBatch (numpy) into a Batch (tensors on the rank's device).
2. The schedule calls `forward_step` for every batch and stage; the last stage gets Scores: log-probs [N], or values.
3. On the last stage they become Responses, one number per response [G, K], and the objective gives losses [G].
4. The loss function answers (sum of losses, number of groups, statistics). Megatron adds up the counts over
   micro-batches and data-parallel ranks and divides the gradient once: the exact mean over the global batch.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.distributed import Axis
from rpo_megatron.model.borders import on_device
from rpo_megatron.model.chunks import in_turns
from rpo_megatron.model.context import part_of
from rpo_megatron.model.logprobs import response_logps
from rpo_megatron.model.row import Row, Segments
from rpo_megatron.model.scores import ReferenceTokens, Scores
from rpo_megatron.objectives.objective import Objective
from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.statistics import Stats
from rpo_megatron.training.p2p import planned_messages

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on the device: what the model reads (`row`) and what the objective reads (the rest)."""

    row: Row
    length_GK: torch.Tensor
    valid_GK: torch.Tensor
    draw_G: torch.Tensor
    reward_GK: torch.Tensor | None
    rewards_GKM: torch.Tensor | None
    source_GK: torch.Tensor | None
    ref_logp_GK: torch.Tensor | None
    counted: bool = True
    """False on all context ranks but the first: they compute the same numbers of the same groups."""

    def responses(self, scores: Scores) -> Responses:
        """What the objective sees of the model's answer."""
        return Responses(
            length_GK=self.length_GK,
            valid_GK=self.valid_GK,
            draw_G=self.draw_G,
            logp_GK=self._per_response(scores.logp_N),
            value_GK=scores.value_GK,
            ref_logp_GK=self.ref_logp_GK,
            token_kl_GK=self._per_response(scores.token_kl_N),
            entropy_GK=self._per_response(scores.entropy_N),
            reward_GK=self.reward_GK,
            rewards_GKM=self.rewards_GKM,
            source_GK=self.source_GK,
        )

    def _per_response(self, token_N: torch.Tensor | None) -> torch.Tensor | None:
        """Summed in fp64, kept in fp32 like a stored reference: while two models are equal, so are their numbers."""
        return None if token_N is None else response_logps(token_N, self.length_GK).float()


def to_device(microbatch: MicroBatch, device: torch.device, *, cp: Axis | None = None) -> Batch:
    """`cp` is the context axis; None stands for one of size 1."""

    def tensor(array: Any) -> torch.Tensor:
        return on_device(array, device)

    def optional(array: Any) -> torch.Tensor | None:
        return None if array is None else tensor(array)

    part = None
    if cp is not None and cp.size > 1:
        num_tokens = microbatch.tokens_T.size
        part = part_of(microbatch.scored_position_N, num_tokens=num_tokens, cp=cp, device=device)
    return Batch(
        row=Row(
            tokens_1T=tensor(microbatch.tokens_T)[None],
            positions_T=tensor(microbatch.positions_T),
            segments=Segments(lengths=microbatch.segments_S.tolist(), prompts=microbatch.prompt_S.tolist()),
            scored_position_N=tensor(microbatch.scored_position_N),
            scored_label_N=tensor(microbatch.scored_label_N),
            last_position_GK=tensor(microbatch.last_position_GK),
            before_last_position_GK=tensor(microbatch.before_last_position_GK),
            group_T=tensor(microbatch.group_T),
            part=part,
        ),
        counted=cp is None or cp.first,
        length_GK=tensor(microbatch.length_GK),
        valid_GK=tensor(microbatch.valid_GK),
        draw_G=tensor(microbatch.draw_G),
        reward_GK=optional(microbatch.reward_GK),
        rewards_GKM=optional(microbatch.rewards_GKM),
        source_GK=optional(microbatch.source_GK),
        ref_logp_GK=optional(microbatch.ref_logp_GK),
    )


def run_objective(model: Any, batches: list[Batch], objective: Objective, *, train: bool) -> Stats:
    """Forward over a global batch's share of this rank, and backward if `train`; otherwise nothing has a gradient and
    the statistics include those that only an evaluation needs.

    Gradients are left in the model's buffers, reduced and divided by the global number of groups. The statistics are
    this rank's sums; empty on every stage but the last.
    """
    answer = _loss if train else _evaluation

    def forward_step(rows: Iterator[Batch], stage: Any, *_: Any) -> tuple[Any, Any]:
        batch = next(rows)
        return stage(batch.row, entropy=not train), partial(answer, batch, objective)

    with torch.set_grad_enabled(train):
        collected = _schedule(model, batches, forward_step, forward_only=not train)
    return functools.reduce(merge_stats, collected, {})


def run_responses(
    model: Any, batches: list[Batch], function: Callable[[Responses], torch.Tensor]
) -> list[torch.Tensor]:
    """`function` of each batch's responses, without gradient; an empty list on every stage but the last."""
    return _collect(model, batches, lambda batch, scores: function(batch.responses(scores)))


def run_logps(model: Any, batches: list[Batch]) -> list[torch.Tensor]:
    """Summed log-probabilities fp32 [G, K] of each batch, likewise."""
    return run_responses(model, batches, policy_logps)


def policy_logps(responses: Responses) -> torch.Tensor:
    """Summed log-probabilities [G, K] of a model that has an output layer."""
    assert responses.logp_GK is not None
    return responses.logp_GK


def with_reference_logps(reference: Any, batches: list[Batch]) -> list[Batch]:
    """The batches with the reference's log-probs in place (as they were, on stages that never see them)."""
    logps = run_logps(reference, batches)
    if not logps:
        return batches
    return [replace(batch, ref_logp_GK=logp_GK) for batch, logp_GK in zip(batches, logps, strict=True)]


def with_reference_tokens(reference: Any, batches: list[Batch]) -> list[Batch]:
    """The same and, for the KL over the vocabulary, the reference's hidden states at the scored positions: N x hidden
    numbers for each batch of the step, kept until the policy has seen the batch."""
    collected = _collect(reference, batches, partial(_with_tokens, reference), keep_hidden=True)
    return collected or batches


def _with_tokens(reference: Any, batch: Batch, scores: Scores) -> Batch:
    assert scores.hidden_NH is not None
    tokens = ReferenceTokens(hidden_NH=scores.hidden_NH, shard=reference.vocab_shard)
    row = replace(batch.row, reference=tokens)
    return replace(batch, row=row, ref_logp_GK=policy_logps(batch.responses(scores)))


def merge_stats(before: Stats, stats: Stats) -> Stats:
    """Add up sums and counts by name."""
    total = dict(before)
    for name, (value, count) in stats.items():
        old = total.get(name)
        total[name] = (value, count) if old is None else (old[0] + value, old[1] + count)
    return total


def _loss(batch: Batch, objective: Objective, scores: Scores) -> tuple[torch.Tensor, torch.Tensor, Stats]:
    losses_G, stats = objective(batch.responses(scores))
    count = batch.valid_GK.any(dim=1).sum(dtype=torch.int)
    total = losses_G.sum()
    return total.float(), count * batch.counted, {"loss": (total.detach(), count), **stats}


def _evaluation(batch: Batch, objective: Objective, scores: Scores) -> tuple[torch.Tensor, torch.Tensor, Stats]:
    total, count, stats = _loss(batch, objective, scores)
    return total, count, stats | objective.evaluate(batch.responses(scores))


def _collect(model: Any, batches: list[Batch], answer: Callable[[Batch, Scores], T], **options: Any) -> list[T]:
    """What `answer` makes of each batch on the last stage, without gradient; an empty list on the others. `options` go
    to the model's forward."""

    def forward_step(rows: Iterator[Batch], stage: Any, *_: Any) -> tuple[Any, Any]:
        batch = next(rows)
        return stage(batch.row, **options), lambda scores, *, non_loss_data: answer(batch, scores)

    with torch.no_grad():
        return _schedule(model, batches, forward_step, forward_only=True, collect_non_loss_data=True)


def _schedule(model: Any, batches: list[Batch], forward_step: Any, **options: Any) -> list[Any]:
    """megatron's schedule for the current layout: plain accumulation, or 1F1B over pipeline stages, interleaved where
    they have several chunks."""
    chunks = in_turns(model, num_rows=len(batches))
    lengths = [batch.row.tokens_1T.shape[1] for batch in batches]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=lengths[0],  # a hint only: rows have variable length
        micro_batch_size=1,
        **planned_messages(get_model_config(model), lengths),
        **options,
    )
