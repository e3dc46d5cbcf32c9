"""Products of matrices by either library."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rpo_megatron.model import products
from rpo_megatron.model.products import add_product, multiply, onednn_is_faster


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    onednn_is_faster.cache_clear()
    yield
    onednn_is_faster.cache_clear()


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (130, 64, 97)])
def test_products(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype, onednn: bool
) -> None:
    """Catches a matrix that a library reads transposed or from the wrong place, a total that is overwritten instead of
    added to, a piece of one that is left out, and a library that rounds more than the other: transposed factors and
    slices, as the output layer has."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(products, "PIECE_BYTES", {"cpu": 50 * 4 * 97})
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = shape
    a = torch.randn(inner, rows + 2, generator=generator).to(dtype)[:, 2:].T
    b = torch.randn(columns + 1, inner, generator=generator).to(dtype)[1:].T
    exact = a.double() @ b.double()
    bound = 4 * torch.finfo(dtype).eps * (a.double().abs() @ b.double().abs() + 1)
    for room in (None, torch.empty(rows * columns + 3, dtype=dtype)):
        product = multiply(a, b, room=room)
        assert product.dtype == dtype
        assert ((product.double() - exact).abs() <= bound).all()
    total = torch.ones(rows, columns)
    add_product(total, a, b)
    assert ((total.double() - 1 - exact).abs() <= 2 * bound).all()


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        (None, "AVX512", False),
    ],
)
def test_processors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str | None, capability: str, expected: bool
) -> None:
    """Catches oneDNN taken where MKL is as fast, or not taken where it leaves half of the processor unused."""
    info = tmp_path / "cpuinfo"
    if vendor is not None:
        info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: any\n")
    monkeypatch.setattr(products, "CPUINFO", info)
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn_is_faster() is expected
