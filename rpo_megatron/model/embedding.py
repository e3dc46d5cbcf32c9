"""The word embedding, whose gradient is added to megatron's fp32 buffer row by row.

Megatron's own makes, for every micro-batch, a dense gradient of the whole vocabulary (250 MiB at 128k words and hidden
size 512, of which the words of a row touch a few thousandths) and adds all of it to the buffer.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from rpo_megatron.model.vocab import WeightGradient


class Embedding(VocabParallelEmbedding):
    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """[1, T] words to [1, T, H]; under sequence parallelism to this rank's [T / tp, 1, H]."""
        partial: torch.Tensor = _LookUp.apply(input_ - self.vocab_start_index, self.weight)
        if self.reduce_scatter_embeddings:
            partial = partial.transpose(0, 1).contiguous()
            scattered: torch.Tensor = reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
            return scattered
        whole: torch.Tensor = reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return whole


def use_row_gradients(model: torch.nn.Module) -> None:
    """Make a model's embedding one of the above, in place: megatron has no other way to choose its class."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.__class__ = Embedding


class _LookUp(torch.autograd.Function):
    """Rows of a vocabulary shard; zeros for words of other shards, whose index is not one of its rows."""

    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        elsewhere = (index < 0) | (index >= weight_VH.shape[0])
        index = index.masked_fill(elsewhere, 0)
        ctx.save_for_backward(index, elsewhere)
        ctx.weight_VH = weight_VH
        rows: torch.Tensor = weight_VH[index].masked_fill_(elsewhere[..., None], 0.0)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        index, elsewhere = ctx.saved_tensors
        total = WeightGradient(ctx.weight_VH)
        total.add_rows(index.flatten(), grads[0].masked_fill(elsewhere[..., None], 0.0).flatten(0, -2))
        return None, total.for_autograd()
