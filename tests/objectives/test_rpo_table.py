"""Table 1 of the RPO paper (arXiv 2502.00203), and the mappings that it does not print: every method is a distance.

Each test writes the method's own formula for pairs of margin delta = rho_1 - rho_2 (1 the better one) in plain torch,
and compares loss and gradient.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from rpo_megatron.objectives.distances import backward_kl, forward_kl, squared, squared_loo
from rpo_megatron.objectives.objective import Objective
from tests.objectives.batches import (
    Batch,
    Make,
    assert_same,
    fp64,
    gradient,
    losses_of,
    objective,
    random_batch,
    with_columns,
)

BETA = 0.3
PAIRS = torch.ones(8, 2, dtype=torch.bool)


@pytest.fixture
def pairs(make: Make) -> Batch:
    """Eight pairs with unequal rewards; the better response stands first in some and second in others."""
    batch = random_batch(make, 6, 8, 2, ragged=False)
    reward = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.25], [-1.0, 3.0]] * 2)
    return with_columns(batch, reward_GK=reward.double())


def better_first(batch: Batch, values_GK: torch.Tensor) -> torch.Tensor:
    """[G, 2] with the better response in column 0."""
    return values_GK.gather(1, batch.reward_GK.argsort(dim=1, descending=True))


def margin(batch: Batch, values_GK: torch.Tensor) -> torch.Tensor:
    first_G, second_G = better_first(batch, values_GK).unbind(dim=1)
    return first_G - second_G


def delta(batch: Batch) -> torch.Tensor:
    return margin(batch, batch.logp_GK - batch.ref_logp_GK)


def logits(margin_G: torch.Tensor) -> torch.Tensor:
    """Two scores with this margin."""
    return torch.stack([margin_G, torch.zeros_like(margin_G)], dim=1)


def same(method: Objective, batch: Batch, formula: Callable[[Batch], torch.Tensor]) -> None:
    """Loss [G] and gradient by the log-probabilities."""
    leaf = batch.logp_GK.clone().requires_grad_()
    expected = formula(with_columns(batch, logp_GK=leaf))
    slope = torch.autograd.grad(expected.sum(), leaf)[0]
    found, found_slope = gradient(method, batch)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found_slope, slope, rtol=1e-10, atol=1e-12)


def infinite(batch: Batch) -> torch.Tensor:
    return fp64([[0.0, -math.inf]]).expand(len(batch.valid_GK), 2)


def test_dpo(pairs: Batch) -> None:
    """A sign, beta, or the wrong winner: -log sigmoid(beta delta), D^bwd with an infinite target."""
    same(objective("dpo", beta=BETA), pairs, lambda b: -F.logsigmoid(BETA * delta(b)))
    same(objective("dpo", beta=BETA), pairs, lambda b: backward_kl(logits(BETA * delta(b)), infinite(b), PAIRS))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_conservative_dpo(pairs: Batch, noise: float) -> None:
    """c and 1 - c exchanged: D^bwd at delta* = logit(c) plus the label's entropy, so with the same gradient."""
    c = 1 - noise
    method = objective("cdpo", beta=BETA, label_smoothing=noise)
    same(method, pairs, lambda b: -c * F.logsigmoid(BETA * delta(b)) - noise * F.logsigmoid(-BETA * delta(b)))
    if noise:
        target = logits(fp64([math.log(c / noise)] * 8))
        entropy = -c * math.log(c) - noise * math.log(noise)
        same(method, pairs, lambda b: backward_kl(logits(BETA * delta(b)), target, PAIRS) + entropy)


def test_ipo(pairs: Batch) -> None:
    """The factor 2 / beta^2 to D^sq, on which learning rates depend."""
    target = logits(fp64([0.5] * 8))
    same(objective("ipo", beta=BETA), pairs, lambda b: (delta(b) - 1 / (2 * BETA)).square())
    same(objective("ipo", beta=BETA), pairs, lambda b: 2 / BETA**2 * squared(logits(BETA * delta(b)), target, PAIRS))


def test_distilled_dpo(pairs: Batch) -> None:
    """The factor 2 between Fisch's square, sqloo for a pair and the paper's D^sq (NeMo-Aligner's rpo_sq is Fisch's)."""
    same(objective("distill_dpo", beta=BETA), pairs, lambda b: (BETA * delta(b) - margin(b, b.reward_GK)).square())
    fisch = gradient(objective("distill_dpo", beta=BETA), pairs)
    for method, factor in (("rpo_sqloo", 1.0), ("rpo_sq", 2.0)):
        for ours, theirs in zip(gradient(objective(method, beta=BETA, eta=1.0), pairs), fisch, strict=True):
            torch.testing.assert_close(factor * ours, theirs)


def test_simpo(pairs: Batch) -> None:
    """Sums for means, a margin with the wrong sign: D^bwd[beta (m_1 - m_2) - gamma || inf]. The paper's mapping with
    log pi_ref proportional to |y| is no equality: slopes here are in the ratio of the lengths and do not sum to 0."""

    def a(batch: Batch) -> torch.Tensor:
        return margin(batch, 2.5 * batch.logp_GK / batch.length_GK) - 0.7

    same(objective("simpo", beta=2.5, gamma=0.7), pairs, lambda b: -F.logsigmoid(a(b)))
    same(objective("simpo", beta=2.5, gamma=0.7), pairs, lambda b: backward_kl(logits(a(b)), infinite(b), PAIRS))
    slopes = better_first(pairs, gradient(objective("simpo", beta=2.5, gamma=0.7), pairs)[1])
    length = better_first(pairs, pairs.length_GK)
    torch.testing.assert_close(-slopes[:, 0] / slopes[:, 1], length[:, 1] / length[:, 0].double())
    assert slopes.sum(dim=1).abs().min() > 1e-4


def test_brain(pairs: Batch) -> None:
    """BRAIn Eq. 22, sum_k alpha_k log(alpha_k / beta_k), self-normalised: D^bwd with beta = eta = 1 (Theorem C.1)."""

    def formula(batch: Batch) -> torch.Tensor:
        alpha = batch.reward_GK.exp() / batch.reward_GK.exp().sum(dim=1, keepdim=True)
        weight = (batch.logp_GK - batch.ref_logp_GK).exp()
        return (alpha * (alpha / (weight / weight.sum(dim=1, keepdim=True))).log()).sum(dim=1)

    same(objective("brain"), pairs, formula)
    assert_same(objective("brain", eta=4.0), objective("rpo_bwd", beta=1.0, eta=4.0), pairs)


def test_dno(make: Make) -> None:
    """A response that plays against itself or against padding, or a sum of wins: rpo_bwd on mean win probabilities."""
    batch = random_batch(make, 2, 5, 4)
    wins = torch.zeros(5, 4, dtype=torch.float64)
    for g in range(5):
        own = batch.valid_GK[g].nonzero().flatten().tolist()
        for k in own:
            others = [1 / (1 + math.exp(-0.7 * (batch.reward_GK[g, k] - batch.reward_GK[g, j]))) for j in own if j != k]
            wins[g, k] = sum(others) / max(len(others), 1)
    dno = objective("dno", beta=BETA, eta=5.0, win_scale=0.7)
    assert_same(dno, objective("rpo_bwd", beta=BETA, eta=5.0), batch, with_columns(batch, reward_GK=wins))


def test_steerlm2(make: Make) -> None:
    """Eq. 11 with the reference counted once or not at all: rpo_bwd, beta = eta = 1, of log P(a|y,x) + log P(y|x) -
    log Q', the columns' sum and not their mean."""
    batch = random_batch(make, 2, 5, 4)
    reward = batch.rewards_GKM[..., 0] + batch.rewards_GKM[..., 1] + batch.rewards_GKM[..., 2] - batch.ref_logp_GK
    bwd = objective("rpo_bwd", beta=1.0, eta=1.0)
    assert_same(objective("steerlm2"), bwd, batch, with_columns(batch, reward_GK=reward))


@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_exo(pairs: Batch, noise: float) -> None:
    """The backward divergence, or the smoothed label on the wrong side, in TRL's form of EXO: D^fwd[beta delta ||
    logit(1 - noise)]."""

    def trl(batch: Batch) -> torch.Tensor:
        z = BETA * delta(batch)
        better = z.sigmoid() * (F.logsigmoid(z) - math.log(1 - noise))
        return better + (-z).sigmoid() * (F.logsigmoid(-z) - math.log(noise))

    target = logits(fp64([math.log((1 - noise) / noise)] * 8))
    method = objective("exo_pair", beta=BETA, label_smoothing=noise)
    same(method, pairs, trl)
    same(method, pairs, lambda b: forward_kl(logits(BETA * delta(b)), target, PAIRS))


def test_robust_dpo_is_unbiased(pairs: Batch) -> None:
    """A wrong correction: the mean over flipped labels (share e) of robust DPO is (1 - 2e) dpo on clean ones, over
    (1 - 2e); its form here is dpo - e / (1 - 2e) beta delta, and e = 0 is dpo."""
    noise = 0.2
    method = objective("robust_dpo", beta=BETA, label_smoothing=noise)
    odds = noise / (1 - 2 * noise)
    same(method, pairs, lambda b: -F.logsigmoid(BETA * delta(b)) - odds * BETA * delta(b))
    flipped = with_columns(pairs, reward_GK=-pairs.reward_GK)
    mean = (1 - noise) * losses_of(method, pairs) + noise * losses_of(method, flipped)
    torch.testing.assert_close(mean, losses_of(objective("dpo", beta=BETA), pairs))
    zero = losses_of(objective("robust_dpo", beta=BETA, label_smoothing=0.0), pairs)
    torch.testing.assert_close(zero, losses_of(objective("dpo", beta=BETA), pairs))


def test_rebel(pairs: Batch) -> None:
    """REBEL with its 1/eta on the wrong side: eta^2 (1/eta delta - (r_1 - r_2))^2, that is eta^2 sqloo with
    beta = 1/eta."""
    eta = 0.4
    reward = lambda b: margin(b, b.reward_GK)  # noqa: E731
    same(objective("rebel", eta=eta), pairs, lambda b: eta**2 * (delta(b) / eta - reward(b)).square())
    same(
        objective("rebel", eta=eta),
        pairs,
        lambda b: eta**2 * squared_loo(logits(delta(b) / eta), logits(reward(b)), PAIRS),
    )


def test_hinge(pairs: Batch) -> None:
    """SLiC's margin of 1 in nats of beta delta; both sides of the kink occur."""
    found = losses_of(objective("hinge", beta=BETA), pairs)
    assert (found == 0).any()
    assert (found > 1).any()
    same(objective("hinge", beta=BETA), pairs, lambda b: torch.relu(1 - BETA * delta(b)))


def test_golden_pair(make: Make) -> None:
    """Numbers of other implementations at delta = 1.7, beta = .1."""
    batch = make([[-12.0, -20.0]], ref=[[-14.2, -20.5]], reward=[[3.0, 1.0]])
    golden = {"hinge": 0.83, "robust_dpo": 0.5905053389, "exo_pair": 0.4212673179}
    for method, loss in golden.items():
        knobs = {} if method == "hinge" else {"label_smoothing": 0.1}
        assert losses_of(objective(method, beta=0.1, **knobs), batch).item() == pytest.approx(loss, rel=1e-9)
    half = with_columns(batch, reward_GK=torch.tensor([[1.5, 1.0]]))
    assert losses_of(objective("distill_dpo", beta=0.1), half).item() == pytest.approx(0.1089)
    assert losses_of(objective("rebel", eta=10.0), half).item() == pytest.approx(10.89)  # ipo's, tau = .1
