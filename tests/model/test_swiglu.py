"""The gate that keeps only its input, against autograd's own."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model.build import build
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.swiglu import swiglu
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_last_bit(dtype: torch.dtype) -> None:
    """Catches halves that are exchanged, and a derivative that rounds differently."""
    torch.manual_seed(0)
    x, grad = torch.randn(7, 1, 24).to(dtype).requires_grad_(), torch.randn(7, 1, 12).to(dtype)
    gate, up = x.chunk(2, -1)
    expected = F.silu(gate) * (up + 0.0)
    assert swiglu(x).equal(expected)
    assert torch.autograd.grad(swiglu(x), x, grad)[0].equal(torch.autograd.grad(expected, x, grad)[0])


def test_gradcheck() -> None:
    """Catches a wrong derivative, by finite differences in fp64."""
    torch.manual_seed(0)
    torch.autograd.gradcheck(swiglu, (torch.randn(3, 8, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize(
    ("family", "uses_it"), [("llama", True), ("mixtral", True), ("gemma2", False), ("nemotron", False)]
)
def test_only_where_silu_gates(tmp_path: Path, family: str, uses_it: bool) -> None:
    """Catches an expert that is left out, and silu in a model that has another activation."""
    tiny.write_model(tmp_path, **tiny.FAMILIES[family])
    model = build(read_shape(tmp_path), precision="fp32", sequence_parallel=False, groups=start(ParallelConfig()))
    stop()
    found = {module.activation_func is swiglu for module in model.modules() if hasattr(module, "activation_func")}
    assert found == {uses_it}
