"""Megatron's linear layers by the fastest product that the CPU has (products.py)."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)

from rpo_megatron.model import products


def use_fast_products(model: torch.nn.Module) -> None:
    """Make the linear layers of a model on a CPU use `linear`, where that gains anything: in the place where megatron
    chooses between its own two functions."""
    if not products.onednn_is_faster():
        return
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module._forward_impl = linear


def linear(
    *,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **options: Any,
) -> torch.Tensor:
    """[..., in] to [..., out], with the communication that belongs to it. Under sequence parallelism megatron's own,
    which gathers the input once more for backward in place of keeping it."""
    if sequence_parallel:
        function = (
            linear_with_grad_accumulation_and_async_allreduce if weight.requires_grad else linear_with_frozen_weight
        )
        options |= {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": True, "tp_group": tp_group}
        result: torch.Tensor = function(input=input, weight=weight, bias=bias, **options)
        return result
    if allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    product: torch.Tensor = _Linear.apply(input.flatten(0, -2), weight).unflatten(0, input.shape[:-1])
    return product if bias is None else product + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input if weight.requires_grad else None, weight)
        return products.multiply(input, weight.T)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        input, weight = ctx.saved_tensors
        by_input = products.multiply(grads[0], weight) if ctx.needs_input_grad[0] else None
        by_weight = products.multiply(grads[0].T, input) if ctx.needs_input_grad[1] else None
        return by_input, by_weight
