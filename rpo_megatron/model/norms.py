"""Norms over the last dimension, in torch alone.

Under sequence parallelism each tensor rank sees its own rows, so megatron must sum the weights' gradients over the
tensor ranks; it does so for parameters marked `sequence_parallel`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from rpo_megatron.model.families import Norm
from rpo_megatron.model.forgetful import forgettable


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in fp32 inside, in the precision of x."""
    if x.is_cuda and x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    result: torch.Tensor = _RMSNorm.apply(x, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    """Of the tensors of x's size, backward keeps x alone, as with the kernel that torch has for GPUs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).type_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, normed = grads[0].float(), x.float() * scale
        by_normed = grad * weight
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (grad * normed).flatten(0, -2).sum(0).type_as(weight)
        by_x = by_normed.addcmul_(normed, (by_normed * normed).mean(-1, keepdim=True), value=-1).mul_(scale)
        return by_x.type_as(x), by_weight, None


class RMSNorm(torch.nn.Module):
    """x / rms(x) * w"""

    start = 1.0

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, self.start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return forgettable(self._norm(x), lambda: self._norm(x.detach()))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMSNorm1P(RMSNorm):
    """x / rms(x) * (1 + w), all of it in fp32 (1 + w has few digits in bf16), as Gemma has it."""

    start = 0.0

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


class LayerNorm1P(torch.nn.Module):
    """(x - mean) / std * (1 + w) + b"""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = _parameter(config, hidden_size, 0.0), _parameter(config, hidden_size, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return forgettable(self._norm(x), lambda: self._norm(x.detach()))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), 1.0 + self.weight, self.bias, self.eps)


NORMS: Mapping[Norm, Callable[..., torch.nn.Module]] = {"rms": RMSNorm, "rms1p": RMSNorm1P, "layer1p": LayerNorm1P}


class NormAndAdd(torch.nn.Module):
    """residual + norm(a sublayer's result): what megatron puts in the slot of its bias-dropout-add."""

    def __init__(self, *, config: Any, norm: Callable[..., torch.nn.Module]) -> None:
        super().__init__()
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        return self._add

    def _add(
        self, result_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        result, bias = result_with_bias
        assert bias is None
        assert dropout == 0.0
        return residual + self.norm(result)


def _parameter(config: Any, size: int, value: float) -> torch.nn.Parameter:
    parameter: Any = torch.nn.Parameter(
        torch.full((size,), value, dtype=config.params_dtype, device=torch.cuda.current_device())
    )
    parameter.sequence_parallel = config.sequence_parallel
    return parameter
