"""The token KL against plain torch in fp64: values and gradients, then through whole models."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model.scores import ReferenceTokens
from rpo_megatron.model.token_kl import token_kl
from rpo_megatron.model.vocab import VocabShard
from tests import tiny
from tests.model.rows import kl_loss, load, outcome, random_rows, with_reference
from tests.model.tiles import set_tile

WORDS = 13


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    start(ParallelConfig())
    yield
    stop()


def kl(policy: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
    """Of [hidden, weight] pairs; weights have 16 rows, of which 13 are words."""
    tp = start(ParallelConfig()).tp
    (hidden_NH, shard), (ref_hidden_NH, ref_shard) = (
        (hidden, VocabShard(weight_VH=weight, vocab_size=WORDS, tp=tp)) for hidden, weight in (policy, reference)
    )
    return token_kl(hidden_NH, shard, ReferenceTokens(hidden_NH=ref_hidden_NH, shard=ref_shard))


def oracle(policy: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
    """fp64, from the definition."""
    logp_NV, ref_logp_NV = (
        (hidden.double() @ weight[:WORDS].double().T).log_softmax(-1) for hidden, weight in (policy, reference)
    )
    return (ref_logp_NV.exp() * (ref_logp_NV - logp_NV)).sum(-1)


def pair(num_rows: int, hidden_size: int, *, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(num_rows, hidden_size, generator=generator) * scale
    weight_VH = torch.randn(16, hidden_size, generator=generator)  # padding rows that are not zero
    return [hidden_NH.requires_grad_(), weight_VH.requires_grad_()]


def gradients(kl_N: torch.Tensor, policy: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weight_N = 0.5 + torch.arange(len(kl_N), dtype=kl_N.dtype)
    return torch.autograd.grad((weight_N * kl_N).sum(), policy)


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(0, 9),
    tile=st.tuples(st.integers(1, 10), st.integers(1, 14)),
    ref_hidden=st.integers(1, 6),
    scale=st.sampled_from([1e-2, 1.0, 10.0]),
    seed=st.integers(0, 10),
)
def test_equals_the_definition(num_rows: int, tile: tuple[int, int], ref_hidden: int, scale: float, seed: int) -> None:
    """Catches rows or words lost or repeated where tiles do not divide them, parts merged wrongly, padding that takes
    part, a KL in the wrong direction, a gradient of the wrong sign or without the incoming one; the reference's hidden
    size is its own."""
    policy, reference = pair(num_rows, 4, seed=seed, scale=scale), pair(num_rows, ref_hidden, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, *tile, num_models=2)
        kl_N = kl(policy, reference)
        got = gradients(kl_N, policy)
    expected_N = oracle(policy, reference)
    assert kl_N.dtype == torch.float32
    torch.testing.assert_close(kl_N.double(), expected_N, rtol=1e-5, atol=2e-6)
    for gradient, want in zip(got, gradients(expected_N, policy), strict=True):
        torch.testing.assert_close(gradient, want.to(gradient.dtype), rtol=1e-4, atol=1e-5)
    assert not got[1][WORDS:].any()


def test_equal_models_give_zero_and_no_gradient() -> None:
    """Catches rounding noise at the start of training, where the policy is its reference: the two logits must go
    through the same operations."""
    policy = pair(50, 4, scale=5.0)
    kl_N = kl(policy, [tensor.detach().clone() for tensor in policy])
    assert not kl_N.any()
    assert not any(gradient.any() for gradient in gradients(kl_N, policy))


def test_small_kl_of_large_logits() -> None:
    """Catches cancellation: logits that share a large constant, as unnormalised logits may. A KL of about 1e-4 is to
    have three digits."""
    policy = pair(20, 4)
    moved = [policy[0].detach() + 0.01 * pair(20, 4, seed=3)[0].detach(), policy[1].detach()]
    for tensors, offset in ((policy, 300.0), (moved, -200.0)):
        column = torch.ones(20, 1), torch.full((16, 1), offset)
        tensors[:] = [torch.cat((t.detach(), c), dim=1).requires_grad_() for t, c in zip(tensors, column, strict=True)]
    kl_N = kl(policy, moved)
    assert 1e-5 < float(oracle(policy, moved).mean()) < 1e-3
    torch.testing.assert_close(kl_N.double().mean(), oracle(policy, moved).mean(), rtol=0.03, atol=0)


def test_reference_gets_no_gradient() -> None:
    """Catches a reference that is trained, or kept alive, through its KL."""
    policy, reference = pair(3, 4), pair(3, 5, seed=1)
    kl(policy, reference).sum().backward()
    assert reference[0].grad is reference[1].grad is None


def test_bf16_gradients_are_added_up_in_fp32() -> None:
    """Catches a gradient that autograd refuses, or tiles added up in bf16, where a sum stops growing once its terms
    are a hundredth of it: 1000 tiles of one row each, all of them alike."""
    policy = [tensor.detach().bfloat16() for tensor in pair(1, 4)]
    policy = [policy[0].expand(1000, 4).contiguous().requires_grad_(), policy[1].requires_grad_()]
    hidden_NH, weight_VH = pair(1, 4, seed=1)
    reference = [hidden_NH.detach().bfloat16().expand(1000, 4), weight_VH.detach().bfloat16()]
    expected = gradients(oracle(policy, reference), policy)
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, 1, 13, num_models=2)
        got = gradients(kl(policy, reference), policy)
    for gradient, want in zip(got, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - want.double()).norm() < 0.01 * want.norm()


def test_other_vocabulary_is_our_bug() -> None:
    """Catches distributions over different words being compared; a run refuses it before."""
    hidden_NH, weight_VH = pair(2, 4)
    shard = VocabShard(weight_VH=weight_VH, vocab_size=WORDS, tp=start(ParallelConfig()).tp)
    tokens = ReferenceTokens(hidden_NH=hidden_NH, shard=replace(shard, vocab_size=12))
    with pytest.raises(AssertionError):
        token_kl(hidden_NH, shard, tokens)


# ------------------------------------------------------------------------------------------------ through whole models


@pytest.mark.parametrize("tied", [False, True])
def test_model_gradients_equal_transformers(tmp_path: Path, tied: bool) -> None:
    """Catches a KL at positions shifted by one, the reference's rows in another order, an output weight that is not
    the tied one: the whole backward pass against two transformers models, of different sizes."""
    tiny.write_model(tmp_path / "policy", tie_word_embeddings=tied)
    tiny.write_model(tmp_path / "reference", seed=1, hidden_size=24, num_hidden_layers=2)
    groups = start(ParallelConfig())
    rows = random_rows(4)
    result = outcome(
        load(tmp_path / "policy", groups), with_reference(rows, load(tmp_path / "reference", groups)), kl_loss, groups
    )

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("policy", "reference")
    )
    kls = []
    for prompt, response in (c for packed in rows for group in packed.groups if group for c in group):
        tokens, at = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        logp, ref_logp = (m(tokens).logits[0, at].double().log_softmax(-1) for m in (policy, reference))
        kls.append((ref_logp.detach().exp() * (ref_logp.detach() - logp)).sum(-1))
    got = torch.cat([s.token_kl_N for s in result.scores if s.token_kl_N is not None])
    torch.testing.assert_close(got, torch.cat(kls).float(), rtol=1e-4, atol=1e-5)
    (torch.cat(kls).sum() / sum(len(packed.groups) for packed in rows[:-1])).backward()
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert result.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (result.gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name
