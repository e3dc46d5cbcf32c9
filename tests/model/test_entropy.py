"""Token entropies against plain torch in fp64."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model.entropy import token_entropy
from rpo_megatron.model.vocab import VocabShard
from tests.model.tiles import set_tile


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    start(ParallelConfig())
    yield
    stop()


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(0, 9),
    tile=st.tuples(st.integers(1, 10), st.integers(1, 14)),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(num_rows: int, tile: tuple[int, int], scale: float, seed: int) -> None:
    """Catches tiles merged wrongly, padding that takes part, sums that overflow, and 0 log 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(num_rows, 8, generator=generator) * scale
    weight_VH = torch.randn(16, 8, generator=generator)
    shard = VocabShard(weight_VH=weight_VH, vocab_size=13, tp=start(ParallelConfig()).tp)
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, *tile)
        entropy_N = token_entropy(hidden_NH, shard)
    logits_NV = hidden_NH.double() @ weight_VH[:13].double().T
    expected_N = torch.distributions.Categorical(logits=logits_NV).entropy()
    torch.testing.assert_close(entropy_N.double(), expected_N, rtol=1e-4, atol=1e-4)
    if scale == 0.0:
        torch.testing.assert_close(entropy_N, torch.full((num_rows,), 13.0).log())
