"""The marker of this folder, and double precision where TRL makes tensors from Python numbers."""

from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "parity: compares losses with TRL's own code")


@pytest.fixture(autouse=True)
def _fp64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
