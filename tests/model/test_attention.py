"""Every implementation of core attention against a dense softmax in fp64: results and gradients."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.model.attention import ATTENTION, AttentionName, attend_padded, layer_attention
from rpo_megatron.model.row import Segments
from tests.model.test_hf import tiny_shape

HEAD = 8
ON_CPU = [name for name in ATTENTION if name != "te"]  # which has a test of its own, with a stand-in


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(lengths, prompts) of a row of groups: with a shared prompt, without, and perhaps padding."""
    lengths: list[int] = []
    prompts: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(st.integers(1, 7))
        responses = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
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


def tensors(num_tokens: int, *, groups: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """query of 4 heads, key and value of `groups`, and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    heads = (4, groups, groups, 4)
    return [torch.randn(num_tokens, 1, h, HEAD, generator=generator).to(dtype).requires_grad_() for h in heads]


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sink_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """From the definition: a token sees its own segment up to itself, and all of its segment's prompt; of these the
    last `window`, where a response's positions go on from its prompt's."""
    segment_T = torch.repeat_interleave(torch.tensor(segments.lengths))
    order_T = torch.arange(len(segment_T))
    own_TT = (segment_T[:, None] == segment_T) & (order_T[:, None] >= order_T)
    shared_TT = torch.tensor(segments.prompts)[segment_T][:, None] == segment_T
    repeats = query.shape[2] // key.shape[2]
    q, k, v = query[:, 0], key[:, 0].repeat_interleave(repeats, 1), value[:, 0].repeat_interleave(repeats, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(HEAD)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    visible_TT = own_TT | shared_TT
    if window is not None:
        position_T = positions(segments)
        visible_TT &= position_T[:, None] - position_T < window
    scores = scores.masked_fill(~visible_TT, float("-inf"))
    if sink_h is None:
        return torch.einsum("hts,shd->thd", scores.softmax(-1), v)[:, None]
    sink = sink_h[:, None, None].expand(-1, len(segment_T), 1)
    return torch.einsum("hts,shd->thd", torch.cat([scores, sink], -1).softmax(-1)[..., :-1], v)[:, None]


def positions(segments: Segments) -> torch.Tensor:
    """Of each token in its text."""
    starts = [segments.lengths[prompt] if prompt >= 0 else 0 for prompt in segments.prompts]
    return torch.cat([start + torch.arange(n) for start, n in zip(starts, segments.lengths, strict=True)])


def results(
    name: AttentionName | None, inputs: list[torch.Tensor], segments: Segments, **rules: Any
) -> list[torch.Tensor]:
    """[output, gradients of query, key, value and sinks], in fp64; of `dense` without a name."""
    *qkv, grad = inputs
    attend: Callable[..., torch.Tensor] = dense if name is None else partial(ATTENTION[name], scale=1 / math.sqrt(HEAD))
    output = attend(*qkv, segments, **rules)
    wanted = [*qkv, *([rules["sink_h"]] if "sink_h" in rules else [])]
    return [tensor.double() for tensor in (output, *torch.autograd.grad(output, wanted, grad))]


@pytest.mark.parametrize("name", ON_CPU)
@settings(deadline=None, max_examples=60)
@given(row=rows(), groups=st.sampled_from([1, 2, 4]))
def test_equals_dense_attention(name: AttentionName, row: tuple[list[int], list[int]], groups: int) -> None:
    """Catches a token that sees the future, a neighbour or padding, or not all of its prompt; heads matched to the
    wrong keys; gradients of shared keys that miss a response, or come from a softmax over a part of the keys."""
    lengths, prompts = row
    inputs = tensors(sum(lengths), groups=groups, dtype=torch.float32)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got = results(name, inputs, Segments(lengths=lengths, prompts=prompts))
    want = results(None, wide, Segments(lengths=lengths, prompts=prompts))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


SINKS = torch.tensor([-1.0, 0.5, 0.0, 3.0])


@pytest.mark.parametrize("name", ON_CPU)
@settings(deadline=None, max_examples=40)
@given(row=rows(), groups=st.sampled_from([1, 2, 4]), window=st.one_of(st.none(), st.integers(1, 15)))
def test_sinks_equal_dense_attention(
    name: AttentionName, row: tuple[list[int], list[int]], groups: int, window: int | None
) -> None:
    """Catches a sink of another head, one that a window hides, that counts twice where two passes are merged, or whose
    gradient misses a part of the tokens; and gradients of the rest that do not know it."""
    segments = Segments(lengths=row[0], prompts=row[1])
    inputs = tensors(sum(row[0]), groups=groups, dtype=torch.float32)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    rules = {} if name == "merged" else {"window": window}
    got = results(name, inputs, segments, **rules, sink_h=SINKS.clone().requires_grad_())
    want = results(None, wide, segments, **rules, sink_h=SINKS.double().requires_grad_())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_narrow_values(name: AttentionName) -> None:
    """Catches zeros that reach the result, or gradients of values that miss some of their numbers: heads whose values
    have fewer numbers than their keys, as latent attention has them."""
    segments = Segments(lengths=[5, 3, 4, 6], prompts=[-1, 0, 0, -1])
    query, key, value, grad = tensors(18, groups=4, dtype=torch.float32)
    inputs = [query, key, *(tensor[..., :5].detach().requires_grad_() for tensor in (value, grad))]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    *qkv, grad = inputs
    output = attend_padded(partial(ATTENTION[name], scale=1 / math.sqrt(HEAD)), *qkv, segments)
    got = [output, *torch.autograd.grad(output, qkv, grad)]
    for one, other in zip(got, results(None, wide, segments), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_bf16_is_as_good_as_plain_torch(name: AttentionName) -> None:
    """Catches parts that are rounded to bf16 before they are put together: the error against fp64, beside that of
    torch's own attention with the keys joined."""
    segments = Segments(lengths=[40, 30, 1, 50, 25], prompts=[-1, 0, 0, 0, -1])
    inputs = tensors(sum(segments.lengths), groups=2, dtype=torch.bfloat16)
    exact = results(None, [tensor.detach().double().requires_grad_() for tensor in inputs], segments)
    plain = results("sdpa", inputs, segments)
    for one, other, truth in zip(results(name, inputs, segments), plain, exact, strict=True):
        assert (one - truth).norm() <= 1.3 * (other - truth).norm()


def test_large_scores_are_merged_without_overflow() -> None:
    """Catches sums of exponentials that are formed before the maximum is taken off: scores of several thousands, where
    what has any gradient left to speak of is the value."""
    segments = Segments(lengths=[3, 2, 4], prompts=[-1, 0, 0])
    query, *others = tensors(9, groups=2, dtype=torch.float32)
    inputs = [(query.detach() * 3e3).requires_grad_(), *others]
    want = results(None, [tensor.detach().double().requires_grad_() for tensor in inputs], segments)
    got = results("merged", inputs, segments)
    assert all(tensor.isfinite().all() for tensor in got)
    for i in (0, 3):
        torch.testing.assert_close(got[i], want[i], rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=60)
@given(
    row=rows(),
    groups=st.sampled_from([1, 2, 4]),
    window=st.one_of(st.none(), st.integers(1, 15)),
    softcap=st.sampled_from([None, 0.5, 3.0]),
)
def test_windows_and_softcaps_equal_dense_attention(
    row: tuple[list[int], list[int]], groups: int, window: int | None, softcap: float | None
) -> None:
    """Catches a window that is off by one, that counts from the segment's start instead of its text's, or keeps the
    whole prompt; a cap after the mask or before the scale."""
    lengths, prompts = row
    inputs = tensors(sum(lengths), groups=groups, dtype=torch.float32)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    rules = {"window": window, "softcap": softcap}
    got = results("sdpa", inputs, Segments(lengths=lengths, prompts=prompts), **rules)
    want = results(None, wide, Segments(lengths=lengths, prompts=prompts), **rules)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("lengths", [[5, 3, 4], [5, 3, 5], [9, 1]])
def test_layers_follow_their_own_rules(name: AttentionName, lengths: list[int]) -> None:
    """Catches a window on a layer that has none, dropped where a prompt and its response only together are longer than
    it, or taken for longer ones; a soft-cap that is forgotten because there is no window."""
    segments = Segments(lengths=lengths, prompts=[-1, *[0] * (len(lengths) - 1)])
    query, key, value, _ = tensors(sum(lengths), groups=2, dtype=torch.float32)
    sliding = replace(tiny_shape(), num_layers=2, sliding_window=9, full_layers=(1,))
    capped = replace(tiny_shape(), attention_softcap=0.5)
    for shape, layer in ((sliding, 0), (sliding, 1), (capped, 0)):
        rules: dict[str, Any] = {"window": shape.window(layer), "softcap": shape.attention_softcap}
        got = layer_attention(name, shape, layer, scale=1 / math.sqrt(HEAD))(query, key, value, segments)
        torch.testing.assert_close(got, dense(query, key, value, segments, **rules), rtol=1e-4, atol=1e-5)
