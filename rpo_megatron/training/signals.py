"""Being asked to stop: SIGTERM and SIGUSR1 end a training run with a checkpoint, so that it can go on elsewhere.

Schedulers send one of them some time before they take the machines away (Slurm's --signal and preemption, Kubernetes'
termination). They may reach one process only, and each at another moment; but all ranks must stop after the same step:

1. the handler only notes the signal,
2. at the end of every step each rank hands in whether it has a note: one number, summed over all ranks,
3. the sum is read a step later. It has arrived by then, so that neither host nor device ever waits for it.

A run that was asked to stop during step n therefore stops after step n + 1 and exits with STOPPED. Outside the loop
(while it loads weights, say) the signals do what they always do: end the process, with nothing lost.
"""

import signal
from types import FrameType
from typing import Any, Self

import torch

from rpo_megatron.distributed import sum_over_world

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75
"""Exit code of a run that stopped with a checkpoint because it was asked to: sysexits' EX_TEMPFAIL, try again."""


class StopSignals:
    """Inside a `with`, SIGNALS are noted instead of ending the process. For the main thread."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class Vote:
    """Whether any rank said yes, one call late."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._sum = torch.zeros(1, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None

    def __call__(self, yes: bool) -> bool:
        """Hand in this rank's answer; the verdict, the same on all ranks, is on the answers of the call before.

        Every rank must call this.
        """
        if self._arrived is not None:
            self._arrived.synchronize()  # with the end of the step before; returns at once if there was none
        verdict = bool(self._sum > 0)
        answers = sum_over_world(torch.full((1,), float(yes), device=self._device))
        self._sum.copy_(answers, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        return verdict
