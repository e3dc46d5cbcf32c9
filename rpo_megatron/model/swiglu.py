"""The gate of feed-forward layers, silu(gate) * up, that keeps only its input for backward.

Autograd would keep gate, up, silu(gate) and, because megatron adds an offset of 0 to it, up once more: two of the five
tensors of the feed-forward's width that a layer keeps. silu(gate) is computed again instead, by the same kernels, so
that nothing changes by a bit.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import TEGroupedMLP

from rpo_megatron.model.families import Clamp
from rpo_megatron.model.forgetful import forgettable
from rpo_megatron.model.shape import ModelShape


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        return _gated(gate_and_up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_and_up,), (grad,) = ctx.saved_tensors, grads
        gate, up = gate_and_up.chunk(2, -1)
        by_both = torch.empty_like(gate_and_up)
        by_gate, by_up = by_both.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=by_up)
        torch.mul(grad, up, out=by_gate)
        torch.ops.aten.silu_backward.grad_input(by_gate, gate, grad_input=by_gate)
        return by_both


def _gated(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 f] (this rank's gate, then its up) -> [..., f]."""
    return forgettable(_SwiGLU.apply(gate_and_up), lambda: _gated(gate_and_up.detach()))


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor, clamp: Clamp) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.clamp = clamp
        gate, up = _clamped(gate_and_up, clamp)
        return gate * (clamp.alpha * gate).sigmoid() * (up + 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_and_up,), (grad,), clamp = ctx.saved_tensors, grads, ctx.clamp
        gate, up = _clamped(gate_and_up, clamp)
        share = (clamp.alpha * gate).sigmoid()
        by_gate = grad * (up + 1) * share * (1 + clamp.alpha * gate * (1 - share))
        by_both = torch.cat((by_gate, grad * gate * share), -1)
        # A number beyond its limit has no gradient.
        return by_both.masked_fill_(torch.cat((gate, up), -1) != gate_and_up, 0.0), None


def _clamped(gate_and_up: torch.Tensor, clamp: Clamp) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_and_up.chunk(2, -1)
    return gate.clamp(max=clamp.limit), up.clamp(min=-clamp.limit, max=clamp.limit)


def clamped_swiglu(gate_and_up: torch.Tensor, clamp: Clamp) -> torch.Tensor:
    """The same of GPT-OSS."""
    result: torch.Tensor = _ClampedSwiGLU.apply(gate_and_up, clamp)
    return result


def fuse_swiglu(model: torch.nn.Module, shape: ModelShape) -> None:
    """Make the feed-forward layers and experts of a model use it, if silu is what gates them: in the place that
    megatron has for Transformer Engine's activations, which get both halves at once."""
    if not (shape.gated and shape.activation == "silu"):
        return
    for module in model.modules():
        if isinstance(module, MLP | TEGroupedMLP):
            module.activation_func = swiglu if shape.clamp is None else partial(clamped_swiglu, clamp=shape.clamp)
            module.config.use_te_activation_func = True
