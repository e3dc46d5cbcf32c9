"""Merged attention as a GPU computes it: with a stand-in for the two operators, against a dense softmax in fp64; and
with the operators themselves where they only say shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.model import merged_gpu
from rpo_megatron.model.row import Segments
from tests.model import varlen_stand_in
from tests.model.test_attention import HEAD, SINKS, results, rows, tensors


def on_stand_in(
    inputs: list[torch.Tensor], segments: Segments, sink_h: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """[output, gradients of query, key, value and sinks], in fp64."""
    query, key, value, grad = inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged_gpu, "_forward", varlen_stand_in.forward)
        patch.setattr(merged_gpu, "_backward", varlen_stand_in.backward)
        output = merged_gpu.merged_attention(query, key, value, segments, scale=1 / math.sqrt(HEAD), sink_h=sink_h)
        wanted = [query, key, value, *([] if sink_h is None else [sink_h])]
        grads = torch.autograd.grad(output, wanted, grad)
        return [tensor.double() for tensor in (output, *grads)]


@settings(deadline=None, max_examples=60)
@given(row=rows(), groups=st.sampled_from([1, 2, 4]), sinks=st.booleans())
def test_equals_dense_attention(row: tuple[list[int], list[int]], groups: int, sinks: bool) -> None:
    """Catches a response that meets another group's prompt, a prompt's gradient that misses a response, the operators
    given a part's result or log-sum-exp in backward, or borders that leave a token out; a sink that counts for the
    responses alone."""
    lengths, prompts = row
    lengths, prompts = lengths[: len(lengths) - (lengths[-1] == 0)], prompts[: len(lengths) - (lengths[-1] == 0)]
    inputs = tensors(sum(lengths), groups=groups, dtype=torch.float32)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    rules = {"sink_h": SINKS.clone().requires_grad_()} if sinks else {}
    exact = {name: sink.detach().double().requires_grad_() for name, sink in rules.items()}
    got = on_stand_in(inputs, Segments(lengths=lengths, prompts=prompts), **rules)
    want = results(None, wide, Segments(lengths=lengths, prompts=prompts), **exact)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bf16_is_as_good_as_plain_torch() -> None:
    """Catches parts that are merged in bf16."""
    segments = Segments(lengths=[40, 30, 1, 50, 25], prompts=[-1, 0, 0, 0, -1])
    inputs = tensors(sum(segments.lengths), groups=2, dtype=torch.bfloat16)
    exact = results(None, [tensor.detach().double().requires_grad_() for tensor in inputs], segments)
    plain = results("sdpa", inputs, segments)
    got = on_stand_in(inputs, segments)
    for one, other, truth in zip(got, plain, exact, strict=True):
        assert (one - truth).norm() <= 1.3 * (other - truth).norm()


@pytest.mark.parametrize("prompts", [[-1, 0, 0, -1], [-1, -1, -1, -1]])
def test_the_operators_take_these_arguments(prompts: list[int]) -> None:
    """Catches an argument that this version of torch puts elsewhere, and results of other shapes than they are taken
    for (of the log-sum-exp above all): torch's own operators, on tensors without numbers."""
    segments = Segments(lengths=[5, 3, 4, 2], prompts=prompts)
    shapes = [(14, 1, heads, HEAD) for heads in (4, 2, 2)]
    query, key, value = (torch.empty(shape, device="meta", requires_grad=True) for shape in shapes)
    out = merged_gpu.merged_attention(query, key, value, segments, scale=0.5)
    assert out.shape == query.shape
    grads = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]
    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert names[3:11] == [
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
        "return_debug_mask",
        "scale",
    ]


def test_borders_are_made_once() -> None:
    """Catches borders that every layer computes and copies to the device again."""
    segments, device = Segments(lengths=[5, 3, 4, 2], prompts=[-1, 0, 0, -1]), torch.device("cpu")
    assert segments.borders(device) is segments.borders(device)
    shared = segments.shared_borders(device)
    assert shared is segments.shared_borders(device)
    assert shared is not None
    assert shared.query_N.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert shared.key_M.tolist() == [0, 1, 2, 3, 4]
    assert (shared.queries.longest, shared.keys.longest) == (7, 5)
