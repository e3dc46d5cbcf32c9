"""FlexAttention's masks and results against a dense softmax written from the definition.

FlexAttention has no backward on a CPU, where gradients go through the dense form of our own; what the kernel is given,
the lists of blocks, is checked number by number, and the kernel's forward is compiled once.
"""

import math
import shutil
import tracemalloc

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from rpo_megatron.model import flex
from rpo_megatron.model.flex import BLOCK, FlexMask, build_mask, flex_attention

CPU = torch.device("cpu")
HEAD = 8


@st.composite
def rows(draw: st.DrawFn, longest: int) -> tuple[list[int], list[int]]:
    """(lengths, prompts) of a row of groups: with a shared prompt, without, and perhaps padding."""
    lengths: list[int] = []
    prompts: list[int] = []
    length = st.one_of(st.just(1), st.integers(1, longest), st.sampled_from([BLOCK, 2 * BLOCK]))
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(length)
        responses = draw(st.lists(length, min_size=1, max_size=4))
        if draw(st.booleans()):
            prompts += [-1, *[len(lengths)] * len(responses)]
            lengths += [prompt, *responses]
        else:
            prompts += [-1] * len(responses)
            lengths += [prompt + response for response in responses]
    if padding := draw(st.integers(0, 3)):
        lengths.append(padding)
        prompts.append(-1)
    return lengths, prompts


def sees(lengths: list[int], prompts: list[int], window: int | None = None) -> torch.Tensor:
    """From the definition, bool [T, T]: a token sees its own segment up to itself, and its prompt; with a window, what
    is less than so many positions before it, where responses count on from the end of their prompt."""
    segment_T = torch.repeat_interleave(torch.tensor(lengths))
    order_T = torch.arange(len(segment_T))
    own_TT = (segment_T[:, None] == segment_T) & (order_T[:, None] >= order_T)
    visible_TT = own_TT | (torch.tensor(prompts)[segment_T][:, None] == segment_T)
    if window is None:
        return visible_TT
    before = [0 if prompt < 0 else lengths[prompt] for prompt in prompts]
    position_T = torch.cat([start + torch.arange(length) for start, length in zip(before, lengths, strict=True)])
    return visible_TT & (position_T[:, None] - position_T < window)


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """bool [B, B] of a list of blocks."""
    blocks_BB = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for line, (count, index) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        blocks_BB[line, index[:count]] = True
    return blocks_BB


@settings(deadline=None, max_examples=60)
@given(row=rows(300), window=st.sampled_from([None, 1, 60, 200]))
@example(row=([600, 400, 130], [-1, 0, -1]), window=200)
def test_mask_and_blocks(row: tuple[list[int], list[int]], window: int | None) -> None:
    """Catches a token that sees the future, a neighbour or padding, or not all of its prompt; a block that the kernel
    skips, or takes whole, and must not; one that is looked at token by token for nothing; and lists for the backward
    that say otherwise than those for the forward."""
    lengths, prompts = row
    mask = build_mask(lengths, prompts, device=CPU, window=window)
    num_tokens = sum(lengths)
    size, _ = mask.blocks.seq_lengths
    assert mask.num_tokens == num_tokens
    assert size % BLOCK == 0
    at_T = torch.arange(size)
    got_TT = mask.blocks.mask_mod(None, None, at_T[:, None], at_T)
    want_TT = sees([*lengths, size - num_tokens], [*prompts, -1], window)
    assert torch.equal(got_TT, want_TT)
    count_BB = want_TT.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum((1, 3))
    full_BB = count_BB == BLOCK * BLOCK
    blocks = mask.blocks
    assert torch.equal(listed(blocks.kv_num_blocks, blocks.kv_indices), (count_BB > 0) & ~full_BB)
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_q_num_blocks is not None
    assert torch.equal(listed(blocks.full_kv_num_blocks, blocks.full_kv_indices), full_BB)
    assert torch.equal(listed(blocks.q_num_blocks, blocks.q_indices), ((count_BB > 0) & ~full_BB).T)
    assert torch.equal(listed(blocks.full_q_num_blocks, blocks.full_q_indices), full_BB.T)


def tensors(num_tokens: int, *, groups: int, seed: int = 0) -> list[torch.Tensor]:
    """query of 4 heads, key and value of `groups`, and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    heads = (4, groups, groups, 4)
    return [torch.randn(num_tokens, 1, h, HEAD, generator=generator).requires_grad_() for h in heads]


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible_TT: torch.Tensor,
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention with scale 1 / sqrt(d), [T, 1, h, d]."""
    repeats = query.shape[2] // key.shape[2]
    q, k, v = query[:, 0], key[:, 0].repeat_interleave(repeats, 1), value[:, 0].repeat_interleave(repeats, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~visible_TT, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)[:, None]


@settings(deadline=None, max_examples=30)
@given(
    row=rows(7),
    groups=st.sampled_from([1, 2, 4]),
    softcap=st.sampled_from([None, 0.5]),
    window=st.sampled_from([None, 3]),
)
def test_equals_dense_attention(
    row: tuple[list[int], list[int]], groups: int, softcap: float | None, window: int | None
) -> None:
    """Catches heads matched to the wrong keys, the tokens that fill the last block leaking into results or gradients, a
    cap before the scale, and shapes of the result."""
    lengths, prompts = row
    query, key, value, grad = tensors(sum(lengths), groups=groups)
    mask = build_mask(lengths, prompts, device=CPU, window=window)
    output = flex_attention(query, key, value, mask, scale=1 / math.sqrt(HEAD), softcap=softcap)
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in (query, key, value))
    expected = dense(q, k, v, sees(lengths, prompts, window), softcap=softcap)
    got = [output, *torch.autograd.grad(output, (query, key, value), grad)]
    want = [expected, *torch.autograd.grad(expected, (q, k, v), grad.double())]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the CPU's FlexAttention is compiled by g++")
def test_one_compilation_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a compilation for every length of row, and a BlockMask that FlexAttention does not take: its own forward,
    on a CPU, for rows of one to nine blocks."""
    monkeypatch.setattr(flex, "_dense", flex._compiled())
    counters.clear()
    rows = [([300, 50, 70, 1], [-1, 0, 0, -1]), ([600, 300, 200], [-1, 0, 0]), ([10, 50, 30], [-1, 0, 0])]
    for lengths, prompts in [*rows, ([200, 470], [-1, 0])]:
        query, key, value, _ = (tensor.detach() for tensor in tensors(sum(lengths), groups=2))
        mask = build_mask(lengths, prompts, device=CPU)
        output = flex_attention(query, key, value, mask, scale=1 / math.sqrt(HEAD))
        expected = dense(query, key, value, sees(lengths, prompts))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


def test_nothing_quadratic_is_built() -> None:
    """Catches a mask by way of one number per pair of tokens: 32,768 tokens would make 1 GiB of them."""
    lengths = [1024, *[256] * 4] * 16
    prompts = [prompt for group in range(16) for prompt in (-1, *[5 * group] * 4)]
    tracemalloc.start()
    mask: FlexMask = build_mask(lengths, prompts, device=CPU)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mask.num_tokens == 32768
    assert peak < 16 * 2**20
