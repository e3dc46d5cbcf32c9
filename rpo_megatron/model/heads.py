"""The value head of a reward model: one number per response, from the hidden state of its last token.

    value = hidden(last token, after the final norm) . score.weight        (no bias)

as transformers' ...ForSequenceClassification with one label computes it. The weight is held whole by every tensor rank.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from rpo_megatron.distributed import Axis
from rpo_megatron.model.row import Row


class ValueHead(torch.nn.Module):
    """(hidden [T(/tp under SP), 1, H], position_GK) -> values, fp32 [G, K].

    Every tensor rank computes the same values and, in backward, the whole gradient; nothing is to be summed over TP.
    """

    def __init__(self, config: TransformerConfig, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = config.sequence_parallel
        self.weight = torch.nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, hidden_T1H: torch.Tensor, position_GK: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            # all-gather forward; backward each rank keeps its own rows of a gradient that all ranks have whole
            hidden_T1H = gather_from_sequence_parallel_region(
                hidden_T1H, tensor_parallel_output_grad=False, group=self.tp.group
            )
        # In fp32: bf16 would round the values to three digits, and only their differences count.
        return F.linear(hidden_T1H[position_GK, 0].float(), self.weight.float())[..., 0]


def pooled_position(row: Row, pad_token: int | None) -> torch.Tensor:
    """Row position at which each response is judged, [G, K].

    transformers takes the rightmost token that is not `pad_token`. That is the response's last token, except in models
    that pad with their end-of-turn token: there it is the token before.
    """
    if pad_token is None:
        return row.last_position_GK
    ends_in_pad_GK = row.tokens_1T[0, row.last_position_GK] == pad_token
    return torch.where(ends_in_pad_GK, row.before_last_position_GK, row.last_position_GK)
