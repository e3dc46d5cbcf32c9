"""The Triton kernels of the output layer against log_softmax in fp64, on a GPU or in Triton's interpreter.

The interpreter is chosen when triton is imported, so without a GPU the tests of the kernels run in a process of their
own: the first test starts it.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model import triton_logprobs
from rpo_megatron.model.logprobs import token_logprobs
from rpo_megatron.model.triton_logprobs import ALIGNMENT, available, backward, forward_statistics
from rpo_megatron.model.vocab import VocabShard

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not IN_INTERPRETER else "cpu")
of_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not IN_INTERPRETER, reason="no GPU: run by test_kernels_in_the_interpreter"
)
SMALL = 3 * 4 * ALIGNMENT
"""Bytes of a tile of three rows and as few words as there can be."""


@needs_triton
@pytest.mark.skipif(IN_INTERPRETER or DEVICE.type == "cuda", reason="the kernels' tests run in this process")
def test_kernels_in_the_interpreter() -> None:
    """Runs the other tests of this file where there is no GPU."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.skipif(IN_INTERPRETER, reason="the interpreter has no compiler")
@pytest.mark.parametrize("capped", [False, True])
def test_kernels_compile_for_hopper(capped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches what the interpreter accepts and the compiler does not, loads and stores of one number at a time, and
    gradients that are cut off instead of rounded. Needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"logits": "*fp32", "column": "*i64", "largest": "*fp32", "scale": "*fp32", "grad": "*fp32"}
    sizes = {"first": "i32", "width": "i32", "softcap": "fp32"}
    constants = {"CAPPED": capped, "BLOCK": triton_logprobs.BLOCK}
    statistics = assembly(
        triton_logprobs._statistics_kernel,
        {**pointers, "state": "*fp32", "state_stride": "i32", **sizes},
        constants,
    )
    assert "ld.global.v4" in statistics
    gradient = assembly(triton_logprobs._gradient_kernel, {**pointers, "out": "*bf16", **sizes}, constants)
    assert "ld.global.v4" in gradient
    assert "st.global.v4" in gradient
    assert "cvt.rn.bf16" in gradient


def assembly(kernel: Any, types: dict[str, str], constants: dict[str, int]) -> str:
    """PTX for an H100, of the kernel with whole tiles: pointers and sizes that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ("first", "width")]
    source = ASTSource(
        kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    ptx: str = compiled.asm["ptx"]
    return ptx


@dataclass(frozen=True)
class Case:
    """hidden [N, H], the weight [V, H] of a shard whose last rows are padding, and a label's column per row, which is
    the shard's only in [0, num_words)."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    column_N: torch.Tensor
    grad_N: torch.Tensor
    num_words: int
    softcap: float | None


def case(
    num_rows: int,
    hidden_size: int,
    num_words: int,
    *,
    padding: int = 5,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(num_rows, hidden_size, generator=generator) * scale
    weight_VH = torch.randn(num_words + padding, hidden_size, generator=generator) / hidden_size**0.5
    column_N = torch.randint(-num_words // 4, num_words + num_words // 4 + 1, (num_rows,), generator=generator)
    column_N[: num_rows // 5] = torch.tensor([0, num_words - 1]).repeat(num_rows)[: num_rows // 5]  # the ends
    grad_N = torch.rand(num_rows, generator=generator) - 0.5
    return Case(
        hidden_NH=hidden_NH.to(DEVICE, dtype),
        weight_VH=weight_VH.to(DEVICE, dtype),
        column_N=column_N.to(DEVICE),
        grad_N=grad_N.to(DEVICE),
        num_words=num_words,
        softcap=softcap,
    )


def results(of: Case) -> list[torch.Tensor]:
    """[largest logit, log-sum-exp, label's logit, gradient of hidden, of weight]: of the kernels."""
    options: Any = {"num_words": of.num_words, "softcap": of.softcap}
    max_N, sum_N, label_N = forward_statistics(of.hidden_NH, of.weight_VH, of.column_N, **options)
    grad_VH = torch.zeros_like(of.weight_VH, dtype=torch.float32)
    grad_NH = backward(
        of.grad_N, of.hidden_NH, of.weight_VH, of.column_N, max_N, sum_N, **options, grad_weight_VH=grad_VH
    )
    return [max_N, max_N + sum_N.log(), label_N, grad_NH, grad_VH]


def oracle(of: Case, *, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The same by torch and autograd, from logits in `dtype`. A label of another shard has logit 0 here."""
    hidden_NH, weight_VH = (tensor.detach().to(dtype).requires_grad_() for tensor in (of.hidden_NH, of.weight_VH))
    logits_NV = (hidden_NH @ weight_VH[: of.num_words].T).to(torch.promote_types(dtype, torch.float32))
    if of.softcap is not None:
        logits_NV = of.softcap * (logits_NV / of.softcap).tanh()
    mine_N = (of.column_N >= 0) & (of.column_N < of.num_words)
    label_N = logits_NV.gather(1, torch.where(mine_N, of.column_N, 0)[:, None])[:, 0] * mine_N
    lse_N = logits_NV.logsumexp(-1)
    gradients = torch.autograd.grad(((label_N - lse_N) * of.grad_N).sum(), (hidden_NH, weight_VH))
    return [logits_NV.amax(-1), lse_N, label_N, *gradients]


@needs_triton
@of_kernels
@pytest.mark.parametrize(("hidden_size", "softcap"), [(48, None), (129, 4.0)])
def test_equals_log_softmax(hidden_size: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tiles and blocks whose edges are left out or counted twice (37 rows of 1,003 words, tiles of 13 x 128,
    blocks of 64), padding that takes part, labels that are missed or taken from another rank's words, and the cap's
    slope."""
    monkeypatch.setattr(triton_logprobs, "TILE_ROWS", 15)
    monkeypatch.setattr(triton_logprobs, "BLOCK", 64)
    monkeypatch.setattr(triton_logprobs, "FORWARD_BYTES", SMALL)
    monkeypatch.setattr(triton_logprobs, "BACKWARD_BYTES", SMALL)
    of = case(37, hidden_size, 1003, softcap=softcap, scale=3.0)
    got = results(of)
    for one, other in zip(got, oracle(of), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)
    assert not got[4][1003:].any()


@needs_triton
@of_kernels
@settings(deadline=None, max_examples=15)
@given(
    num_rows=st.integers(1, 9),
    num_words=st.integers(1, 300),
    tile_rows=st.integers(1, 10),
    scale=st.sampled_from([1.0, 1e4]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 99),
)
def test_tiles_do_not_matter(
    num_rows: int, num_words: int, tile_rows: int, scale: float, softcap: float | None, seed: int
) -> None:
    """Catches shapes that the tiles do not divide, and a maximum that is not subtracted (logits of 1e4 overflow)."""
    of = case(num_rows, 8, num_words, softcap=softcap, scale=scale, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_logprobs, "TILE_ROWS", tile_rows)
        patch.setattr(triton_logprobs, "BLOCK", 32)
        patch.setattr(triton_logprobs, "FORWARD_BYTES", SMALL)
        got = results(of)
    for one, other in zip(got, oracle(of), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * scale)


@needs_triton
@of_kernels
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_bf16_is_better_than_rounded_logits(softcap: float | None) -> None:
    """Catches a logit or a sum that is rounded to bf16 on the way: errors against fp64 beside those of torch, which
    rounds the logits. The gradient by a logit is rounded in both; the interpreter cuts it off, for twice the error."""
    of = case(50, 64, 500, softcap=softcap, dtype=torch.bfloat16, scale=3.0)
    exact = oracle(of)
    errors = [
        [float((a.double() - b).norm()) for a, b in zip(found, exact, strict=True)]
        for found in (results(of), oracle(of, dtype=torch.bfloat16))
    ]
    for ours, plain in list(zip(*errors, strict=True))[:3]:
        assert ours <= 0.01 * plain
    for ours, plain in list(zip(*errors, strict=True))[3:]:
        assert ours <= (2 if IN_INTERPRETER else 1) * plain


@needs_triton
@of_kernels
def test_gradient_is_added_to_what_is_there() -> None:
    """Catches a micro-batch that overwrites the weight gradient of those before it, and a gradient by the
    log-probabilities that is one number for all, as that of a sum is, read beyond its end."""
    of = case(6, 16, 40)
    inputs = of.hidden_NH, of.weight_VH, of.column_N
    max_N, sum_N, _ = forward_statistics(*inputs, num_words=40, softcap=None)
    expanded_N = torch.arange(1.0, 7.0, device=DEVICE)[:1].expand(6)
    totals = [torch.zeros(45, 16, device=DEVICE), torch.ones(45, 16, device=DEVICE)]
    for total_VH, grad_N in zip(totals, (torch.ones(6, device=DEVICE), expanded_N), strict=True):
        backward(grad_N, *inputs, max_N, sum_N, num_words=40, softcap=None, grad_weight_VH=total_VH)
    torch.testing.assert_close(totals[1], totals[0] + 1)


@needs_triton
@of_kernels
@pytest.mark.parametrize(("num_rows", "num_words"), [(0, 40), (3, 0), (0, 0)])
def test_nothing_to_do(num_rows: int, num_words: int) -> None:
    """Catches a launch without programs, for a rank without scored tokens or with nothing but padding."""
    of = case(num_rows, 8, num_words)
    state_3N = forward_statistics(of.hidden_NH, of.weight_VH, of.column_N, num_words=num_words, softcap=None)
    assert state_3N.shape == (3, num_rows)
    assert (state_3N[0] == triton_logprobs.LOWEST).all()
    assert not state_3N[1:].any()
    assert not results(of)[3].any()


def test_importable_without_triton() -> None:
    """Catches a CPU machine where nothing of the model can be imported for want of a GPU's library."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from rpo_megatron.model import triton_logprobs; sys.exit(triton_logprobs.available())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], check=True)
    assert available() == (importlib.util.find_spec("triton") is not None and torch.__version__ >= "2.10")


@needs_triton
@of_kernels
@pytest.mark.parametrize("has_buffer", [False, True])
def test_as_the_tiles_through_autograd(has_buffer: bool) -> None:
    """Catches statistics that are merged or kept in another order than the kernels give them, and a weight gradient
    that misses megatron's buffer."""
    start(ParallelConfig())
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(37, 48, generator=generator).to(DEVICE).requires_grad_()
    weight_VH = torch.nn.Parameter(torch.randn(1003, 48, generator=generator).to(DEVICE))
    label_N = torch.randint(0, 1000, (37,), generator=generator).to(DEVICE)
    shard = VocabShard(weight_VH=weight_VH, vocab_size=1000, tp=start(ParallelConfig()).tp)
    results = []
    for impl in ("tiles", "triton"):
        if has_buffer:
            weight_VH.main_grad, weight_VH.grad_added_to_main_grad = torch.zeros_like(weight_VH.data), False
        hidden_NH.grad = weight_VH.grad = None
        logp_N = token_logprobs(hidden_NH, shard, label_N, impl=impl)  # type: ignore[arg-type]
        (logp_N * torch.linspace(-1, 1, 37, device=DEVICE)).sum().backward()
        gradient = weight_VH.main_grad if has_buffer else weight_VH.grad
        results.append([logp_N.detach(), hidden_NH.grad, gradient])
    stop()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
