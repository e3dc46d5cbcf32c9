"""Adam in plain torch with the state layout of apex's and Transformer Engine's FusedAdam.

`step` lives in the parameter group, `exp_avg` and `exp_avg_sq` (fp32) with each parameter: what megatron's distributed
optimizer saves and loads. With it a run without those libraries takes the path of a GPU run, and their checkpoints are
interchangeable.
"""

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch.optim.adam import adam
from torch.optim.adamw import adamw

Tensors: TypeAlias = list[torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")
LANES = 64
"""torch's fused update rounds differently where numbers do not fill a vector of the CPU. Filled up, an update does not
depend on how parameters are cut into shards and buckets."""


class FusedLayoutAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 1711.05101), or Adam with L2 if `adam_w_mode` is False."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **unsupported: Any,
    ) -> None:
        asked_for = sorted(name for name, value in unsupported.items() if value)  # megatron passes capturable=False
        if asked_for:
            raise ValueError(f"not available without Transformer Engine or apex: {', '.join(asked_for)}")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._update(group, [self._tensors(p) for p in group["params"] if p.grad is not None])

    def _update(self, group: dict[str, Any], parameters: list[Tensors]) -> None:
        ends = [tensors[0].numel() // LANES * LANES for tensors in parameters]
        cut = list(zip(parameters, ends, strict=True))
        self._run(group, [[t[:end] for t in tensors] for tensors, end in cut if end])
        rests = [[t[end:] for t in tensors] for tensors, end in cut if end < tensors[0].numel()]
        padded = [[F.pad(t, (0, LANES - t.numel())) for t in tensors] for tensors in rests]
        self._run(group, padded)
        for tensors, results in zip(rests, padded, strict=True):
            for tensor, result in zip(tensors, results, strict=True):
                tensor.copy_(result[: tensor.numel()])

    def _run(self, group: dict[str, Any], parameters: list[Tensors]) -> None:
        """torch's fused update: one pass over memory, and none of its own."""
        if not parameters:
            return
        params, grads, first, second = (list(kind) for kind in zip(*parameters, strict=True))
        before = group["step"] - 1.0 if group["bias_correction"] else math.inf
        beta1, beta2 = group["betas"]
        (adamw if self.adam_w_mode else adam)(
            params,
            grads,
            first,
            second,
            [],
            list(torch.full((len(params),), before, device=params[0].device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _tensors(self, parameter: torch.Tensor) -> Tensors:
        """Parameter, gradient, first and second moment, flat."""
        state = self.state[parameter]
        for name in MOMENTS:
            if name not in state:
                state[name] = self._new_moment(parameter)
        assert parameter.grad is not None
        return [t.view(-1) for t in (parameter, parameter.grad.float(), state["exp_avg"], state["exp_avg_sq"])]

    def _new_moment(self, parameter: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(parameter, dtype=torch.float32)
