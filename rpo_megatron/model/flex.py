"""Attention over a packed row with shared prompts as one block-sparse kernel: torch's FlexAttention (arXiv 2412.05496).

1. What a token sees is two ranges of keys: its own segment up to itself, and its segment's prompt. Both are numbers per
   token; a sliding window only moves where they begin.
2. From the borders of segments and blocks follows, without looking at tokens, which blocks of 128 queries x 128 keys
   are empty, full or partial. The kernel skips the first and looks at single tokens in the last only.
3. The kernel is compiled for the first row's length and, at the second length, once more for all lengths; both again
   for passes without gradients. A row has at least two blocks, because the compiler takes a size of 1 for a constant.

Nothing quadratic in the row is built but the list of blocks. Shapes: T tokens of the row, padded to whole blocks; S
segments; P pieces of segments inside a block; B blocks; h query heads, g heads of keys and values, d numbers per head.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

BLOCK = 128
ASK_FOR_LSE: dict[str, Any] = (
    {"return_aux": torch_flex.AuxRequest(lse=True)} if hasattr(torch_flex, "AuxRequest") else {"return_lse": True}
)
"""The log-sum-exp besides the result: from torch 2.9 on, and before."""


@dataclass(frozen=True, kw_only=True)
class VisibleKeys:
    """The keys that each query sees: [own_T, query] and [prompt_T, prompt_stop_T)."""

    own_T: np.ndarray
    prompt_T: np.ndarray
    prompt_stop_T: np.ndarray


@dataclass(frozen=True, kw_only=True)
class FlexMask:
    """Which keys the queries of one row see, for all layers with the same window."""

    blocks: BlockMask
    num_tokens: int
    """Of the row as it is, before it is padded to whole blocks."""


def build_mask(lengths: list[int], prompts: list[int], *, device: torch.device, window: int | None = None) -> FlexMask:
    """The mask of a row of segments: their lengths, and for each the index of the earlier segment that all of it sees
    too, -1 for none. With a `window` a token sees only keys less than so many positions back, where a prompt ends right
    before each of its responses."""
    num_tokens = sum(lengths)
    padding = max(2 * BLOCK, math.ceil(num_tokens / BLOCK) * BLOCK) - num_tokens
    keys = visible_keys([*lengths, padding], [*prompts, -1], window=window)
    partial_BB, full_BB = classify_blocks(keys, starts=np.cumsum([0, *lengths]))
    blocks = BlockMask(
        (num_tokens + padding, num_tokens + padding),
        *_listed(partial_BB, device),
        *_listed(full_BB, device),
        *_listed(partial_BB.T, device),
        *_listed(full_BB.T, device),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_mask_mod(keys, device),
    )
    return FlexMask(blocks=blocks, num_tokens=num_tokens)


def flex_attention(
    query_T1hd: torch.Tensor,
    key_T1gd: torch.Tensor,
    value_T1gd: torch.Tensor,
    mask: FlexMask,
    *,
    scale: float,
    softcap: float | None = None,
    sink_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, 1, h, d] of T = mask.num_tokens. With `softcap` scores s become softcap * tanh(s / softcap) (Gemma 2); with
    `sink_h` each softmax has one more term (sinks.py).

    On a CPU, where FlexAttention has no backward, the whole score matrix is built: for tests.
    """
    assert query_T1hd.shape[0] == mask.num_tokens, (query_T1hd.shape, mask.num_tokens)
    padding = mask.blocks.seq_lengths[0] - mask.num_tokens
    query, key, value = (_heads_first(tensor, padding) for tensor in (query_T1hd, key_T1gd, value_T1gd))
    attend = _compiled() if query.is_cuda else _dense
    asked = {} if sink_h is None else ASK_FOR_LSE
    attended: Any = attend(
        query,
        key,
        value,
        block_mask=mask.blocks,
        score_mod=None if softcap is None else _softcap_mod(softcap),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **asked,
    )
    out: torch.Tensor = attended if sink_h is None else _take_sink(attended, sink_h)
    return out[:, :, : mask.num_tokens].permute(2, 0, 1, 3)


def _take_sink(attended: tuple[torch.Tensor, Any], sink_h: torch.Tensor) -> torch.Tensor:
    out, beside = attended
    lse: torch.Tensor = getattr(beside, "lse", beside)  # the former from torch 2.9 on
    return (out * (lse - sink_h[:, None]).sigmoid()[..., None]).to(out.dtype)


def _heads_first(tensor_T1hd: torch.Tensor, padding: int) -> torch.Tensor:
    """[1, h, T, d], a view where the row is whole blocks."""
    tensor = tensor_T1hd.permute(1, 2, 0, 3)
    return F.pad(tensor, (0, 0, 0, padding)) if padding else tensor


def visible_keys(lengths: list[int], prompts: list[int], *, window: int | None) -> VisibleKeys:
    length_S, prompt_S = np.array(lengths), np.array(prompts)
    stop_S = np.cumsum(length_S)
    start_S = stop_S - length_S
    segment_T = np.repeat(np.arange(len(length_S)), length_S)
    own_T, shared_T = start_S[segment_T], prompt_S[segment_T]
    prompt_T, prompt_stop_T = (np.where(shared_T >= 0, border_S[shared_T], 0) for border_S in (start_S, stop_S))
    if window is not None:
        query_T = np.arange(len(own_T))
        reach_T = query_T - own_T - window + 1  # the first key in reach, counted from the segment's start
        prompt_T = np.clip(prompt_stop_T + reach_T, prompt_T, prompt_stop_T)
        own_T = own_T + np.maximum(reach_T, 0)
    return VisibleKeys(own_T=own_T, prompt_T=prompt_T, prompt_stop_T=prompt_stop_T)


def classify_blocks(keys: VisibleKeys, *, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(partial, full) of blocks of queries x blocks of keys, bool [B, B]; `starts` are those of the segments.

    Inside a piece both ranges of keys only ever move forward, so its first and last query say what all of them see, and
    what any of them sees.
    """
    num_tokens = len(keys.own_T)
    block_B = np.arange(0, num_tokens, BLOCK)
    first_P = np.union1d(block_B, starts[starts < num_tokens])
    last_P = np.append(first_P[1:], num_tokens) - 1

    def covered(start_P: np.ndarray, stop_P: np.ndarray) -> np.ndarray:
        """How many keys of each block are in a range, [P, B]."""
        stop_PB = np.minimum(stop_P[:, None], block_B + BLOCK)
        return np.maximum(stop_PB - np.maximum(start_P[:, None], block_B), 0)

    prompt_stop_P = keys.prompt_stop_T[first_P]
    by_any_PB = covered(keys.own_T[first_P], last_P + 1) + covered(keys.prompt_T[first_P], prompt_stop_P)
    by_all_PB = covered(keys.own_T[last_P], first_P + 1) + covered(keys.prompt_T[last_P], prompt_stop_P)
    piece_B = np.searchsorted(first_P, block_B)
    full_BB = np.logical_and.reduceat(by_all_PB == BLOCK, piece_B)
    return np.logical_or.reduceat(by_any_PB > 0, piece_B) & ~full_BB, full_BB


def _listed(block_BB: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(number of blocks in each line, their indices first), as FlexAttention wants them: int32 [1, 1, B] and
    [1, 1, B, B]."""
    count_B, index_BB = block_BB.sum(-1), np.argsort(~block_BB, axis=-1, kind="stable")
    return _on(count_B[None, None], device), _on(index_BB[None, None], device)


def _on(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device, non_blocking=True)


def _mask_mod(keys: VisibleKeys, device: torch.device) -> Callable[..., torch.Tensor]:
    own_T, prompt_T, prompt_stop_T = (_on(array, device) for array in (keys.own_T, keys.prompt_T, keys.prompt_stop_T))

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (key >= own_T[query]) & (key <= query)
        return own | ((key >= prompt_T[query]) & (key < prompt_stop_T[query]))

    return sees


@functools.cache
def _softcap_mod(softcap: float) -> Callable[..., torch.Tensor]:
    def cap(score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(torch_flex_attention, fullgraph=True)


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_mask: BlockMask,
    score_mod: Callable[..., torch.Tensor] | None,
    scale: float,
    enable_gqa: bool,
    **asked: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What FlexAttention computes, from the mask of single tokens alone."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query.float() @ key.float().mT * scale
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    at = torch.arange(query.shape[2])
    visible = block_mask.mask_mod(None, None, at[:, None], at)
    scores = scores.masked_fill(~visible, float("-inf"))
    out: torch.Tensor = (scores.softmax(-1) @ value.float()).to(query.dtype)
    return (out, scores.logsumexp(-1)) if asked else out
