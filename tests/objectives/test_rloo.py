"""RPO's K-way distances as online learning: RLOO by exact enumeration, gradients through the objective, optima."""

import dataclasses
from collections.abc import Callable
from itertools import product

import pytest
import torch

from tests.objectives.batches import (
    Make,
    Population,
    every_arm,
    fp64,
    gradient,
    labelled_pairs,
    losses_of,
    minimise,
    objective,
    random_batch,
    with_columns,
)

REFERENCE = fp64([0.5, 0.2, 0.3])
REWARD = fp64([1.0, -0.5, 0.3])


def tuples_of_arms(policy_A: torch.Tensor, k: int) -> Population:
    """Every outcome of K independent samples of the policy, with its probability."""
    arms_GK = torch.tensor(list(product(range(len(policy_A)), repeat=k)))
    return Population(arms_GK=arms_GK, weight_G=policy_A[arms_GK].prod(dim=1))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_sqloo_is_rloo_for_every_sample(make: Make, k: int) -> None:
    """Identity 11: with R = eta r - beta rho and A_k = R_k - mean_{j != k} R_j, the gradient by log pi(y_k) is
    -beta K^2/(K-1) A_k / K, and that of `rloo` RLOO's own -A_k / K with eta = 1."""
    beta, eta = 0.3, 1.5
    batch = random_batch(make, k, 5, k, ragged=False)
    for method, scale, factor in (
        (objective("rpo_sqloo", beta=beta, eta=eta), eta, beta * k**2 / (k - 1)),
        (objective("rloo", beta=beta), 1.0, 1.0),
    ):
        returns = scale * batch.reward_GK - beta * (batch.logp_GK - batch.ref_logp_GK)
        advantage = returns - (returns.sum(-1, keepdim=True) - returns) / (k - 1)
        torch.testing.assert_close(gradient(method, batch)[1], -factor * advantage / k)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_expected_gradient_is_that_of_the_return(make: Make, k: int) -> None:
    """A biased baseline, or a gradient through the samples: over all draws of K responses from the policy the mean
    gradient of `rloo` is -grad J, J = E r - beta KL(pi || pi_ref); of rpo_sqloo -beta K^2/(K-1) grad J with eta r."""
    beta, eta = 0.3, 1.5
    logits = fp64([0.2, -0.3, 0.5]).requires_grad_()
    policy = logits.softmax(dim=0)

    def slope_of_return(scale: float) -> torch.Tensor:
        kl = (policy * (policy.log() - REFERENCE.log())).sum()
        value = (policy * scale * REWARD).sum() - beta * kl
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    population = tuples_of_arms(policy.detach(), k)
    for method, expected in (
        (objective("rloo", beta=beta), -slope_of_return(1.0)),
        (objective("rpo_sqloo", beta=beta, eta=eta), -beta * k**2 / (k - 1) * slope_of_return(eta)),
    ):
        batch = population.batch(make, logits, ref_A=REFERENCE, reward_A=REWARD)
        loss = (method(batch)[0] * population.weight_G).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_slopes_are_beta_times_the_scales(make: Make) -> None:
    """A beta that is lost or squared on the way from S_k = dD/da_k to the model (Eq. 8), and scales that do not sum to
    0: golden S of four responses, a = beta rho, b = eta r."""
    a, b = fp64([[0.3, -1.2, 0.8, 0.05]]), fp64([[1.0, -0.5, 0.2, 2.0]])
    batch = make(a / 0.1 - 30, ref=torch.full((1, 4), -30.0), reward=b / 2)
    golden = {
        "rpo_bwd": [0.04617166329, 0.01030229062, 0.3492881908, -0.4057621447],
        "rpo_fwd": [-0.08777772279, -0.01958585734, 0.4423898863, -0.3350263062],
        "rpo_sqloo": [-0.02222222222, -0.02222222222, 2.288888889, -2.244444444],
    }
    for method, scales in golden.items():
        slope = gradient(objective(method, beta=0.1, eta=2.0), batch)[1][0]
        assert slope.tolist() == pytest.approx([0.1 * scale for scale in scales], rel=1e-8)
        assert slope.sum().abs() < 1e-12


def test_scales_of_bwd_are_bounded(make: Make) -> None:
    """Why online RPO-bwd is stable where RLOO is not: |S_k| <= 1 and sum |S_k| <= 2 at any reward; sqloo's grow."""
    batch = random_batch(make, 0, 20, 5)
    huge = with_columns(batch, reward_GK=1e4 * batch.reward_GK)
    scales = gradient(objective("rpo_bwd", beta=0.5), huge)[1] / 0.5
    assert scales.abs().max() <= 1
    assert scales.abs().sum(dim=1).max() <= 2 + 1e-12
    assert gradient(objective("rpo_sqloo", beta=0.5), huge)[1].abs().max() > 1e3


def test_eta_of_sqloo_is_redundant(make: Make) -> None:
    """Identity 5: sqloo(beta rho, eta r) = eta^2 sqloo(beta/eta rho, r), and no such thing for bwd."""
    batch = random_batch(make, 0, 6, 4)
    scaled, unscaled = objective("rpo_sqloo", beta=0.6, eta=3.0), objective("rpo_sqloo", beta=0.2, eta=1.0)
    torch.testing.assert_close(losses_of(scaled, batch), 9 * losses_of(unscaled, batch))
    bwd = [losses_of(objective("rpo_bwd", beta=beta, eta=eta), batch) for beta, eta in ((0.6, 3.0), (0.2, 1.0))]
    assert not torch.allclose(bwd[0], 9 * bwd[1], rtol=0.1)


@pytest.mark.parametrize(
    ("method", "knobs", "temperature"),
    [
        ("rpo_bwd", {"beta": 0.5, "eta": 2.0}, 4.0),
        ("rpo_fwd", {"beta": 0.5, "eta": 2.0}, 4.0),
        ("rpo_sqloo", {"beta": 0.5, "eta": 2.0}, 4.0),
        ("rpo_sq", {"beta": 0.5, "eta": 2.0, "pair": "all_pairs"}, 4.0),
        ("rloo", {"beta": 0.5}, 2.0),
        ("distill_dpo", {"beta": 0.5}, 2.0),
        ("rebel", {"eta": 3.0}, 3.0),
        ("rebel", {"eta": 3.0, "pair": "all_pairs"}, 3.0),
        ("brain", {"eta": 1.5}, 1.5),
    ],
)
def test_optimum_with_all_responses(make: Make, method: str, knobs: dict[str, float], temperature: float) -> None:
    """Identity 8: whatever the distance, the policy goes to pi_ref exp(eta r / beta) / Z; only beta / eta moves it. A
    method that sees the best and a random other response sees every arm here too, over the draws."""
    policy = REFERENCE * (temperature * REWARD).exp()
    population = every_arm(3)
    if method == "rebel" and "pair" not in knobs:  # two draws that choose each of the two opponents
        population = Population(arms_GK=torch.arange(3).repeat(2, 1), weight_G=fp64([1.0, 1.0]))
        population = dataclasses.replace(population, columns={"draw": [0.0, 0.9]})
    found = population.minimiser(make, objective(method, **knobs), ref_A=REFERENCE, reward_A=REWARD)
    torch.testing.assert_close(found, policy / policy.sum(), rtol=0, atol=1e-6)


def test_optimum_of_win_probabilities(make: Make) -> None:
    """dno's optimum is pi_ref exp(eta w / beta) / Z with w the mean win probability over the other responses."""
    wins = torch.sigmoid(2 * (REWARD[:, None] - REWARD[None, :])).fill_diagonal_(0).sum(dim=1) / 2
    policy = REFERENCE * (4.0 * wins).exp()
    method = objective("dno", beta=0.5, eta=2.0, win_scale=2.0)
    found = every_arm(3).minimiser(make, method, ref_A=REFERENCE, reward_A=REWARD)
    torch.testing.assert_close(found, policy / policy.sum(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reference", [[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]])
def test_steerlm_learns_the_posterior(make: Make, reference: list[float]) -> None:
    """SteerLM 2.0's optimum is P(y|a, x), proportional to P(a|y,x) P(y|x), whatever Q' the responses came from."""
    attribute, prior = fp64([0.9, 0.2, 0.4]), fp64([0.2, 0.5, 0.3])
    columns = torch.stack([attribute.log(), prior.log()], dim=1)[None]
    population = dataclasses.replace(every_arm(3), columns={"rewards": columns, "reward": [[0.0] * 3]})
    found = population.minimiser(make, objective("steerlm2"), ref_A=fp64(reference))
    torch.testing.assert_close(found, attribute * prior / (attribute * prior).sum(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ("cdpo", lambda better: 10 * torch.logit(better)),  # beta d* = logit(1 - e), for better = 1 - e
        ("exo_pair", lambda better: 10 * torch.logit(better)),
        ("ipo", lambda better: torch.full_like(better, 5.0)),  # 1 / (2 beta)
    ],
)
def test_optimal_margins_of_pairs(make: Make, method: str, limit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A pair method that stops at another margin than its target (beta = .1, e = .2), or does not stop."""
    knobs = {} if method == "ipo" else {"label_smoothing": 0.2}
    ours = objective(method, beta=0.1, **knobs)

    def loss(margin: torch.Tensor) -> torch.Tensor:
        batch = make(torch.stack([margin[0] - 3.0, margin[0] * 0 - 2.0])[None], ref=[[-3.0, -2.0]], reward=[[1.0, 0.0]])
        return ours(batch)[0].sum()

    found = minimise(loss, torch.tensor([1.0]))
    torch.testing.assert_close(found, limit(fp64([0.8])), rtol=1e-5, atol=0)


def test_noise_that_label_smoothing_assumes(make: Make) -> None:
    """Robust DPO on labels of which a share e is flipped has the optimum of dpo on clean ones; dpo itself has not."""
    clean = fp64([0.6, 0.3, 0.1])
    population = labelled_pairs(clean)
    i_G, j_G = population.arms_GK.unbind(dim=1)
    share_G = clean[i_G] / (clean[i_G] + clean[j_G])
    noisy = dataclasses.replace(population, weight_G=(0.8 * share_G + 0.2 * (1 - share_G)) / 3)
    expected = population.minimiser(make, objective("dpo", beta=0.5), ref_A=REFERENCE)
    robust = noisy.minimiser(make, objective("robust_dpo", beta=0.5, label_smoothing=0.2), ref_A=REFERENCE)
    plain = noisy.minimiser(make, objective("dpo", beta=0.5), ref_A=REFERENCE)
    torch.testing.assert_close(robust, expected, rtol=0, atol=1e-6)
    assert (plain - expected).abs().max() > 0.05
