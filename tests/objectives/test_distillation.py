"""Reward model distillation (arXiv 2405.19316): one model, an ensemble's mean, and the pessimistic minimum."""

import dataclasses

import pytest
import torch

from tests.objectives.batches import (
    Batch,
    Make,
    assert_same,
    every_arm,
    fp64,
    gradient,
    losses_of,
    objective,
    random_batch,
    with_columns,
)

REFERENCE = fp64([0.5, 0.2, 0.3])
ENSEMBLE = fp64([[1.0, -0.5, 0.3], [0.2, 0.4, -0.1]])
BETA = 0.5


def member(batch: Batch, index: int) -> Batch:
    """The batch with one model of the ensemble as its reward."""
    return with_columns(batch, reward_GK=batch.rewards_GKM[..., index])


def optimum(reward_A: torch.Tensor) -> torch.Tensor:
    weights = REFERENCE * (reward_A / BETA).exp()
    return weights / weights.sum()


def forward_kl(policy_A: torch.Tensor) -> float:
    return (REFERENCE * (REFERENCE / policy_A).log()).sum().item()


def test_distillation_is_sqloo(make: Make) -> None:
    """An eta that is not 1, or a row that drifts from rpo_sqloo."""
    batch = random_batch(make, 0, 6, 4)
    assert_same(objective("distill_dpo", beta=0.3), objective("rpo_sqloo", beta=0.3, eta=1.0), batch)


@pytest.mark.parametrize("reward", ENSEMBLE)
def test_value_of_the_optimum_is_a_forward_kl(make: Make, reward: torch.Tensor) -> None:
    """Why pessimism is a forward KL (identity F1): the distilled policy pi_r maximises the advantage
    E_pi r - E_ref r - beta KL(pi || pi_ref), whose best value is beta KL(pi_ref || pi_r): what the anchor of the
    pessimistic row measures."""
    population = every_arm(3)
    policy = population.minimiser(make, objective("distill_dpo", beta=BETA), ref_A=REFERENCE, reward_A=reward)
    torch.testing.assert_close(policy, optimum(reward), rtol=0, atol=1e-7)
    kl = (policy * (policy / REFERENCE).log()).sum()
    value = (policy * reward).sum() - (REFERENCE * reward).sum() - BETA * kl
    assert value.item() == pytest.approx(BETA * forward_kl(policy), abs=1e-7)
    with_kl, without = (
        dataclasses.replace(objective("pessimistic_unconfirmed", kl_weight=weight), terms=()) for weight in (1.0, 1e-9)
    )
    population = dataclasses.replace(population, columns={"rewards": ENSEMBLE.T[None]})
    batch = population.batch(make, policy.log(), ref_A=REFERENCE, reward_A=reward)
    anchor = losses_of(with_kl, batch) - losses_of(without, batch)
    assert anchor.item() == pytest.approx(value.item() / BETA, abs=1e-6)


def test_mean_of_distillations_is_distillation_of_the_mean(make: Make) -> None:
    """Identity F3, mean_i (s_i - x)^2 = (mean s - x)^2 + Var s: the same gradient, and the variance as a constant."""
    batch = random_batch(make, 1, 6, 4)
    method = objective("distill_dpo", beta=0.3)
    mean = with_columns(batch, reward_GK=batch.rewards_GKM.mean(dim=2))
    loss, slope = gradient(method, mean)
    members = [gradient(method, member(batch, index)) for index in range(3)]
    torch.testing.assert_close(torch.stack([slope_i for _, slope_i in members]).mean(dim=0), slope)
    excess = torch.stack([loss_i for loss_i, _ in members]).mean(dim=0) - loss
    at_mean = with_columns(mean, logp_GK=mean.reward_GK / 0.3, ref_logp_GK=torch.zeros(6, 4))  # a = mean s
    variance = torch.stack([losses_of(method, member(at_mean, index)) for index in range(3)]).mean(dim=0)
    torch.testing.assert_close(excess, variance)


def test_pessimism_takes_the_least_per_group(make: Make) -> None:
    """A minimum over the micro-batch, a mean or a maximum; the gradient of a member that was not chosen; one of the
    three columns that is left out. The minimum is at most every member and at least once below each."""
    batch = random_batch(make, 2, 12, 4)
    pessimistic = objective("pessimistic_unconfirmed", beta=0.3, kl_weight=0.0)
    loss, slope = gradient(pessimistic, batch)
    members = [gradient(objective("distill_dpo", beta=0.3), member(batch, index)) for index in range(3)]
    losses_MG = torch.stack([loss_i for loss_i, _ in members])
    least = losses_MG.argmin(dim=0)
    assert (loss <= losses_MG).all()
    assert set(least.tolist()) == {0, 1, 2}
    torch.testing.assert_close(loss, losses_MG.amin(dim=0))
    for g in range(12):
        torch.testing.assert_close(slope[g], members[least[g]][1][g])


def test_pessimism_with_one_model_is_distillation(make: Make) -> None:
    """An ensemble of one that is anything else, and the KL that is added with its weight."""
    batch = random_batch(make, 2, 6, 4)
    single = with_columns(member(batch, 1), rewards_GKM=batch.rewards_GKM[..., 1:2])
    plain = objective("distill_dpo", beta=0.3)
    assert_same(objective("pessimistic_unconfirmed", beta=0.3, kl_weight=0.0), plain, single)
    added = losses_of(objective("pessimistic_unconfirmed", beta=0.3, kl_weight=0.7), single) - losses_of(plain, single)
    kl = torch.where(batch.valid_GK, batch.token_kl_GK, 0.0).sum(dim=1) / batch.valid_GK.sum(dim=1).clamp(min=1)
    torch.testing.assert_close(added, 0.7 * kl)


def test_pessimism_prefers_the_model_that_promises_least(make: Make) -> None:
    """With full support the policies of both models bring the distances to 0; what is left is kl_weight KL(pi_ref ||
    pi_r), which is lower for the model with the smaller optimal value: the worst case."""
    method = objective("pessimistic_unconfirmed", beta=BETA, kl_weight=0.1)
    population = dataclasses.replace(every_arm(3), columns={"rewards": ENSEMBLE.T[None]})
    for reward in ENSEMBLE:
        batch = population.batch(make, optimum(reward).log(), ref_A=REFERENCE, reward_A=reward)
        assert losses_of(method, batch).item() == pytest.approx(0.1 * forward_kl(optimum(reward)), rel=1e-9)
