"""The output layer in tiles of rows x words: what log-probabilities, entropies and the token KL share.

The logits of all rows, [N, V], are the largest tensor of a step by far (N = 4,096 and V = 128k: 2.1 GB in fp32, and as
much again for their gradient). Here only those of a tile exist at a time; forward reduces them to a few numbers per
row, backward makes them again, or finds those that forward kept. What tiles say of a row, and what tensor ranks say of
it, is merged by one and the same function. Shapes: N rows, C rows and W words of a tile, P parts of the vocabulary, S
numbers per row, H hidden size, V this rank's rows of the padded vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rpo_megatron.distributed import Axis
from rpo_megatron.model.products import add_product, multiply

TILE_ROWS = 1024
"""Enough for matrix multiplications at full speed; more would only narrow the tiles."""
TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
"""Memory of the fp32 logits of a tile (of all models that take part); temporaries take up to as much again. On a CPU
few enough for its caches, which costs matrix multiplications nothing."""
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


class Kept:
    """Products of hidden states and weight that forward leaves to backward, by tile: the first that fit `num_bytes`.

    In the precision in which they were computed and before a soft cap, so that backward goes on from the same numbers
    whether it finds them here or computes them again.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._tiles: dict[tuple[int, int], torch.Tensor] = {}

    def takes(self, num_bytes: int) -> bool:
        return num_bytes <= self._left

    def put(self, rows: slice, words: slice, product_CW: torch.Tensor) -> None:
        self._left -= product_CW.nbytes
        self._tiles[rows.start, words.start] = product_CW

    def pop(self, rows: slice, words: slice) -> torch.Tensor | None:
        """To be written over: a second backward through the same graph computes it again."""
        return self._tiles.pop((rows.start, words.start), None)


class Tiles:
    """How N rows of a shard's logits are cut, and room for one tile of each of `num_models` models."""

    def __init__(self, shard: VocabShard, num_rows: int, *, num_models: int = 1) -> None:
        self._shard = shard
        budget = max(1, TILE_BYTES[shard.weight_VH.device.type] // (4 * num_models))
        rows = max(1, min(num_rows, TILE_ROWS, budget))
        words = max(1, min(shard.num_words, budget // rows))
        self.rows = [slice(start, start + rows) for start in range(0, num_rows, rows)]
        self.words = [slice(start, min(start + words, shard.num_words)) for start in range(0, shard.num_words, words)]
        self._size = rows * words
        self._rooms: dict[tuple[str, int], torch.Tensor] = {}

    def logits(self, hidden_CH: torch.Tensor, shard: VocabShard, words: slice, *, model: int = 0) -> torch.Tensor:
        """fp32 [C, W], to be written over; gone with the next tile of the same model."""
        room = self._room("product", model, hidden_CH.dtype)
        return self.as_logits(multiply(hidden_CH, shard.weight_VH[words].T, room=room), shard, model=model)

    def product(self, hidden_NH: torch.Tensor, rows: slice, words: slice, kept: Kept) -> torch.Tensor:
        """[C, W] in the precision of the factors, into `kept` if there is room."""
        hidden_CH, weight_WH = hidden_NH[rows], self._shard.weight_VH[words]
        keep = kept.takes(len(hidden_CH) * len(weight_WH) * hidden_CH.itemsize)
        room = None if keep else self._room("product", 0, hidden_CH.dtype)
        product_CW = multiply(hidden_CH, weight_WH.T, room=room)
        if keep:
            kept.put(rows, words, product_CW)
        return product_CW

    def as_logits(self, product_CW: torch.Tensor, shard: VocabShard, *, model: int = 0) -> torch.Tensor:
        """In fp32, with the soft cap; the product itself where that changes nothing."""
        if product_CW.dtype == torch.float32 and shard.softcap is None:
            return product_CW
        logits_CW = self._view("logits", model, product_CW).copy_(product_CW)
        return logits_CW if shard.softcap is None else logits_CW.div_(shard.softcap).tanh_().mul_(shard.softcap)

    def scratch(self, logits_CW: torch.Tensor) -> torch.Tensor:
        """Room for as many numbers, which is that of the logits themselves where they are not the product, which may
        be kept."""
        copied = self._shard.weight_VH.dtype != torch.float32 or self._shard.softcap is not None
        return logits_CW if copied else self._view("scratch", 0, logits_CW)

    def _view(self, name: str, model: int, like: torch.Tensor) -> torch.Tensor:
        return self._room(name, model, torch.float32)[: like.numel()].view_as(like)

    def _room(self, name: str, model: int, dtype: torch.dtype) -> torch.Tensor:
        if (name, model) not in self._rooms:
            self._rooms[name, model] = torch.empty(self._size, dtype=dtype, device=self._shard.weight_VH.device)
        return self._rooms[name, model]


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
    kept: Kept | None = None,
) -> torch.Tensor:
    """Statistics of each row's logits over the whole vocabulary, fp32 [S, N], the same on every tensor rank.

    `statistics(logits_CW, rows, words)` gives the [S, C] of a tile and may write over the logits, unless they go into
    `kept`; `merge` joins those of all tiles and then of all tensor ranks. `nothing` is what a part without words says.
    """
    kept = kept or Kept(0)
    device = hidden_NH.device
    local_SN = torch.tensor(nothing, dtype=torch.float32, device=device)[:, None].repeat(1, hidden_NH.shape[0])
    for rows in tiles.rows if tiles.words else []:
        products = (tiles.product(hidden_NH, rows, words, kept) for words in tiles.words)
        parts = [
            statistics(tiles.as_logits(product_CW, shard), rows, words)
            for product_CW, words in zip(products, tiles.words, strict=True)
        ]
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
    *,
    kept: Kept | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the hidden states (this shard's part) and of the weight, summed in fp32.

    `gradient(logits_CW, rows, words)` gives the loss's gradient by a tile's logits and may write over them; in the
    precision of the weight it takes the place of the tile's product.
    """
    kept = kept or Kept(0)
    weight_VH, total = shard.weight_VH, WeightGradient(shard.weight_VH)
    grad_NH = torch.empty_like(hidden_NH)
    for rows in tiles.rows:
        hidden_CH = hidden_NH[rows]
        grad_CH = torch.zeros_like(hidden_CH, dtype=torch.float32)
        for words in tiles.words:
            product_CW = kept.pop(rows, words)
            if product_CW is None:
                product_CW = tiles.product(hidden_NH, rows, words, Kept(0))
            logits_CW = tiles.as_logits(product_CW, shard)
            slope_CW = shard.slope(logits_CW)
            grad_CW = gradient(logits_CW, rows, words)
            grad_CW = grad_CW if slope_CW is None else grad_CW.mul_(slope_CW)
            grad_CW = grad_CW if grad_CW.dtype == product_CW.dtype else product_CW.copy_(grad_CW)
            add_product(grad_CH, grad_CW, weight_VH[words])
            total.add(words, grad_CW, hidden_CH)
        grad_NH[rows] = grad_CH
    return grad_NH, total.for_autograd()


class WeightGradient:
    """Where the gradient of an output layer's or an embedding's weight is added up, in fp32: in megatron's own buffer
    where it keeps one (`main_grad`), as its fused linear layers do, else in a tensor of this backward."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        main: Any = getattr(weight_VH, "main_grad", None)
        self._weight: Any = weight_VH
        self._is_main = main is not None and main.dtype == torch.float32
        self.wanted = weight_VH.requires_grad
        """A frozen weight has none: neither the sum nor the multiplications for it."""
        if self.wanted:
            self.total_VH = main if self._is_main else torch.zeros_like(weight_VH, dtype=torch.float32)

    def add(self, words: slice, grad_CW: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        if self.wanted:
            add_product(self.total_VH[words], grad_CW.T, hidden_CH)

    def add_rows(self, word_N: torch.Tensor, grad_NH: torch.Tensor) -> None:
        """Add row i of `grad_NH` to that of word i. The same to the last bit every time: on a CPU index_add_ takes row
        after row, on a GPU it does not, but index_put_ sorts the rows by word first."""
        if self.total_VH.is_cuda:
            self.total_VH.index_put_((word_N,), grad_NH.float(), accumulate=True)
        else:
            self.total_VH.index_add_(0, word_N, grad_NH.float())

    def for_autograd(self) -> torch.Tensor | None:
        """What backward returns. With megatron's buffer, that is only what makes megatron's hook for this weight run: a
        sparse tensor without entries, which takes no memory however large the weight, and may be added to others."""
        if not self.wanted:
            return None
        if not self._is_main:
            return self.total_VH.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True
        return torch.zeros_like(self._weight, layout=torch.sparse_coo)
