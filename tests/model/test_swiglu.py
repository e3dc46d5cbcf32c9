"""The gate that keeps only its input, against autograd's own."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model.build import build
from rpo_megatron.model.families import Clamp
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.swiglu import clamped_swiglu, swiglu
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


def test_clamped_gradcheck() -> None:
    """The same of GPT-OSS's, whose value is written out; its limits and 1.702 moved to where they matter."""
    torch.manual_seed(0)
    x, clamp = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), Clamp(limit=0.7, alpha=1.5)
    gate, up = x[:, :4].clamp(max=0.7), x[:, 4:].clamp(-0.7, 0.7)
    torch.testing.assert_close(clamped_swiglu(x, clamp), gate * torch.sigmoid(1.5 * gate) * (up + 1))
    torch.autograd.gradcheck(partial(clamped_swiglu, clamp=clamp), (x,))


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
