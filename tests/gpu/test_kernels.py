"""What only a GPU can show of the kernels: in bf16 they are as exact as plain torch, and compiled once.

tests/model checks the same kernels number by number where there is none, in Triton's interpreter and densely.
"""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model import triton_logprobs
from rpo_megatron.model.attention import ATTENTION, AttentionName, check_attention, segment_attention
from rpo_megatron.model.flex import build_mask, flex_attention
from rpo_megatron.model.logprobs import plain_logprobs
from rpo_megatron.model.row import Segments
from rpo_megatron.model.vocab import VocabShard
from tests.model.test_flex import dense, sees
from tests.model.test_hf import tiny_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    start(ParallelConfig())
    yield
    stop()


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a.detach().double() - b.detach()).norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "softcap"), [(1500, None), (1500, 30.0), (5001, None)])
def test_logprobs_are_as_good_as_the_plain_path(num_rows: int, softcap: float | None, dtype: torch.dtype) -> None:
    """Catches what the interpreter cannot show: multiplications that give bf16 for fp32, kernels that race, tiles of a
    real size. Errors against fp64 of values and of both gradients, beside those of materialised logits."""
    torch.manual_seed(0)
    hidden_NH = (torch.randn(num_rows, 512, device=GPU) * 2).to(dtype).requires_grad_()
    weight_VH = (torch.randn(20096, 512, device=GPU) / 512**0.5).to(dtype).requires_grad_()
    shard = VocabShard(weight_VH=weight_VH, vocab_size=20011, tp=start(ParallelConfig()).tp, softcap=softcap)
    label_N, grad_N = torch.randint(0, 20011, (num_rows,), device=GPU), torch.rand(num_rows, device=GPU) - 0.5

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    logits_NV = wide[0] @ wide[1][:20011].T
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    exact_N = logits_NV.log_softmax(-1).gather(1, label_N[:, None])[:, 0]
    exact = [exact_N, *torch.autograd.grad((exact_N * grad_N).sum(), wide)]
    plain_N = plain_logprobs(hidden_NH, shard, label_N)
    plain = [plain_N, *torch.autograd.grad((plain_N * grad_N).sum(), (hidden_NH, weight_VH))]

    inputs = hidden_NH.detach(), weight_VH.detach(), label_N
    max_N, sum_N, label_logit_N = triton_logprobs.forward_statistics(*inputs, num_words=20011, softcap=softcap)
    total_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
    by_hidden_NH = triton_logprobs.backward(
        grad_N, *inputs, max_N, sum_N, num_words=20011, softcap=softcap, grad_weight_VH=total_VH
    )
    ours = [label_logit_N - max_N - sum_N.log(), by_hidden_NH, total_VH]
    for one, other in zip(errors(ours, exact), errors(plain, exact), strict=True):
        assert one <= 1.1 * other + 1e-5
    assert not total_VH[20011:].any()


@pytest.mark.parametrize("name", ["flex", "merged"])
@pytest.mark.parametrize("num_groups", [2, 8])
def test_is_as_good_as_sdpa(num_groups: int, name: AttentionName) -> None:
    """Catches blocks that a kernel skips or takes whole where it must not, and gradients of shared prompts that miss a
    response: errors against fp64 of results and gradients, beside those of torch's attention per segment."""
    torch.manual_seed(0)
    lengths, prompts = [300, 200, 1, 128, 77, 40], [-1, 0, 0, 0, -1, -1]
    num_tokens = sum(lengths)
    shapes = [(num_tokens, 1, heads, 64) for heads in (8, num_groups, num_groups, 8)]
    *inputs, grad = (torch.randn(shape, device=GPU, dtype=torch.bfloat16) for shape in shapes)

    def results(attend: object, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        output = attend(*leaves)  # type: ignore[operator]
        return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]

    segments = Segments(lengths=lengths, prompts=prompts)
    visible_TT = sees(lengths, prompts).to(GPU)
    exact = results(lambda q, k, v: dense(q, k, v, visible_TT), torch.float64)
    sdpa = results(lambda q, k, v: segment_attention(q, k, v, segments, scale=1 / 8), torch.bfloat16)
    found = results(lambda q, k, v: ATTENTION[name](q, k, v, segments, scale=1 / 8), torch.bfloat16)
    for one, other in zip(errors(found, exact), errors(sdpa, exact), strict=True):
        assert one <= 1.3 * other


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_groups", [2, 8])
def test_te_is_as_good_as_sdpa(num_groups: int, window: int | None) -> None:
    """Catches another mask, window, scale or layout of heads than we think Transformer Engine takes, and padding that
    it leaves out: rows of unshared prompts that end in a segment of padding."""
    try:
        check_attention("te", tiny_shape(), device=GPU, dtype=torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    segments = Segments(lengths=[300, 1, 513, 128, 82], prompts=[-1] * 5)
    shapes = [(1024, 1, heads, 64) for heads in (8, num_groups, num_groups, 8)]
    *inputs, grad = (torch.randn(shape, device=GPU, dtype=torch.bfloat16) for shape in shapes)

    def results(name: AttentionName, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        rules = Segments(lengths=segments.lengths, prompts=segments.prompts)
        output = ATTENTION[name](*leaves, rules, scale=1 / 8, window=window)
        return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]

    exact = results("sdpa", torch.float64)
    for one, other in zip(
        errors(results("te", torch.bfloat16), exact), errors(results("sdpa", torch.bfloat16), exact), strict=True
    ):
        assert one <= 1.3 * other


def test_flex_is_compiled_once_for_all_lengths() -> None:
    """Catches a compilation for every length of row, in passes with gradients and without."""
    torch._dynamo.reset()
    counters.clear()
    for length in (700, 1400, 90, 3000, 2000):
        for gradients in (True, False):
            query = torch.randn(length + 200, 1, 4, 64, device=GPU, requires_grad=gradients)
            mask = build_mask([200, length], [-1, 0], device=GPU)
            with torch.set_grad_enabled(gradients):
                output = flex_attention(query, query * 2, query * 3, mask, scale=1 / 8)
            if gradients:
                output.sum().backward()
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flex_with_a_window(softcap: float | None) -> None:
    """Catches a window or a cap that the compiled kernel reads differently from the dense form."""
    torch.manual_seed(0)
    lengths, prompts = [300, 200, 150], [-1, 0, 0]
    query, key, value = (torch.randn(650, 1, 4, 64, device=GPU) for _ in range(3))
    mask = build_mask(lengths, prompts, device=GPU, window=180)
    output = flex_attention(query, key, value, mask, scale=1 / 8, softcap=softcap)
    visible_TT = sees(lengths, prompts, 180).to(GPU)
    expected = dense(query.double(), key.double(), value.double(), visible_TT, softcap=softcap)
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)
