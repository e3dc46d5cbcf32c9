"""Packed rows and one optimizer step without the data and training packages: what the tests of the heads run on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from rpo_megatron.config import OptimizerConfig
from rpo_megatron.distributed import Groups
from rpo_megatron.model.build import ScoringModel, build, wrap
from rpo_megatron.model.row import Row, Segments
from rpo_megatron.model.scores import ReferenceTokens, Scores
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import Source
from rpo_megatron.model.table import SCORE
from rpo_megatron.model.weights import gather_hf
from rpo_megatron.training.checkpoint import load_weights
from rpo_megatron.training.optimizer import build_optimizer
from tests.model.whole import reduce_whole_gradients, whole_gradients

Conversation = tuple[list[int], list[int]]
"""Prompt tokens, response tokens."""


@dataclass(frozen=True)
class Packed:
    """Groups of two conversations each, [G, 2], and the row that holds them. A group of None is padding."""

    groups: list[tuple[Conversation, Conversation] | None]
    row: Row

    def valid(self) -> torch.Tensor:
        return torch.tensor([group is not None for group in self.groups])


def pack(groups: list[tuple[Conversation, Conversation] | None], *, multiple: int = 4) -> Packed:
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    scored: list[tuple[int, int]] = []
    last_GK = []
    for pair in groups:
        last_K = []
        for prompt, response in pair or ():
            start = len(tokens) + len(prompt)
            scored += [(start + i - 1, label) for i, label in enumerate(response)]
            lengths.append(len(prompt) + len(response))
            tokens += prompt + response
            positions += range(lengths[-1])
            last_K.append(len(tokens) - 1)
        last_GK.append(last_K or [0, 0])
    padding = multiple - len(tokens) % multiple
    row = Row(
        tokens_1T=torch.tensor([tokens + [0] * padding]),
        positions_T=torch.tensor(positions + list(range(padding))),
        segments=Segments(lengths=[*lengths, padding], prompts=[-1] * (len(lengths) + 1)),
        scored_position_N=torch.tensor([position for position, _ in scored], dtype=torch.long),
        scored_label_N=torch.tensor([label for _, label in scored], dtype=torch.long),
        last_position_GK=torch.tensor(last_GK),
        before_last_position_GK=(torch.tensor(last_GK) - 1).clamp(min=0),
    )
    return Packed(groups, row)


def random_rows(count: int, *, vocab_size: int = 131, seed: int = 0) -> list[Packed]:
    """Rows of 1 to 3 groups of differing lengths; the last row holds nothing but a padding group."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, vocab_size, (size,), generator=generator).tolist()

    rows = []
    for i in range(count - 1):
        prompts = [tokens(1, 6) for _ in range(1 + i % 3)]
        rows.append(pack([((prompt, tokens(1, 8)), (prompt, tokens(1, 8))) for prompt in prompts]))
    return [*rows, pack([None])]


def load(directory: Path, groups: Groups, *, sequence_parallel: bool = False) -> ScoringModel:
    shape = read_shape(directory)
    model = build(shape, precision="fp32", sequence_parallel=sequence_parallel, groups=groups)
    load_weights(model, Source(path=directory, kind="huggingface"), groups)
    return model


def schedule(model: Any, rows: list[Packed], finish: Callable[..., Any], **options: Any) -> list[Any]:
    """`finish(packed, scores)` of every row, on the last stage."""

    def forward_step(iterator: Iterator[Packed], stage: Any, *_: Any) -> tuple[Any, Any]:
        packed = next(iterator)
        keep = {"keep_hidden": True} if "collect_non_loss_data" in options else {}
        return stage(packed.row, **keep), lambda scores, **_: finish(packed, scores)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=[model],
        num_microbatches=len(rows),
        seq_length=4,
        micro_batch_size=1,
        **options,
    )


def with_reference(rows: list[Packed], reference: ScoringModel) -> list[Packed]:
    """The rows with the reference's hidden states, on the last stage."""
    with torch.no_grad():
        hidden = schedule(
            reference, rows, lambda packed, scores: scores.hidden_NH, forward_only=True, collect_non_loss_data=True
        )
    if not hidden:
        return rows
    tokens = [ReferenceTokens(hidden_NH=hidden_NH, shard=reference.vocab_shard) for hidden_NH in hidden]
    return [
        Packed(packed.groups, replace(packed.row, reference=reference_tokens))
        for packed, reference_tokens in zip(rows, tokens, strict=True)
    ]


def value_loss(packed: Packed, scores: Scores) -> torch.Tensor:
    """Bradley-Terry, the first response of each group preferred, summed over the groups."""
    assert scores.value_GK is not None
    assert scores.logp_N is scores.token_kl_N is scores.hidden_NH is None
    losses_G = torch.nn.functional.softplus(scores.value_GK[:, 1] - scores.value_GK[:, 0])
    return torch.where(packed.valid(), losses_G, 0.0).sum()


def token_loss(packed: Packed, scores: Scores) -> torch.Tensor:
    """Token KL and log-probabilities, each token with a weight of its own."""
    assert scores.token_kl_N is not None
    assert scores.logp_N is not None
    weight_N = 0.5 + torch.arange(len(scores.logp_N)) % 3
    return (weight_N * (scores.token_kl_N - 0.1 * scores.logp_N)).sum()


def kl_loss(packed: Packed, scores: Scores) -> torch.Tensor:
    """Nothing but the token KL."""
    assert scores.token_kl_N is not None
    return scores.token_kl_N.sum()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A global batch: what must not depend on the layout."""

    scores: list[Scores]
    """Of this rank's rows, on the last stage."""
    gradients: dict[str, torch.Tensor]
    """By Hugging Face name, whole, of the mean over all groups; on the first rank."""
    head_gradient: torch.Tensor | None
    """This rank's own gradient of the value head, None where there is none."""
    grad_norm: float


def outcome(
    model: ScoringModel, rows: list[Packed], loss: Callable[[Packed, Scores], torch.Tensor], groups: Groups
) -> Outcome:
    """Forward, backward and the norm of one optimizer step over this rank's rows."""
    ddp = wrap(model)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), ddp, "fp32")
    reduce_whole_gradients(model)
    ddp.zero_grad_buffer()

    def finish(packed: Packed, scores: Scores) -> tuple[torch.Tensor, torch.Tensor, Scores]:
        detached = {name: None if t is None else t.detach() for name, t in vars(scores).items()}
        return loss(packed, scores), packed.valid().sum(dtype=torch.int), Scores(**detached)

    scores = schedule(ddp, rows, finish, forward_only=False)
    gradients = whole_gradients(model.parameters(), lambda: gather_hf(model, groups))
    head = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters() if name == SCORE}
    _, grad_norm, _ = optimizer.step()
    return Outcome(scores=scores, gradients=gradients, head_gradient=head.get(SCORE), grad_norm=float(grad_norm))
