"""The output layer in tiles of rows x words: what log-probabilities, entropies and the token KL share.

The logits of all rows, [N, V], are the largest tensor of a step by far (N = 4,096 and V = 128k: 2.1 GB in fp32, and as
much again for their gradient). Here only those of a tile exist at a time; forward reduces them to a few numbers per
row, backward makes them again. What tiles say of a row, and what tensor ranks say of it, is merged by one and the same
function. Shapes: N rows, C rows and W words of a tile, P parts of the vocabulary, S numbers per row, H hidden size,
V this rank's rows of the padded vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rpo_megatron.distributed import Axis

TILE_ROWS = 1024
"""Enough for matrix multiplications at full speed; more would only narrow the tiles."""
TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}
"""Memory of the fp32 logits of a tile (of all models that take part); temporaries take up to as much again."""
LOWEST = torch.finfo(torch.float32).min
"""Largest logit of no words at all. A number, because infinities would give NaNs."""


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """This rank's part of a model's output layer."""

    weight_VH: torch.Tensor
    vocab_size: int
    """Words of the whole vocabulary, without padding."""
    tp: Axis
    softcap: float | None = None
    """Logits z become softcap * tanh(z / softcap) (Gemma 2, arXiv 2408.00118, section 2); None leaves them."""

    @property
    def first_word(self) -> int:
        return self.tp.rank * self.weight_VH.shape[0]

    @property
    def num_words(self) -> int:
        """Rows of the weight that are words and not padding; the others take no part in anything."""
        return min(max(0, self.vocab_size - self.first_word), self.weight_VH.shape[0])

    def slope(self, logits_CW: torch.Tensor) -> torch.Tensor | None:
        """Derivative of (soft-capped) logits by those before the cap; None where that is 1."""
        return None if self.softcap is None else 1 - (logits_CW / self.softcap).square()


class Tiles:
    """How N rows of a shard's logits are cut, and room for one tile of each of `num_models` models."""

    def __init__(self, shard: VocabShard, num_rows: int, *, num_models: int = 1) -> None:
        device = shard.weight_VH.device
        budget = max(1, TILE_BYTES[device.type] // (4 * num_models))
        rows = max(1, min(num_rows, TILE_ROWS, budget))
        words = max(1, min(shard.num_words, budget // rows))
        self.rows = [slice(start, start + rows) for start in range(0, num_rows, rows)]
        self.words = [slice(start, min(start + words, shard.num_words)) for start in range(0, shard.num_words, words)]
        self._room = [torch.empty(rows * words, dtype=torch.float32, device=device) for _ in range(num_models)]

    def logits(self, hidden_CH: torch.Tensor, shard: VocabShard, words: slice, *, model: int = 0) -> torch.Tensor:
        """fp32 [C, W], to be written over; gone with the next tile of the same model."""
        weight_WH = shard.weight_VH[words]
        shape = hidden_CH.shape[0], weight_WH.shape[0]
        logits_CW = self._room[model][: shape[0] * shape[1]].view(shape)
        if hidden_CH.dtype == torch.float32:
            torch.mm(hidden_CH, weight_WH.T, out=logits_CW)
        else:
            logits_CW.copy_(hidden_CH @ weight_WH.T)
        return logits_CW if shard.softcap is None else logits_CW.div_(shard.softcap).tanh_().mul_(shard.softcap)


Merge = Callable[[torch.Tensor], torch.Tensor]
"""[P, S, N] -> [S, N]: what parts of the vocabulary say of each row, to what they say together."""


def reduce_logits(
    hidden_NH: torch.Tensor,
    shard: VocabShard,
    tiles: Tiles,
    statistics: Callable[[torch.Tensor, slice, slice], torch.Tensor],
    *,
    merge: Merge,
    nothing: tuple[float, ...],
) -> torch.Tensor:
    """Statistics of each row's logits over the whole vocabulary, fp32 [S, N], the same on every tensor rank.

    `statistics(logits_CW, rows, words)` gives the [S, C] of a tile and may write over the logits; `merge` joins those
    of all tiles and then of all tensor ranks. `nothing` is what a part without words says.
    """
    device = hidden_NH.device
    local_SN = torch.tensor(nothing, dtype=torch.float32, device=device)[:, None].repeat(1, hidden_NH.shape[0])
    for rows in tiles.rows if tiles.words else []:
        parts = [statistics(tiles.logits(hidden_NH[rows], shard, words), rows, words) for words in tiles.words]
        local_SN[:, rows] = merge(torch.stack(parts))
    return merge_ranks(local_SN, shard.tp, merge)


def merge_ranks(local_SN: torch.Tensor, tp: Axis, merge: Merge) -> torch.Tensor:
    """What the vocabulary's shards say of each row, joined: one all-gather over the tensor ranks."""
    if tp.size == 1:
        return local_SN
    gathered = local_SN.new_empty(tp.size * local_SN.shape[0], local_SN.shape[1])
    dist.all_gather_into_tensor(gathered, local_SN, group=tp.group)
    return merge(gathered.unflatten(0, (tp.size, -1)))


def backpropagate(
    hidden_NH: torch.Tensor,
    shard: VocabShard,
    tiles: Tiles,
    gradient: Callable[[torch.Tensor, slice, slice], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the hidden states (this shard's part) and of the weight, summed in fp32.

    `gradient(logits_CW, rows, words)` gives the loss's gradient by a tile's logits and may write over them.
    """
    weight_VH, total = shard.weight_VH, WeightGradient(shard.weight_VH)
    grad_NH = torch.empty_like(hidden_NH)
    for rows in tiles.rows:
        hidden_CH = hidden_NH[rows]
        grad_CH = torch.zeros_like(hidden_CH, dtype=torch.float32)
        for words in tiles.words:
            logits_CW = tiles.logits(hidden_CH, shard, words)
            slope_CW = shard.slope(logits_CW)
            grad_CW = gradient(logits_CW, rows, words)
            grad_CW = (grad_CW if slope_CW is None else grad_CW.mul_(slope_CW)).to(weight_VH.dtype)
            add_product(grad_CH, grad_CW, weight_VH[words])
            total.add(words, grad_CW, hidden_CH)
        grad_NH[rows] = grad_CH
    return grad_NH, total.for_autograd()


class WeightGradient:
    """Where the gradient of an output layer's weight is added up, in fp32: in megatron's own buffer where it keeps one
    (`main_grad`), as its fused linear layers do, else in a tensor of this backward."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        main: Any = getattr(weight_VH, "main_grad", None)
        self._weight: Any = weight_VH
        self._is_main = main is not None and main.dtype == torch.float32
        self.total_VH = main if self._is_main else torch.zeros_like(weight_VH, dtype=torch.float32)

    def add(self, words: slice, grad_CW: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        add_product(self.total_VH[words], grad_CW.T, hidden_CH)

    def for_autograd(self) -> torch.Tensor | None:
        """What backward returns. With megatron's buffer, that is only what makes megatron's hook for this weight run: a
        tensor that nobody reads, or nothing where the weight is also the embedding's, whose own gradient does it."""
        if not self._is_main:
            return self.total_VH.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True
        return None if getattr(self._weight, "zero_out_wgrad", False) else torch.empty_like(self._weight)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, in the total's fp32 whatever the precision of the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)  # in place: no second tensor of the total's size
    else:
        total += a @ b
