"""The linear layers' product on a CPU against megatron's, and what backward keeps and gives."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model import products
from rpo_megatron.model.linear import linear

PLAIN: dict[str, Any] = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": None}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    start(ParallelConfig())
    yield
    stop()


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_plain_autograd(monkeypatch: pytest.MonkeyPatch, onednn: bool, tokens: int, bias: bool) -> None:
    """Catches transposed factors, a lost bias, an expert without tokens, and gradients that come in as a view of one
    number."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    torch.manual_seed(0)
    given = [torch.randn(tokens, 1, 6), torch.randn(4, 6), torch.randn(4)]
    mine, theirs = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
    result = linear(input=mine[0], weight=mine[1], bias=mine[2] if bias else None, **PLAIN)
    expected = torch.nn.functional.linear(theirs[0], theirs[1], theirs[2] if bias else None)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    result.sum().backward()
    expected.sum().backward()
    for a, b in zip(mine[: 2 + bias], theirs, strict=False):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


def test_frozen_weight_keeps_no_input() -> None:
    """Catches inputs kept, and multiplications made, for a gradient that nobody wants: a frozen layer under an
    adapter."""
    weight = torch.randn(4, 6)
    input = torch.randn(3, 1, 6, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = linear(input=input, weight=weight, bias=None, **PLAIN)
    assert [tensor.shape for tensor in kept] == [weight.shape]
    result.sum().backward()
    assert input.grad is not None
    torch.testing.assert_close(input.grad, weight.sum(0).expand(3, 1, 6))
    assert weight.grad is None
