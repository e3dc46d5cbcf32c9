"""Log-probs from hidden states against log_softmax, and the sums per response."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model import vocab
from rpo_megatron.model.logprobs import choose_kept, plain_logprobs, response_logps, scored_hidden, token_logprobs
from rpo_megatron.model.products import multiply
from rpo_megatron.model.vocab import Tiles, VocabShard
from tests.model.memory import last_number, needs_peaks
from tests.model.tiles import set_tile


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    start(ParallelConfig())
    yield
    stop()


def logprobs(hidden_T1H: torch.Tensor, weight_VH: torch.Tensor, at: list[int], label: list[int]) -> torch.Tensor:
    position_N, label_N = torch.tensor(at, dtype=torch.long), torch.tensor(label, dtype=torch.long)
    tp = start(ParallelConfig()).tp
    hidden_NH = scored_hidden(hidden_T1H, position_N, tp=tp, sequence_parallel=False)
    return token_logprobs(hidden_NH, shard_of(weight_VH), label_N)


def shard_of(weight_VH: torch.Tensor, *, softcap: float | None = None) -> VocabShard:
    """13 words of the weight's 16 rows."""
    return VocabShard(weight_VH=weight_VH, vocab_size=13, tp=start(ParallelConfig()).tp, softcap=softcap)


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


def inputs(num_rows: int, *, scale: float, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """hidden [N, 8], weight [16, 8] with 13 words, labels [N], and a weight for each row's log-probability."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = (torch.randn(num_rows, 8, generator=generator) * scale).to(dtype).requires_grad_()
    weight_VH = torch.randn(16, 8, generator=generator).to(dtype).requires_grad_()
    label_N = torch.randint(0, 13, (num_rows,), generator=generator)
    return hidden_NH, weight_VH, label_N, torch.rand(num_rows, generator=generator) - 0.5


def gradients(logp_N: torch.Tensor, weight_N: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((logp_N * weight_N).sum(), of)


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(0, 9),
    tile=st.tuples(st.integers(1, 10), st.integers(1, 14)),
    scale=st.sampled_from([1.0, 30.0, 3e3]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 99),
)
def test_tiles_do_not_matter(
    num_rows: int, tile: tuple[int, int], scale: float, softcap: float | None, seed: int
) -> None:
    """Catches a tile that is left out or counted twice, tiles merged wrongly, a maximum that is not subtracted (logits
    of 1e4 overflow), a gradient that misses the label or the cap, or reaches the padding: against fp64, for tiles that
    do not divide rows and words."""
    hidden_NH, weight_VH, label_N, weight_N = inputs(num_rows, scale=scale, dtype=torch.float32, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, *tile)
        logp_N = token_logprobs(hidden_NH, shard_of(weight_VH, softcap=softcap), label_N)
        got = gradients(logp_N, weight_N, hidden_NH, weight_VH)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    logits_NV = wide[0] @ wide[1][:13].T
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    expected_N = logits_NV.log_softmax(-1)[torch.arange(num_rows), label_N]
    want = gradients(expected_N, weight_N, *wide)
    torch.testing.assert_close(logp_N.double(), expected_N, rtol=1e-5, atol=1e-5 * scale)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_the_plain_path(dtype: torch.dtype, softcap: float | None) -> None:
    """Catches rounding that materialised logits do not have: errors against fp64 of values and of both gradients, at
    the precision of the inputs."""
    hidden_NH, weight_VH, label_N, weight_N = inputs(200, scale=2.0, dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    logits_NV = wide[0] @ wide[1][:13].T
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    exact_N = logits_NV.log_softmax(-1)[torch.arange(200), label_N]
    exact = [exact_N, *gradients(exact_N, weight_N, *wide)]
    errors = []
    for function in (token_logprobs, plain_logprobs):
        logp_N = function(hidden_NH, shard_of(weight_VH, softcap=softcap), label_N)
        found = [logp_N, *gradients(logp_N, weight_N, hidden_NH, weight_VH)]
        errors.append([float((a.double() - b).norm()) for a, b in zip(found, exact, strict=True)])
    for tiled, plain in zip(*errors, strict=True):
        assert tiled <= 1.1 * plain + 1e-6


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, softcap: float | None) -> None:
    """Catches logits that are kept in another precision or state than they are computed in again, that are overwritten
    before backward reads them or are used twice, and a memory limit that is passed or not used up: to the bit, without
    kept tiles, with some (the fifth is too many), and with all; the second backward finds none."""
    set_tile(monkeypatch, 4, 5)
    hidden_NH, weight_VH, label_N, weight_N = inputs(11, scale=2.0, dtype=dtype)
    products = []
    monkeypatch.setattr(vocab, "multiply", lambda *args, **given: products.append(1) or multiply(*args, **given))
    results, counts = [], []
    for keep_bytes in (0, 4 * 4 * 5 * dtype.itemsize + 1, 10**6):
        products.clear()
        logp_N = token_logprobs(hidden_NH, shard_of(weight_VH, softcap=softcap), label_N, keep_bytes=keep_bytes)
        for _ in range(2):
            grads = torch.autograd.grad((logp_N * weight_N).sum(), (hidden_NH, weight_VH), retain_graph=True)
            results.append((logp_N, *grads))
            counts.append(len(products))
    # 3 x 3 tiles; the third of a row is 3 words wide, so that the fifth kept one would be a whole one again
    assert counts == [18, 27, 14, 23, 9, 18]
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation, or a reference, that holds logits for a backward that never comes."""
    monkeypatch.setattr(vocab.Kept, "put", lambda *args: pytest.fail("kept"))
    hidden_NH, weight_VH, label_N, _ = inputs(3, scale=1.0, dtype=torch.float32)
    with torch.no_grad():
        token_logprobs(hidden_NH, shard_of(weight_VH), label_N, keep_bytes=10**6)


def test_memory_for_kept_logits() -> None:
    """Catches a default that the memory test below does not see, and Triton's kernels promised memory that they do not
    use."""
    assert choose_kept(None, "tiles", torch.device("cpu")) == 32 * 2**20
    assert choose_kept(3, "tiles", torch.device("cpu")) == 3 * 2**20
    assert choose_kept(0, "tiles", torch.device("cuda")) == 0
    assert choose_kept(None, "triton", torch.device("cuda")) == 0


MEMORY = """
from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model import logprobs
from rpo_megatron.model.vocab import VocabShard
tp = start(ParallelConfig()).tp
num_rows, words = 4096, 131072
def run(rows):
    hidden_NH, label_N = torch.randn(rows, 16, requires_grad=True), torch.randint(0, words, (rows,))
    shard = VocabShard(weight_VH=weight_VH, vocab_size=words, tp=tp)
    if sys.argv[1] == "plain_logprobs":
        logp_N = logprobs.plain_logprobs(hidden_NH, shard, label_N)
    else:
        keep_bytes = logprobs.choose_kept(None, "tiles", torch.device("cpu"))
        logp_N = logprobs.token_logprobs(hidden_NH, shard, label_N, keep_bytes=keep_bytes)
    logp_N.sum().backward()
weight_VH = torch.randn(words, 16, requires_grad=True)
run(8)  # libraries, threads, and the weight's gradient
print(Peak.start().of(lambda: run(num_rows)))
stop()
"""


def extra_memory(function: str) -> float:
    """MiB that log-probs of 4,096 rows over a vocabulary of 131,072, and their backward, take at their peak. The logits
    would be 2,048 MiB."""
    return last_number(MEMORY, function)


@needs_peaks
def test_memory_does_not_grow_with_the_logits() -> None:
    """Catches more logits kept than are meant to be: the plain path shows that the measurement would see them."""
    tiled, plain = extra_memory("token_logprobs"), extra_memory("plain_logprobs")
    weight_gradient = 131072 * 16 * 4 / 2**20
    print(f"extra memory: {tiled:.0f} MiB in tiles, {plain:.0f} MiB with all logits")
    assert plain > 1900
    assert tiled < weight_gradient + 64, "MiB: kept tiles, one in work, temporaries, and the rows' statistics"


@pytest.mark.parametrize(("tp_rank", "words"), [(0, 16), (1, 5), (2, 0)])
def test_padding_is_left_out_by_the_shards_place(tp_rank: int, words: int) -> None:
    """Catches words that are counted from the wrong shard's first row: 21 words over three shards of 16 rows."""
    tp = replace(start(ParallelConfig()).tp, rank=tp_rank)
    shard = VocabShard(weight_VH=torch.ones(16, 4), vocab_size=21, tp=tp)
    assert shard.num_words == words
    assert sum(tile.stop - tile.start for tile in Tiles(shard, 3).words) == words


def test_tiles_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tile that ignores the memory it may take, or rows and words that are lost between tiles."""
    set_tile(monkeypatch, 3, 100)
    shard = VocabShard(weight_VH=torch.empty(240, 1), vocab_size=230, tp=start(ParallelConfig()).tp)
    tiles = Tiles(shard, 7)
    assert [(tile.start, tile.stop) for tile in tiles.rows] == [(0, 3), (3, 6), (6, 9)]
    assert [(tile.start, tile.stop) for tile in tiles.words] == [(0, 100), (100, 200), (200, 230)]
    assert len(Tiles(shard, 7, num_models=2).words) == 5
    monkeypatch.setattr(vocab, "TILE_BYTES", {"cpu": 1})
    assert len(Tiles(shard, 7).rows) == 7
    assert len(Tiles(shard, 7).words) == 230


@pytest.mark.parametrize("tied", [False, True])
def test_weight_gradient_goes_where_megatron_keeps_it(tied: bool) -> None:
    """Catches a gradient that is lost or counted twice where megatron has a buffer for it, and an embedding's gradient
    that is lost with it: over two micro-batches, with megatron's own hook."""
    hidden_NH, weight_VH, label_N, weight_N = inputs(6, scale=1.0, dtype=torch.float32)
    expected = gradients(token_logprobs(hidden_NH, shard_of(weight_VH), label_N), weight_N, weight_VH)[0]
    weight_VH = torch.nn.Parameter(weight_VH.detach())
    weight_VH.main_grad, weight_VH.grad_added_to_main_grad = torch.zeros(16, 8), False
    if tied:
        weight_VH.zero_out_wgrad = True
    for _ in range(2):
        logp_N = token_logprobs(hidden_NH, shard_of(weight_VH), label_N)
        embedded = weight_VH[:2].sum() if tied else 0.0
        ((logp_N * weight_N).sum() + embedded).backward()
        # what megatron's DistributedDataParallel does when the weight's gradient is complete
        assert weight_VH.grad is not None
        if not weight_VH.grad_added_to_main_grad or tied:
            weight_VH.main_grad.add_(weight_VH.grad)
        weight_VH.grad = None
    expected[:2] += float(tied)
    torch.testing.assert_close(weight_VH.main_grad, 2 * expected)


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
