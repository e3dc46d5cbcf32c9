"""Fixtures for all tests. The CPU stands in for the GPU before anything imports megatron.core."""

import os
from pathlib import Path

import pytest
import torch

from rpo_megatron import cpu

cpu.enable()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Optional real data and a real model (RPO_SHARED, or ../shared beside the checkout); skips where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("RPO_SHARED", beside))
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared/ folder with real data ({folder}); set RPO_SHARED to have this test run")
    return folder
