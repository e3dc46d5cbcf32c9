"""EXPO (arXiv 2506.07492) on a bandit of three arms, and what DPO and IPO do there instead: population minimisers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.batches import (
    Make,
    assert_same,
    fp64,
    gradient,
    labelled_pairs,
    losses_of,
    objective,
    random_batch,
    with_columns,
)

OPTIMAL = fp64([0.6, 0.3, 0.1])
REFERENCE = fp64([0.4, 0.4, 0.2])


def minimiser(make: Make, method: str, *, ref: torch.Tensor = REFERENCE, **knobs: Any) -> torch.Tensor:
    """Where training on infinitely many pairs of random arms, labelled by OPTIMAL (Bradley-Terry), ends."""
    return labelled_pairs(OPTIMAL).minimiser(make, objective(method, **knobs), ref_A=ref)


def close(found: torch.Tensor, expected: Any, *, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected).double(), rtol=0, atol=atol)


def normalised(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("weight", "policy"),
    [
        (0.01, [0.5922, 0.3054, 0.1025]),
        (0.1, [0.5438, 0.3370, 0.1193]),
        (1.0, [0.4442, 0.3869, 0.1689]),
        (10.0, [0.4057, 0.3986, 0.1956]),
    ],
)
def test_population_minimisers(make: Make, weight: float, policy: list[float]) -> None:
    """A supervised term with beta, reference or length in it, a reverse KL, or a KL averaged over arms. The numbers are
    those of a supervised term averaged over ordered pairs, of which only the labelled one counts: half of ours."""
    close(minimiser(make, "expo", kl_weight=2 * weight), policy, atol=6e-5)


def test_minimiser_is_stationary_by_hand(make: Make) -> None:
    """A minimiser that L-BFGS did not reach: for softplus terms and forward KL the slope in logit k is
    sum_j (pi_k/(pi_k + pi_j) - t_k/(t_k + t_j)) / 3 + weight (pi_k - ref_k)."""
    policy = minimiser(make, "expo", kl_weight=0.5)
    slope = 0.5 * (policy - REFERENCE)
    for k in range(3):
        for j in {0, 1, 2} - {k}:
            slope[k] += (policy[k] / (policy[k] + policy[j]) - OPTIMAL[k] / (OPTIMAL[k] + OPTIMAL[j])) / 3
    close(slope, [0.0] * 3, atol=1e-8)


@pytest.mark.parametrize("method", ["expo", "expo_reg_ours"])
def test_strong_interpolation(make: Make, method: str) -> None:
    """Limits that are not the optimal policy (weight -> 0) and the reference (weight -> inf)."""
    close(minimiser(make, method, kl_weight=1e-8), OPTIMAL)
    close(minimiser(make, method, kl_weight=1e7), REFERENCE)


@pytest.mark.parametrize("method", ["expo", "expo_reg_ours"])
@pytest.mark.parametrize("weight", [1e-3, 0.1, 1.0, 30.0])
def test_preservation(make: Make, method: str, weight: float) -> None:
    """A method that moves away from a reference that is optimal already, at any weight."""
    close(minimiser(make, method, ref=OPTIMAL, kl_weight=weight), OPTIMAL)


@pytest.mark.parametrize("beta", [1.0, 0.2])
def test_dpo_sharpens(make: Make, beta: float) -> None:
    """DPO's minimiser is pi_ref pi*^(1/beta) / Z: it does not preserve, and for small beta it is a point mass."""
    golden = {1.0: [0.6316, 0.3158, 0.0526], 0.2: [0.9696, 0.0303, 0.0001]}[beta]
    found = minimiser(make, "dpo", beta=beta)
    close(found, golden, atol=6e-5)
    close(found, normalised(REFERENCE * OPTIMAL ** (1 / beta)))
    away = minimiser(make, "dpo", ref=OPTIMAL, beta=beta)
    assert (away - OPTIMAL).abs().max() > 0.1


@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_ipo_follows_the_mean_preference(make: Make, tau: float) -> None:
    """IPO's minimiser is pi_ref exp(p*(y beats mu) / tau) / Z, mu uniform and 1/2 against itself."""
    wins = (OPTIMAL[:, None] / (OPTIMAL[:, None] + OPTIMAL[None, :])).mean(dim=1)
    close(minimiser(make, "ipo", beta=tau), normalised(REFERENCE * (wins / tau).exp()))


def test_one_group_by_hand(make: Make) -> None:
    """softplus(log pi(y_2) - log pi(y_1)) of the pair, and the weight times the mean KL of all three responses."""
    batch = make([[-7.0, -8.5, -9.0]], token_kl=[[0.5, 0.25, 3.0]], reward=[[0.0, 2.0, 1.0]], length=[[3, 2, 1]])
    loss = losses_of(objective("expo", kl_weight=0.2, pair="best_worst"), batch).item()
    assert loss == pytest.approx(math.log1p(math.exp(8.5 - 7.0)) + 0.2 * 3.75 / 3, rel=1e-12)


def test_supervised_term_is_dpo_without_reference(make: Make) -> None:
    """Length normalisation or beta in the supervised term: it is DPO with beta = 1 and a flat reference."""
    batch = random_batch(make, 1, 6, 4)
    flat = with_columns(batch, ref_logp_GK=torch.zeros(6, 4))
    assert_same(objective("expo", kl_weight=0.0), objective("dpo", beta=1.0), batch, flat)


def test_kl_of_the_official_code_is_ours_over_the_number_of_arms(make: Make) -> None:
    """Runs copied from the authors' bandit code with another effective weight: F.kl_div averages over actions."""
    logits = fp64([0.3, -0.4, 1.0])
    population = labelled_pairs(OPTIMAL)
    batch = population.batch(make, logits, ref_A=REFERENCE)
    expo, plain = (losses_of(objective("expo", kl_weight=weight), batch) for weight in (3.0, 0.0))
    official = F.kl_div(logits.log_softmax(0), REFERENCE.log(), log_target=True, reduction="mean")
    torch.testing.assert_close(expo - plain, (3 * 3.0 * official).expand(6))


def test_regression_form_by_hand(make: Make) -> None:
    """(p - 1)^2 + w (p - p_ref)^2 with p = sigmoid(-1), p_ref = sigmoid(2), and its slope 2 p (1 - p) (p - 1 + ...)."""
    p, p_ref = 1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(-2.0))
    batch = make([[-5.0, -6.0]], ref=[[-3.0, -1.0]], reward=[[0.0, 1.0]])
    loss, slope = gradient(objective("expo_reg_ours", kl_weight=0.3), batch)
    assert loss.item() == pytest.approx((p - 1) ** 2 + 0.3 * (p - p_ref) ** 2, rel=1e-12)
    assert slope[0, 1].item() == pytest.approx(2 * p * (1 - p) * (p - 1 + 0.3 * (p - p_ref)), rel=1e-12)
