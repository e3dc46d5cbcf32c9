"""The norm that keeps its input alone, against torch's."""

import pytest
import torch
import torch.nn.functional as F

from rpo_megatron.model.norms import rms_norm

EPS = 1e-5


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_torch_has_it(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Catches another epsilon, a sum in few digits, and results in another precision than the input's."""
    torch.manual_seed(0)
    x, weight = (
        torch.randn(5, 3, 48).to(dtype).requires_grad_(),
        (1 + torch.randn(48)).to(weight_dtype).requires_grad_(),
    )
    grad = torch.randn(5, 3, 48).to(dtype)
    found, expected = rms_norm(x, weight, EPS), F.rms_norm(x.float(), (48,), weight.float(), EPS).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    ):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs)


def test_frozen_weight() -> None:
    """Catches a gradient that is not there, or is asked of a frozen weight."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
