"""Log-probs from hidden states against log_softmax, and the sums per response."""

from collections.abc import Iterator

import pytest
import torch

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model.logprobs import response_logps, scored_hidden, token_logprobs, vocab_logits


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    start(ParallelConfig())
    yield
    stop()


def logprobs(hidden_T1H: torch.Tensor, weight_VH: torch.Tensor, at: list[int], label: list[int]) -> torch.Tensor:
    position_N, label_N = torch.tensor(at, dtype=torch.long), torch.tensor(label, dtype=torch.long)
    hidden_NH = scored_hidden(hidden_T1H, position_N, tp=start(ParallelConfig()).tp, sequence_parallel=False)
    return token_logprobs(hidden_NH, weight_VH, label_N, vocab_size=13, tp_rank=0)


def test_equals_log_softmax_without_the_padding() -> None:
    """Catches padding rows that take part in the softmax, and gradients that reach them or unscored positions. One
    position predicts two labels, as the end of a shared prompt does."""
    torch.manual_seed(0)
    hidden_T1H = torch.randn(6, 1, 4, requires_grad=True)
    weight_VH = torch.randn(16, 4, requires_grad=True)  # 13 words, 3 rows of padding that are not zero
    result_N = logprobs(hidden_T1H, weight_VH, [1, 1, 4], [0, 12, 5])
    expected_N = (hidden_T1H[:, 0] @ weight_VH[:13].T).log_softmax(-1)[[1, 1, 4], [0, 12, 5]]
    torch.testing.assert_close(result_N, expected_N)
    got = torch.autograd.grad(result_N.sum(), (hidden_T1H, weight_VH))
    want = torch.autograd.grad(expected_N.sum(), (hidden_T1H, weight_VH))
    torch.testing.assert_close(got, want)
    assert not got[1][13:].any()
    assert not got[0][[0, 2, 3, 5]].any()


@pytest.mark.parametrize(("tp_rank", "real"), [(0, 16), (1, 5), (2, 0)])
def test_padding_is_masked_by_the_shards_place(tp_rank: int, real: int) -> None:
    """Catches a mask that counts from the wrong shard's first row: 21 words over three shards of 16 rows."""
    hidden_NH, weight_VH = torch.ones(2, 4), torch.ones(16, 4)
    logits_NV = vocab_logits(hidden_NH, weight_VH, vocab_size=21, tp_rank=tp_rank)
    assert (logits_NV[:, :real] == 4).all()
    assert (logits_NV[:, real:] < -1e38).all()
    assert logits_NV.isfinite().all()


def test_row_without_scored_tokens() -> None:
    """Catches a rank that fails, or leaves the graph, when data parallelism has no group left for it."""
    hidden_T1H, weight_VH = torch.randn(2, 1, 4, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    result_N = logprobs(hidden_T1H, weight_VH, [], [])
    assert result_N.shape == (0,)
    response_logps(result_N, torch.tensor([[0]])).sum().backward()
    assert hidden_T1H.grad is not None
    assert not hidden_T1H.grad.any()


def test_sums_follow_the_lengths() -> None:
    """Catches a response that gets its neighbour's tokens; empty responses stand between."""
    logp_N = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums_GK = response_logps(logp_N, torch.tensor([[2, 0, 1], [0, 0, 2]]))
    assert sums_GK.tolist() == [[3.0, 0.0, 4.0], [0.0, 0.0, 24.0]]
    (sums_GK * torch.tensor([[1.0, 5.0, 2.0], [5.0, 5.0, 3.0]])).sum().backward()
    assert logp_N.grad is not None
    assert logp_N.grad.tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_long_sums_are_exact() -> None:
    """Catches a sum in fp32, which loses 1e-4 and more on a response of 100,000 tokens."""
    torch.manual_seed(0)
    logp_N = -torch.rand(100_000) * 8
    total = response_logps(logp_N, torch.tensor([[100_000]]))
    assert float(total) == pytest.approx(float(logp_N.double().sum()), rel=1e-12)
