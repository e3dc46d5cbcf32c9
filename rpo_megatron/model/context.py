"""Context parallelism: a row's tokens split over ranks everywhere but in core attention, which is split over heads.

1. Every context rank embeds an even, contiguous part of the row and runs the layers on it.
2. Before core attention an all-to-all turns [part of the tokens, all heads] into [all tokens, part of the heads], after
   it another turns back (DeepSpeed-Ulysses, arXiv 2309.14509). Attention sees whole rows: packing and shared prompts
   work as they are, and the work is even whatever the segments are.
3. The numbers of scored tokens and responses come from the rank where they lie, and are put together by a sum: each
   rank's gradient is that of its own tokens, and megatron's reduction over replicas, of which context ranks are part,
   adds them up.

Shapes: T tokens of the row, t = T / c of them on each of c context ranks; h query heads and g heads of keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all

from rpo_megatron.distributed import Axis


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of a row lies on this context rank."""

    tokens: slice
    scored_M: torch.Tensor
    """Which of the N scored tokens are predicted here; indices into them."""
    num_scored: int
    """N."""

    def local(self, position: torch.Tensor) -> torch.Tensor:
        """Row positions as positions in the part; meaningless for those that are not in it."""
        return position - self.tokens.start

    def contains(self, position: torch.Tensor) -> torch.Tensor:
        return (position >= self.tokens.start) & (position < self.tokens.stop)


def part_of(scored_position_N: np.ndarray, *, num_tokens: int, cp: Axis, device: torch.device) -> Part:
    assert num_tokens % cp.size == 0, "rows are padded to a multiple of the context ranks"
    length = num_tokens // cp.size
    tokens = slice(cp.rank * length, (cp.rank + 1) * length)
    here_N = (scored_position_N >= tokens.start) & (scored_position_N < tokens.stop)
    return Part(
        tokens=tokens,
        scored_M=torch.from_numpy(np.flatnonzero(here_N)).to(device, non_blocking=True),
        num_scored=len(scored_position_N),
    )


def whole_tokens(number_M: torch.Tensor, part: Part, cp: Axis) -> torch.Tensor:
    """Numbers of the scored tokens of all parts, [N], from those of each. All-reduce forward, identity backward."""
    number_N = number_M.new_zeros(part.num_scored).index_copy(0, part.scored_M, number_M)
    return sum_over_parts(number_N, cp)


def sum_over_parts(tensor: torch.Tensor, cp: Axis) -> torch.Tensor:
    """All-reduce forward, identity backward."""
    total: torch.Tensor = reduce_from_tensor_model_parallel_region(tensor, group=cp.group)
    return total


def attend_over_heads(
    attend: Callable[..., torch.Tensor],
    query_t1hd: torch.Tensor,
    key_t1gd: torch.Tensor,
    value_t1gd: torch.Tensor,
    *others: object,
    cp: Axis,
    sink_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend` on all of the row's tokens and this rank's share of the heads, [t, 1, h, d].

    h must be a multiple of the context ranks; where there are fewer heads of keys and values than ranks, several ranks
    get the same one.
    """
    copies = max(1, cp.size // key_t1gd.shape[2])
    key_t1gd, value_t1gd = (tensor.repeat_interleave(copies, dim=2) for tensor in (key_t1gd, value_t1gd))
    whole = [_to_heads(tensor, cp) for tensor in (query_t1hd, key_t1gd, value_t1gd)]
    sinks = {} if sink_h is None else {"sink_h": sink_h.chunk(cp.size)[cp.rank]}
    return _to_tokens(attend(*whole, *others, **sinks), cp)


def _to_heads(tensor_t1hd: torch.Tensor, cp: Axis) -> torch.Tensor:
    """[t, 1, h, d] -> [T, 1, h / c, d]: the c-th share of the heads goes to rank c."""
    shares_ct1hd = torch.stack(tensor_t1hd.chunk(cp.size, dim=2))
    received: torch.Tensor = all_to_all(cp.group, shares_ct1hd)
    return received.flatten(0, 1)


def _to_tokens(tensor_T1hd: torch.Tensor, cp: Axis) -> torch.Tensor:
    """[T, 1, h / c, d] -> [t, 1, h, d]: the reverse."""
    received: torch.Tensor = all_to_all(cp.group, torch.stack(tensor_T1hd.chunk(cp.size)))
    return torch.cat(received.unbind(), dim=2)
