"""KL(pi_ref || pi) of whole responses from numbers per response, by enumerating every text of a tiny language model."""

import dataclasses

import pytest
import torch

from tests.objectives.batches import Make, gradient, losses_of, objective

END, LONGEST = 2, 3
"""Vocabulary 0, 1, END; a text ends with END or at three tokens."""


def texts(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if len(prefix) == LONGEST or prefix[-1:] == (END,):
        return [prefix]
    return [text for token in range(3) for text in texts((*prefix, token))]


TEXTS = texts()
PREFIXES = sorted({text[:n] for text in TEXTS for n in range(len(text))})


def log_probs(logits_PV: torch.Tensor) -> torch.Tensor:
    """Of every text under the model whose next-token logits after each prefix are the rows. Returns [len(TEXTS)]."""
    steps_PV = logits_PV.log_softmax(dim=1)
    return torch.stack([sum(steps_PV[PREFIXES.index(y[:t]), y[t]] for t in range(len(y))) for y in TEXTS])


def token_kls(logits_PV: torch.Tensor, ref_PV: torch.Tensor) -> torch.Tensor:
    """Sum over each text's positions of the KL over the vocabulary. Returns [len(TEXTS)]."""
    p_PV, q_PV = ref_PV.log_softmax(dim=1), logits_PV.log_softmax(dim=1)
    kl_P = (p_PV.exp() * (p_PV - q_PV)).sum(dim=1)
    return torch.stack([sum(kl_P[PREFIXES.index(y[:t])] for t in range(len(y))) for y in TEXTS])


def expected(make: Make, logits_PV: torch.Tensor, ref_PV: torch.Tensor, *, estimator: str) -> torch.Tensor:
    """Mean of the KL term over all groups of two texts drawn from the reference."""
    kl_only = dataclasses.replace(objective("expo", kl_weight=1.0, kl_estimator=estimator), terms=())
    i_G, j_G = torch.cartesian_prod(*[torch.arange(len(TEXTS))] * 2).unbind(dim=1)
    chance_S = log_probs(ref_PV).exp()

    def both(values_S: torch.Tensor) -> torch.Tensor:
        return torch.stack([values_S[i_G], values_S[j_G]], dim=1)

    batch = make(both(log_probs(logits_PV)), token_kl=both(token_kls(logits_PV, ref_PV)), reward=[[1.0, 0.0]] * 225)
    return (kl_only(batch)[0] * chance_S[i_G] * chance_S[j_G]).sum()


def test_both_estimators_are_the_kl_of_texts(make: Make) -> None:
    """A token KL averaged over tokens, or of the wrong direction: KL(pi_ref || pi) = E_ref sum_t KL_t exactly. The
    estimator by samples is larger by the reference's entropy, and both have the gradient of the KL."""
    generator = torch.Generator().manual_seed(0)
    ref_PV, logits_PV = torch.randn(2, len(PREFIXES), 3, generator=generator, dtype=torch.float64)
    logits_PV.requires_grad_()
    log_p, log_q = log_probs(ref_PV), log_probs(logits_PV)
    assert len(TEXTS) == 15
    assert log_p.exp().sum().item() == pytest.approx(1.0)
    kl, entropy = (log_p.exp() * (log_p - log_q)).sum(), -(log_p.exp() * log_p).sum()
    slope = torch.autograd.grad(kl, logits_PV)[0]
    for estimator, value in (("token", kl), ("sample", kl + entropy)):
        found = expected(make, logits_PV, ref_PV, estimator=estimator)
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(torch.autograd.grad(found, logits_PV)[0], slope)


@pytest.mark.parametrize("estimator", ["token", "sample"])
def test_other_models_responses_are_no_samples(make: Make, estimator: str) -> None:
    """kl_samples=own that counts other models' responses, divides by all, or gives NaN where there is no own one."""
    method = objective("expo", kl_weight=2.0, kl_estimator=estimator, kl_samples="own")
    plain = objective("expo", kl_weight=0.0)
    batch = make(
        [[-1.0, -2.0, -4.0], [-1.0, -2.0, -4.0]],
        token_kl=[[0.5, 0.25, 3.0], [1.0, 2.0, 3.0]],
        reward=[[0.0, 2.0, 1.0]] * 2,
        source=[[False, True, False], [True, True, True]],
        valid=[[True, True, True], [True, True, False]],
    )
    term = losses_of(method, batch) - losses_of(plain, batch)
    assert term.tolist() == pytest.approx([2 * 1.75 if estimator == "token" else 2 * 2.5, 0.0])
    every = losses_of(objective("expo", kl_weight=2.0, kl_estimator=estimator), batch) - losses_of(plain, batch)
    assert every.tolist() == pytest.approx([2.5, 3.0] if estimator == "token" else [14 / 3, 3.0])


def test_kl_of_groups_without_a_pair(make: Make) -> None:
    """A regulariser that is lost where the rewards tie: it needs no preference. Padding has none."""
    kl = [[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]]
    valid = [[True, True, False], [True, False, False], [False] * 3]
    batch = make([[-1.0] * 3] * 3, token_kl=kl, reward=[[1.0] * 3] * 3, valid=valid)
    loss, slope = gradient(objective("expo", kl_weight=2.0), batch, "token_kl_GK")
    assert loss.tolist() == [3.0, 8.0, 0.0]
    assert slope.tolist() == [[1.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0] * 3]
