"""Results that are cheap to make again are not kept for backward.

What norms and gates compute are inputs of linear layers, more than a third of what a layer would keep. Their storage
is given back when the module that reads it is done, and filled again, by the same kernels from what backward needs
anyway, when the gradient of that module's result arrives.

    norm        read by attention or by a feed-forward layer     made again from the norm's input
    gate        read by the feed-forward layer's last matrix     made again from what is gated

A result that anything else reads would be lost to it: hence neither latent attention, nor a router and its experts,
nor modules of Transformer Engine, which keep inputs in ways of their own.
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

AGAIN = "make_again"
"""The attribute of a result under which `forgettable` puts the function that makes it."""


def forgettable(result: torch.Tensor, make_again: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result, marked. `make_again` is called without gradients and must give the same numbers."""
    setattr(result, AGAIN, make_again)
    return result


def forget_results(model: torch.nn.Module) -> None:
    """Make the layers of a model forget what is marked, once it has been read."""
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        attention, mlp = layer.self_attention, layer.mlp
        if isinstance(attention, SelfAttention) and isinstance(attention.linear_qkv, ColumnParallelLinear):
            attention.register_forward_hook(lambda _, given, result: _forget(given[0], by=result[0]))
        if isinstance(mlp, MLP) and isinstance(mlp.linear_fc2, RowParallelLinear):
            _forget_in(mlp)


def _forget_in(mlp: MLP) -> None:
    gated: list[torch.Tensor] = []  # what the last matrix reads, until the whole has run
    mlp.linear_fc2.register_forward_pre_hook(lambda _, given: gated.append(given[0]))
    mlp.register_forward_hook(lambda _, given, result: _forget(given[0], gated.pop(), by=result[0]))


def _forget(*results: torch.Tensor, by: torch.Tensor) -> None:
    """Free the storage of those that are marked until the gradient of `by` arrives."""
    marked = [result for result in results if hasattr(result, AGAIN)]
    if not (by.requires_grad and marked):
        return  # no backward, or one that computes the whole layer again
    emptied = [(result, result.untyped_storage().nbytes()) for result in marked]
    for result in marked:
        result.untyped_storage().resize_(0)

    def fill(_: torch.Tensor) -> None:
        while emptied:  # emptied, because the hook lives as long as the graph
            _fill(*emptied.pop())

    by.register_hook(fill)


def _fill(result: torch.Tensor, size: int) -> None:
    storage, make_again = result.untyped_storage(), getattr(result, AGAIN)
    delattr(result, AGAIN)
    storage.resize_(size)
    with torch.no_grad():
        storage.copy_(make_again().untyped_storage())  # not result.copy_(), which autograd takes for a change
