"""The output layer's log-probabilities on a GPU: cuBLAS multiplies, Triton reads every logit once.

The tiles of rows x words of vocab.py, with all that stands around the matrix multiplications in one kernel each way:

    forward    1. logits = hidden weight^T                                    cuBLAS, bf16 factors, fp32 result
               2. running maximum and sum of exponentials, label's logit      one kernel: reads fp32
    backward   1. the logits again
               2. gradient = g (onehot(label) - p) d(capped)/d(logit)         one kernel: reads fp32, writes bf16
               3. grad_hidden += gradient weight                              cuBLAS, added to fp32
                  grad_weight += gradient^T hidden

Cut-cross-entropy (arXiv 2411.09009) multiplies in its kernels too, and never writes a logit. With a hidden size of
4,096 that saves 8 bytes of traffic per 8,192 FLOP, a tenth of the time on H100, where a matrix multiplication in plain
Triton takes well more than a tenth longer than cuBLAS's. No logit is rounded to bf16 in either.

Shapes: N rows, H hidden size, V rows of this rank's weight, R rows and W words of a tile. A column counts the words of
this rank; one outside [0, num_words) is another rank's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # torch for the CPU comes without it
    HAS_TRITON = False

TILE_ROWS = 4096
"""Many, because the whole fp32 gradient of the weight is read and written once per tile of rows."""
FORWARD_BYTES = 32 * 2**20
"""fp32 logits of a tile in forward: few enough that the kernel finds them in the level-2 cache (50 MiB on H100)."""
BACKWARD_BYTES = 128 * 2**20
"""In backward more, because the rows' fp32 gradient is read and written once per tile of words. bf16 adds half."""
ALIGNMENT = 128
"""What the words of a tile are a multiple of, for whole vector loads and cuBLAS's fast paths."""
BLOCK = 4096
"""Logits that a program of 8 warps holds at a time."""
LOWEST = torch.finfo(torch.float32).min

jit: Callable[[Any], Any] = triton.jit if HAS_TRITON else lambda kernel: kernel


def available() -> bool:
    """Whether there is a triton, and a torch that adds products of bf16 matrices to an fp32 one."""
    return HAS_TRITON and torch.__version__ >= "2.10"


def forward_statistics(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, column_N: torch.Tensor, *, num_words: int, softcap: float | None
) -> torch.Tensor:
    """fp32 [3, N]: of each row's logits on this rank the largest, sum exp(logit - largest), and that of the label (0 if
    it is another rank's). Rows of the weight from `num_words` on are padding and take no part; logits z become
    softcap * tanh(z / softcap) first."""
    state_3N = torch.zeros(3, len(hidden_NH), device=hidden_NH.device)
    state_3N[0] = LOWEST
    for rows, words, logits_RW in _tiles(hidden_NH, weight_VH, num_words=num_words, num_bytes=FORWARD_BYTES):
        _statistics_kernel[(len(logits_RW),)](
            logits_RW,
            column_N[rows],
            state_3N[:, rows],
            words.start,
            words.stop - words.start,
            len(hidden_NH),
            softcap or 1.0,
            CAPPED=softcap is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return state_3N


def backward(
    grad_N: torch.Tensor,
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    column_N: torch.Tensor,
    max_N: torch.Tensor,
    sum_N: torch.Tensor,
    *,
    num_words: int,
    softcap: float | None,
    grad_weight_VH: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the hidden states through this rank's words, [N, H] in their dtype; the weight's is added to the fp32
    `grad_weight_VH`, if there is one. `grad_N` is the gradient by the log-probabilities; `max_N` and `sum_N` are the
    whole vocabulary's, merged over the ranks. Those three are fp32."""
    total_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
    grad_N = grad_N.contiguous()  # a sum's gradient is one number, expanded
    scale_N = -grad_N / sum_N
    for rows, words, logits_RW in _tiles(hidden_NH, weight_VH, num_words=num_words, num_bytes=BACKWARD_BYTES):
        width = words.stop - words.start
        grad_RW = torch.empty_like(logits_RW, dtype=weight_VH.dtype)
        _gradient_kernel[(len(logits_RW), math.ceil(width / BLOCK))](
            logits_RW,
            grad_RW,
            column_N[rows],
            max_N[rows],
            scale_N[rows],
            grad_N[rows],
            words.start,
            width,
            softcap or 1.0,
            CAPPED=softcap is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
        _add_product(total_NH[rows], grad_RW, weight_VH[words])
        if grad_weight_VH is not None:
            _add_product(grad_weight_VH[words], grad_RW.T, hidden_NH[rows])
    return total_NH.to(hidden_NH.dtype)


def _tiles(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *, num_words: int, num_bytes: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, words, their fp32 logits [R, W]), each tile's logits in the place of those before."""
    num_rows = len(hidden_NH)
    rows = max(1, math.ceil(num_rows / max(1, math.ceil(num_rows / TILE_ROWS))))  # tiles of one height
    words = max(1, num_bytes // (4 * rows * ALIGNMENT)) * ALIGNMENT
    room = torch.empty(rows * min(words, num_words), device=hidden_NH.device)
    for row in range(0, num_rows, rows):
        for word in range(0, num_words, words):
            at, of = slice(row, min(row + rows, num_rows)), slice(word, min(word + words, num_words))
            shape = at.stop - at.start, of.stop - of.start
            logits_RW = room[: shape[0] * shape[1]].view(shape)
            _multiply(logits_RW, hidden_NH[at], weight_VH[of].T)
            yield at, of, logits_RW


def _multiply(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total = a b in fp32, whatever the precision of the factors."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.mm(a.float(), b.float(), out=total)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b in fp32, whatever the precision of the factors."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


@jit
def _cap(z, softcap):
    return softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # tanh, which triton leaves to a library


@jit
def _statistics_kernel(
    logits, column, state, first, width, state_stride, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """A program per row. A block's maximum is taken off before its exponentials are formed."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    state += row
    largest = tl.load(state)
    total = tl.load(state + state_stride)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < width, other=0.0)
        if CAPPED:
            z = _cap(z, softcap)
        z = tl.where(at < width, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), 0)
        largest = larger
    tl.store(state, largest)
    tl.store(state + state_stride, total)
    here = tl.load(column + row) - first
    if (here >= 0) & (here < width):
        label = tl.load(logits + here)
        if CAPPED:
            label = _cap(label, softcap)
        tl.store(state + 2 * state_stride, label)


@jit
def _gradient_kernel(
    logits, out, column, largest, scale, grad, first, width, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """A program per row and block. `scale` is -grad / sum."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * width + at, mask=at < width, other=0.0)
    if CAPPED:
        z = _cap(z, softcap)
    by_logit = tl.exp(z - tl.load(largest + row)) * tl.load(scale + row)
    by_logit += tl.where(at == tl.load(column + row) - first, tl.load(grad + row), 0.0)
    if CAPPED:
        by_logit *= 1 - (z / softcap) * (z / softcap)
    tl.store(out + row * width + at, by_logit.to(out.dtype.element_ty), mask=at < width)
