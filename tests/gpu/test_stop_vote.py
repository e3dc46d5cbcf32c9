"""The vote on stopping (training/signals.py), whose sum the host reads from pinned memory a step later."""

import pytest
import torch

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.training.signals import Vote


@pytest.mark.gpu
def test_votes_on_a_gpu() -> None:
    """Catches a sum that is read before it has arrived, and one that never does."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = start(ParallelConfig()).device
    vote = Vote(device)
    busy = torch.randn(4096, 4096, device=device)
    found = []
    for turn in range(6):
        for _ in range(20):
            busy = busy @ busy / 64  # the host is ahead of the device, as in training
        found.append(vote(turn == 2))
    stop()
    assert found == [False, False, False, True, False, False]
