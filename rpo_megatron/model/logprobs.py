"""From hidden states to log-probabilities: per scored token on vocabulary shards, then summed per response.

    hidden [T(/tp under SP), 1, H] -> rows that predict a response token [N, H] -> log-probs [N] -> sums [G, K]

Only the scored rows reach the output layer; a prompt's vocabulary projection is never computed. The output layer's
weight is split over the tensor ranks along the vocabulary, and so are the logits, of which only a tile exists at a
time (vocab.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)

from rpo_megatron.distributed import Axis
from rpo_megatron.errors import UserError
from rpo_megatron.model import triton_logprobs
from rpo_megatron.model.vocab import (
    LOWEST,
    Kept,
    Tiles,
    VocabShard,
    WeightGradient,
    backpropagate,
    merge_ranks,
    reduce_logits,
)

LogprobsName = Literal["tiles", "triton"]
LOG2E = math.log2(math.e)
KEEP_MIB = {"cpu": 32, "cuda": 512}
"""Memory for logits that are kept, by default. On a CPU all that the output layer takes beside the gradient of its
weight then stays below 64 MiB."""


def choose_logprobs(name: Literal["auto", "tiles", "triton"], device: torch.device) -> LogprobsName:
    """`auto` is tiles. Raises UserError where Triton's kernels cannot run."""
    if name == "auto":
        return "tiles"
    if name == "triton" and not (triton_logprobs.available() and device.type == "cuda"):
        raise UserError("kernels.logprobs=triton needs a GPU, Triton and torch 2.10 or newer; set it to tiles, or auto")
    return name


def choose_kept(mib: int | None, name: LogprobsName, device: torch.device) -> int:
    """Bytes of logits to keep for backward, from kernels.keep_logits_mib."""
    if name == "triton":
        return 0
    return 2**20 * (KEEP_MIB["cuda" if device.type == "cuda" else "cpu"] if mib is None else mib)


def scored_hidden(
    hidden_T1H: torch.Tensor, position_N: torch.Tensor, *, tp: Axis, sequence_parallel: bool
) -> torch.Tensor:
    """Hidden states at the scored positions, [N, H], whole on every tensor rank, for layers whose weight is split over
    the tensor ranks: backward adds up the parts of the gradient that come from the shards."""
    if sequence_parallel:
        # all-gather over TP forward; reduce-scatter backward, because each rank's shard gives a part of the gradient
        whole_T1H = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=True, group=tp.group)
        return whole_T1H[position_N, 0]
    # identity forward; all-reduce over TP backward, for the same reason
    return copy_to_tensor_model_parallel_region(hidden_T1H[position_N, 0], group=tp.group)


def token_logprobs(
    hidden_NH: torch.Tensor,
    shard: VocabShard,
    label_N: torch.Tensor,
    *,
    impl: LogprobsName = "tiles",
    keep_bytes: int = 0,
) -> torch.Tensor:
    """Log-probability of each label, fp32 [N], the same on every tensor rank; the N x V logits are never materialised.

    `hidden_NH` comes from `scored_hidden`; it and the shard's weight get gradients. `impl` says what stands between
    the matrix multiplications: torch (`tiles`), or a Triton kernel each way (triton_logprobs.py). `keep_bytes` is the
    memory that `tiles` may take for logits that backward then need not make again; the results are the same to the bit.

    1. Of each tile, a row keeps the largest logit, the sum of exponentials and, if it is there, the label's logit.
    2. Tiles, then tensor ranks, are merged.
    3. Backward makes each tile's logits again, if they were not kept: their gradient is onehot(label) - p. That of the
       weight is added up in fp32.
    """
    if impl == "triton":
        logp_N: torch.Tensor = _TritonLogProbs.apply(hidden_NH, shard.weight_VH, label_N, shard)
        return logp_N
    kept = Kept(keep_bytes if torch.is_grad_enabled() else 0)
    logp_N = _TokenLogProbs.apply(hidden_NH, shard.weight_VH, label_N, shard, kept)
    return logp_N


def plain_logprobs(hidden_NH: torch.Tensor, shard: VocabShard, label_N: torch.Tensor) -> torch.Tensor:
    """The same with all logits materialised, by megatron's own cross-entropy: the oracle of the tests."""
    logits_NV = F.linear(hidden_NH, shard.weight_VH).float()
    if shard.softcap is not None:
        logits_NV = shard.softcap * (logits_NV / shard.softcap).tanh()
    logits_NV[:, shard.num_words :] = LOWEST  # padding has no probability
    return -vocab_parallel_cross_entropy(logits_NV, label_N)


class _TokenLogProbs(torch.autograd.Function):
    """exp(z) is 2^(z log2(e) - s) 2^s, with the whole number s below the row's largest z log2(e): torch has powers of
    two at four times the speed of exp on a CPU, and 2^s moves sums from one s to another without rounding."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, label_N: torch.Tensor, shard: VocabShard, kept: Kept
    ) -> torch.Tensor:
        column_N, tiles = label_N - shard.first_word, Tiles(shard, hidden_NH.shape[0])

        def statistics(logits_CW: torch.Tensor, rows: slice, words: slice) -> torch.Tensor:
            shift_C = (logits_CW.amax(-1) * LOG2E).floor()
            column_C, mine_C = _inside(column_N[rows], words)
            label_C = torch.where(mine_C, logits_CW.gather(1, column_C[:, None])[:, 0], 0.0)
            power_CW = torch.add(-shift_C[:, None], logits_CW, alpha=LOG2E, out=tiles.scratch(logits_CW))
            return torch.stack((shift_C, power_CW.exp2_().sum(-1), label_C))

        shift_N, sum_N, label_logit_N = reduce_logits(
            *(hidden_NH, shard, tiles, statistics), merge=_merge_powers, nothing=(LOWEST, 0.0, 0.0), kept=kept
        )
        ctx.shard, ctx.kept = shard, kept
        # The shift and the sum, not one log-sum-exp: its rounding would be that of every probability.
        ctx.save_for_backward(hidden_NH, column_N, shift_N, sum_N)
        return (label_logit_N.double() - shift_N.double() * math.log(2) - sum_N.double().log()).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, column_N, shift_N, sum_N = ctx.saved_tensors
        (grad_N,) = grads
        scale_N = -grad_N / sum_N

        def gradient(logits_CW: torch.Tensor, rows: slice, words: slice) -> torch.Tensor:
            column_C, mine_C = _inside(column_N[rows], words)
            power_CW = torch.add(-shift_N[rows, None], logits_CW, alpha=LOG2E, out=logits_CW)
            grad_CW = power_CW.exp2_().mul_(scale_N[rows, None])
            return grad_CW.scatter_add_(1, column_C[:, None], torch.where(mine_C, grad_N[rows], 0.0)[:, None])

        tiles = Tiles(ctx.shard, hidden_NH.shape[0])
        return *backpropagate(hidden_NH, ctx.shard, tiles, gradient, kept=ctx.kept), None, None, None


class _TritonLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, label_N: torch.Tensor, shard: VocabShard
    ) -> torch.Tensor:
        column_N = label_N - shard.first_word
        options: dict[str, Any] = {"num_words": shard.num_words, "softcap": shard.softcap}
        local_3N = triton_logprobs.forward_statistics(hidden_NH, weight_VH, column_N, **options)
        max_N, sum_N, label_logit_N = merge_ranks(local_3N, shard.tp, _merge)
        ctx.shard, ctx.options = shard, options
        ctx.save_for_backward(hidden_NH, column_N, max_N, sum_N)
        return label_logit_N - max_N - sum_N.log()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, column_N, max_N, sum_N = ctx.saved_tensors
        weight_VH = ctx.shard.weight_VH
        total = WeightGradient(weight_VH)
        grad_NH = triton_logprobs.backward(
            *(grads[0], hidden_NH, weight_VH, column_N, max_N, sum_N),
            **ctx.options,
            grad_weight_VH=total.total_VH if total.wanted else None,
        )
        return grad_NH, total.for_autograd(), None, None


def _merge(parts_P3N: torch.Tensor, *, power: Callable[[torch.Tensor], torch.Tensor] = torch.exp) -> torch.Tensor:
    """Of (shift, sum of powers below it, label's logit or 0) each; the powers' base is that of `power`."""
    shift_PN, sum_PN, label_PN = parts_P3N.unbind(1)
    shift_N = shift_PN.amax(0)
    return torch.stack((shift_N, (power(shift_PN - shift_N) * sum_PN).sum(0), label_PN.sum(0)))


_merge_powers = partial(_merge, power=torch.exp2)


def _inside(column_N: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(column of each label among these words, whether the label is one of them); the column is 0 where it is not."""
    mine_N = (column_N >= words.start) & (column_N < words.stop)
    return torch.where(mine_N, column_N - words.start, 0), mine_N


def response_logps(logp_N: torch.Tensor, length_GK: torch.Tensor) -> torch.Tensor:
    """Sum token log-probabilities per response: [N] -> fp64 [G, K].

    The scored tokens of a response are consecutive and in (group, response) order, so this is a segmented sum. It is
    done in fp64: a serial fp32 sum of a long response costs more accuracy than the whole forward pass.
    """
    sums: Any = torch.segment_reduce(logp_N.double(), "sum", lengths=length_GK.flatten(), unsafe=True, initial=0.0)
    return sums.view(length_GK.shape)
