"""What all ranks of a layout hold together, by the names that it has in files, and how far two such are apart."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

Tensors = dict[str, torch.Tensor]
Gathered = Iterable[tuple[str, torch.Tensor]]


def whole(gathered: Gathered) -> Tensors:
    """Empty on all ranks but the first."""
    return {name: tensor.clone() for name, tensor in gathered if tensor.numel()}


def reduce_whole_gradients(model: Any) -> None:
    """Have every rank hold whole gradients (all-reduce), where a run keeps only its shard (reduce-scatter)."""
    model.config.finalize_model_grads_func = lambda chunks, count, **options: finalize_model_grads(
        chunks, count, **{**options, "force_all_reduce": True}
    )


def whole_gradients(parameters: Iterable[Any], gather: Callable[[], Gathered]) -> Tensors:
    """Put each gradient in its weight's place and gather them as if they were weights, then put the weights back."""
    parameters = list(parameters)
    weights = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(gradient(parameter) if parameter.requires_grad else torch.zeros_like(parameter))
    gathered = whole(gather())
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return gathered


def gradient(parameter: Any) -> torch.Tensor:
    """Megatron's fp32 one where the parameter is in its data parallelism."""
    found: torch.Tensor = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
    return found


def relative_errors(found: Tensors, expected: Tensors) -> dict[str, float]:
    """Of each tensor, by norms; 0 where the two are equal, also where both are 0."""
    return {
        name: 0.0 if torch.equal(found[name], tensor) else float((found[name] - tensor).norm() / tensor.norm())
        for name, tensor in expected.items()
    }
