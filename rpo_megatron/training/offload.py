"""Adam whose moments live in host memory: two thirds of what an optimizer adds to a bf16 model's memory.

Between steps the device holds the weights, their fp32 gradients and their fp32 masters. In a step the moments stream
through it, a piece at a time: copied in, updated by the same kernel as any others, copied out. The numbers are those of
an update on the device, and checkpoints are the same. Megatron's own HybridDeviceOptimizer also computes on the host;
its checkpoints hold other tensors, which no other optimizer reads.
"""

from typing import Any

import torch

from rpo_megatron.training.adam import FusedLayoutAdam, Tensors

PIECE = 32 * 2**20
"""Numbers that are on the device at a time; of two moments in fp32, 256 MiB."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdam(FusedLayoutAdam):
    """FusedLayoutAdam with its moments in host memory, pinned where the parameters are on a GPU."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step(closure)
        devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        for device in devices:  # who reads the moments on the host, to save them, must find them there
            torch.cuda.synchronize(device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which puts moments where their parameters are
        for parameter in self.state:
            self._to_host(parameter)

    def _tensors(self, parameter: torch.Tensor) -> Tensors:
        if MOMENTS[0] not in self.state[parameter]:
            for name in MOMENTS:
                self.state[parameter][name] = _host_zeros(parameter)
        self._to_host(parameter)
        return super()._tensors(parameter)

    def _to_host(self, parameter: torch.Tensor) -> None:
        """Megatron makes moments of its own before it loads a checkpoint."""
        for name in MOMENTS:
            tensor = self.state[parameter].get(name)
            if tensor is not None and tensor.is_cuda:
                self.state[parameter][name] = _host_zeros(parameter).copy_(tensor)

    def _update(self, group: dict[str, Any], parameters: list[Tensors]) -> None:
        for param, grad, *moments in parameters:
            for start in range(0, param.numel(), PIECE):
                piece = slice(start, start + PIECE)
                on_host = [moment[piece] for moment in moments]
                on_device = [host.to(param.device, non_blocking=True, copy=True) for host in on_host]
                super()._update(group, [[param[piece], grad[piece], *on_device]])
                for host, device in zip(on_host, on_device, strict=True):
                    host.copy_(device, non_blocking=True)


def _host_zeros(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros(parameter.shape, dtype=torch.float32, device="cpu", pin_memory=parameter.is_cuda)
