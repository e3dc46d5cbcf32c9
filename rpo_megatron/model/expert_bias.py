"""Biases of experts in any layout.

Megatron's expert adds the bias of its last matrix, times its share of the token, to its own part of the result. Where
an expert is split over tensor ranks these parts are summed: each rank must add its part of the bias. And megatron takes
the bias, which each of those ranks has, for one of a layer that all tensor ranks have: under sequence parallelism it
would sum their gradients, of the same expert once too often, of whole experts those of different ones.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import SequentialMLP

from rpo_megatron.distributed import Axis


def own_expert_biases(model: torch.nn.Module, etp: Axis) -> None:
    """`etp`: the ranks over which each expert is split."""
    for experts in model.modules():
        if isinstance(experts, SequentialMLP):
            for expert in experts.local_experts:
                _own(expert.linear_fc2, etp)


def _own(layer: Any, etp: Axis) -> None:
    # Megatron adds the bias in place, which autograd refuses for the view that a reduction over one rank gives.
    layer.register_forward_hook(lambda _, __, results: (results[0].clone(), _part(results[1], etp.size)))
    layer.bias.sequence_parallel = False  # each rank that has it sees all of its expert's tokens
    if etp.size == 1:
        # No other tensor rank has it: its gradient counts on all of them.
        set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)


def _part(bias: torch.Tensor, ranks: int) -> torch.Tensor:
    """bias / ranks, with the gradient of all of it: that of the whole bias, on every rank."""
    return bias if ranks == 1 else bias - bias.detach() * (1 - 1 / ranks)
