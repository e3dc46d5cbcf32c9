"""Norms over the last dimension, in torch alone.

Under sequence parallelism each tensor rank sees its own rows, so megatron must sum the weights' gradients over the
tensor ranks; it does so for parameters marked `sequence_parallel`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from rpo_megatron.model.families import Norm


class RMSNorm(torch.nn.Module):
    """x / rms(x) * w"""

    start = 1.0

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, self.start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class RMSNorm1P(RMSNorm):
    """x / rms(x) * (1 + w), all of it in fp32 (1 + w has few digits in bf16), as Gemma has it."""

    start = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight.float(), self.eps).type_as(x)


class LayerNorm1P(torch.nn.Module):
    """(x - mean) / std * (1 + w) + b"""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = _parameter(config, hidden_size, 0.0), _parameter(config, hidden_size, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
