"""Adam in plain torch with the state layout of apex's and Transformer Engine's FusedAdam.

`step` lives in the parameter group, `exp_avg` and `exp_avg_sq` (fp32) with each parameter: what megatron's distributed
optimizer saves and loads. With it a run without those libraries takes the path of a GPU run, and their checkpoints are
interchangeable.
"""

import math
from typing import Any

import torch


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
                self._update(group, [p for p in group["params"] if p.grad is not None])

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        if not params:
            return
        (beta1, beta2), step, lr, decay = group["betas"], group["step"], group["lr"], group["weight_decay"]
        first, second = self._moments(params, "exp_avg"), self._moments(params, "exp_avg_sq")
        grads: Any = [p.grad.float() for p in params if p.grad is not None]
        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = torch._foreach_add(grads, params, alpha=decay)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        scale: Any = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, math.sqrt(correction2))
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_addcdiv_(params, first, scale, -lr / correction1)

    def _moments(self, params: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, dtype=torch.float32)
        return [self.state[p][name] for p in params]
