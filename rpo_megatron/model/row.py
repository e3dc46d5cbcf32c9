"""Row: one packed micro-batch as the model reads it, on the rank's device."""

from copy import copy
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from rpo_megatron.model.borders import Borders, SharedBorders
from rpo_megatron.model.context import Part
from rpo_megatron.model.flex import FlexMask
from rpo_megatron.model.rotary import Turn
from rpo_megatron.model.scores import ReferenceTokens


@dataclass
class Segments(PackedSeqParams):
    """The borders inside a row, in the slot that megatron passes down to core attention.

    `qkv_format` is not "thd" on purpose: megatron then keeps the [T, 1, heads, dim] layout. Nor does it learn of rotary
    frequencies: it would count positions again per segment, and make cosines and sines again in every layer.
    """

    qkv_format: str = "sbhd"
    lengths: list[int] = field(default_factory=list)
    """Segment lengths on the host, so that attention never waits for the device."""
    prompts: list[int] = field(default_factory=list)
    """For each segment the index of the earlier one that all of it also attends to, -1 for none."""
    masks: dict[tuple[int, int, int | None, int], torch.Tensor] = field(default_factory=dict)
    """Made by `mask`, for all layers to use."""
    blocks: dict[int | None, FlexMask] = field(default_factory=dict)
    """The same for FlexAttention, by window."""
    made: dict[str, Borders | SharedBorders | None] = field(default_factory=dict)
    """The same for kernels that read borders; see `borders` and `shared_borders`."""

    turns: list[Turn] = field(default_factory=list)
    """By which queries and keys turn: what a model's Rotary made of the row's positions."""

    def turned(self, turns: list[Turn]) -> "Segments":
        """The same segments, for a model with these turns."""
        segments = copy(self)
        segments.turns = turns
        return segments

    @property
    def longest(self) -> int:
        """Tokens of the longest segment and its prompt."""
        return max(self._context(i) + length for i, length in enumerate(self.lengths))

    def mask(
        self, segment: int, *, window: int | None = None, sinks: int = 0, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """What to add to the scores of a segment with its prompt before it, [length, sinks + prompt + length]: 0 where
        a token may look (all of the prompt, and the segment up to itself; of these the last `window`; before them,
        always, so many keys for `sinks`), -inf elsewhere."""
        length, context = self.lengths[segment], self._context(segment)
        key = length, context, window, sinks
        if key not in self.masks:
            hidden = torch.full((length, context + length), float("-inf"), dtype=dtype, device=device)
            self.masks[key] = hidden.triu(context + 1)
            if window is not None:
                self.masks[key] += hidden.tril_(context - window)
            if sinks:
                self.masks[key] = F.pad(self.masks[key], (sinks, 0))
        return self.masks[key]

    def borders(self, device: torch.device) -> Borders:
        """Where the segments begin. `device` is that of the row."""
        if "own" not in self.made:
            self.made["own"] = Borders.of(self.lengths, device)
        return cast(Borders, self.made["own"])

    def shared_borders(self, device: torch.device) -> SharedBorders | None:
        """What attends to shared prompts; None where nothing does."""
        if "shared" not in self.made:
            self.made["shared"] = SharedBorders.of(self.lengths, self.prompts, device)
        return cast(SharedBorders | None, self.made["shared"])

    def _context(self, segment: int) -> int:
        prompt = self.prompts[segment]
        return self.lengths[prompt] if prompt >= 0 else 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Shapes: T tokens, N scored tokens, G groups, K responses. See data/microbatch.py for what the arrays mean."""

    tokens_1T: torch.Tensor
    positions_T: torch.Tensor
    segments: Segments
    scored_position_N: torch.Tensor
    scored_label_N: torch.Tensor
    last_position_GK: torch.Tensor
    before_last_position_GK: torch.Tensor
    part: Part | None = None
    """What of the row lies on this context rank; None without context parallelism. The arrays are the whole row's."""
    group_T: torch.Tensor | None = None
    """int64. The group that each token counts for, see data/microbatch.py; read by routers of experts, and None where
    they need not count."""
    reference: ReferenceTokens | None = None
    """Given to a model with an output layer, it also answers with the token KL. Read on the last stage only."""
