"""Adam whose moments live in host memory: two thirds of what an optimizer adds to a bf16 model's memory.

Between steps the device holds the weights, their fp32 gradients and their fp32 masters. In a step the moments stream
through it, a piece at a time: copied in, updated by the same kernel as any others, copied out. The numbers are those of
an update on the device, and checkpoints are the same. Megatron's own HybridDeviceOptimizer also computes on the host;
its checkpoints hold other tensors, which no other optimizer reads.
"""

from typing import Any

import torch

from rpo_megatron.training.adam import MOMENTS, FusedLayoutAdam, Tensors

PIECE = 32 * 2**20
"""Numbers that are on the device at a time; of two moments in fp32, 256 MiB."""


class OffloadedAdam(FusedLayoutAdam):
    """FusedLayoutAdam with its moments in host memory, pinned where the parameters are on a GPU."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step(closure)
        devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        for device in devices:  # who reads the moments on the host, to save them, must find them there
            torch.cuda.synchronize(device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's takes every moment to its parameter's device; all at once need not fit there."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number]
                self.state[parameter] = {name: self._on_host(parameter, saved[name]) for name in MOMENTS}

    def _on_host(self, parameter: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        """A moment that is there already as it is, one from a device or a file as a copy."""
        there = moment.device.type == "cpu" and (moment.is_pinned() or not parameter.is_cuda)
        return moment if there else self._new_moment(parameter).copy_(moment)

    def _new_moment(self, parameter: torch.Tensor) -> torch.Tensor:
        return torch.zeros(parameter.shape, dtype=torch.float32, device="cpu", pin_memory=parameter.is_cuda)

    def _update(self, group: dict[str, Any], parameters: list[Tensors]) -> None:
        for param, grad, *moments in parameters:
            for start in range(0, param.numel(), PIECE):
                piece = slice(start, start + PIECE)
                on_host = [moment[piece] for moment in moments]
                on_device = [host.to(param.device, non_blocking=True, copy=True) for host in on_host]
                super()._update(group, [[param[piece], grad[piece], *on_device]])
                for host, device in zip(on_host, on_device, strict=True):
                    host.copy_(device, non_blocking=True)
