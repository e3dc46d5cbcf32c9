"""Objectives as the step sees them: published losses by hand, constants at step 0, edge cases, gradients."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.config import ObjectiveConfig
from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.objective import Objective, build
from rpo_megatron.objectives.responses import Responses

Make = Callable[..., Responses]
CONTRASTIVE = [name for name, method in METHODS.items() if method.divergence is not None]


def objective(method: str, **knobs: Any) -> Objective:
    return build(ObjectiveConfig(method=method, **knobs))


def random_batch(make: Make, seed: int, num_groups: int, k: int, *, ragged: bool = True) -> Responses:
    generator = torch.Generator().manual_seed(seed)
    logp, ref = torch.randn(2, num_groups, k, generator=generator, dtype=torch.float64) * 5 - 100
    reward = torch.randint(0, 4, (num_groups, k), generator=generator)  # small integers, so that ties occur
    valid = torch.rand(num_groups, k, generator=generator) < (0.7 if ragged else 1.1)
    length = torch.randint(1, 30, (num_groups, k), generator=generator) * valid
    draw = torch.rand(num_groups, generator=generator)
    return make(logp, ref=ref, reward=reward, valid=valid, length=length, draw=draw)


def with_logp(batch: Responses, logp_GK: torch.Tensor) -> Responses:
    return dataclasses.replace(batch, logp_GK=logp_GK)


def gradient(method: Objective, batch: Responses) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [G] and their gradient with respect to the log-probabilities [G, K]."""
    logp = batch.logp_GK.clone().requires_grad_()
    losses = method(with_logp(batch, logp))[0]
    return losses.detach(), torch.autograd.grad(losses.sum(), logp)[0]


# delta = 1.7: chosen's log-ratio is 1.7 above the other's, which stands first and is longer
@pytest.mark.parametrize(
    ("method", "knobs", "loss"),
    [
        ("dpo", {"beta": 0.1}, 0.6117553389),  # -log sigmoid(.17)
        ("cdpo", {"beta": 0.1, "label_smoothing": 0.1}, 0.6287553389),  # c = .9: dpo + .1 * .17
        ("cdpo", {"beta": 0.1, "label_smoothing": 0.0}, 0.6117553389),
        ("ipo", {"beta": 0.1}, 10.89),  # (1.7 - 5)^2
        ("rpo_sq", {"beta": 0.1, "eta": 0.25}, 0.05445),  # 1/2 (.17 - .25 * 2)^2
        ("rpo_sqloo", {"beta": 0.1, "eta": 0.25}, 0.1089),
        ("rpo_bwd", {"beta": 0.1, "eta": 0.25}, 0.01308993399),
        ("sft", {}, 12.0 / 4),
        ("sft", {"responses": "all"}, (12.0 / 4 + 20.0 / 10) / 2),
    ],
)
def test_published_losses_of_a_pair(make: Make, method: str, knobs: dict[str, Any], loss: float) -> None:
    """Any change of a row's letters, factor or conventions; numbers of the papers, rewards (1, 3)."""
    batch = make([[-20.0, -12.0]], ref=[[-20.5, -14.2]], reward=[[1.0, 3.0]], length=[[10, 4]])
    assert objective(method, **knobs)(batch)[0].item() == pytest.approx(loss, rel=1e-8)


@pytest.mark.parametrize(
    ("method", "scale"),
    [("rpo_bwd", 0.4562392366), ("rpo_fwd", 0.5050380924), ("rpo_sqloo", 2.890555556)],
)
def test_published_losses_of_four_responses(make: Make, method: str, scale: float) -> None:
    """beta and eta applied to the wrong side: a = .1 rho, b = 2 r."""
    rho = torch.tensor([[0.3, -1.2, 0.8, 0.05]]).double() / 0.1
    reward = torch.tensor([[1.0, -0.5, 0.2, 2.0]]).double() / 2
    batch = make(rho - 50, ref=torch.full((1, 4), -50.0), reward=reward)
    assert objective(method, beta=0.1, eta=2.0)(batch)[0].item() == pytest.approx(scale, rel=1e-8)


def test_sft_of_short_groups(make: Make) -> None:
    """One-token responses and a single response: -log p itself, averaged over the two of group 1."""
    batch = make([[-3.0, -5.0], [-2.0, 0.0]], valid=[[True, True], [True, False]], length=[[1, 1], [1, 0]])
    assert objective("sft", responses="all")(batch)[0].tolist() == [4.0, 2.0]


@pytest.mark.parametrize("method", CONTRASTIVE)
def test_mean_log_ratio_divides_by_the_own_length(make: Make, method: str) -> None:
    """log_ratio=mean that divides by a wrong length: equals log_ratio=sum of log-ratios divided by hand."""
    batch = random_batch(make, 5, 6, 4)
    assert batch.ref_logp_GK is not None
    zero = torch.zeros_like(batch.logp_GK)
    per_token = (batch.logp_GK - batch.ref_logp_GK) / batch.length_GK.clamp(min=1)
    by_hand = dataclasses.replace(batch, logp_GK=per_token, ref_logp_GK=zero)
    torch.testing.assert_close(objective(method, log_ratio="mean")(batch)[0], objective(method)(by_hand)[0])


def test_known_constants_at_step_zero(make: Make) -> None:
    """policy = reference: dpo is ln 2, rpo_bwd is log K - H(softmax(eta r)) with slope beta (1/K - q), ipo is
    1/(4 beta^2), and every log-ratio statistic is 0."""
    logp = torch.tensor([[-300.25, -1000.5, -20.0]])
    batch = make(logp, ref=logp, reward=[[0.5, -1.0, 2.0]], draw=[0.6], dtype=torch.float32)
    q = torch.tensor([0.5, -1.0, 2.0]).double().mul(3).softmax(0)
    losses, slope = gradient(objective("rpo_bwd", beta=0.2, eta=3.0), batch)
    assert objective("dpo")(batch)[0].item() == pytest.approx(math.log(2), rel=1e-14)
    assert objective("ipo", beta=0.2)(batch)[0].item() == pytest.approx(6.25)
    assert losses.item() == pytest.approx(math.log(3) - torch.special.entr(q).sum().item())
    torch.testing.assert_close(slope[0].double(), 0.2 * (1 / 3 - q), rtol=1e-6, atol=1e-7)
    stats = objective("rpo_bwd")(batch)[1]
    assert [stats[name][0].item() for name in ("kl", "margin", "reward_best", "reward_rest")] == [0.0] * 4
    assert (stats["accuracy"][0] / stats["accuracy"][1]).item() == 0.5


@pytest.mark.parametrize("k", [2, 3, 4])
def test_sqloo_is_rloo(make: Make, k: int) -> None:
    """Identity 11: with R = eta r - beta rho and A_k = R_k - mean_{j != k} R_j, the gradient by log pi(y_k) is
    -beta K/(K-1) A_k = -beta K^2/(K-1) (1/K) A_k."""
    beta, eta = 0.3, 1.5
    batch = random_batch(make, k, 5, k, ragged=False)
    assert batch.ref_logp_GK is not None
    assert batch.reward_GK is not None
    reward = eta * batch.reward_GK - beta * (batch.logp_GK - batch.ref_logp_GK)
    advantage = reward - (reward.sum(-1, keepdim=True) - reward) / (k - 1)
    slope = gradient(objective("rpo_sqloo", beta=beta, eta=eta), batch)[1]
    torch.testing.assert_close(slope, -beta * k**2 / (k - 1) * advantage / k)


@pytest.mark.parametrize("eta", [1e3, 1e5])
def test_large_eta_turns_rpo_bwd_into_dpo(make: Make, eta: float) -> None:
    """eta -> inf limit: for two responses with different rewards rpo_bwd is dpo, loss and gradient."""
    batch = make([[-20.0, -12.0]], ref=[[-20.5, -14.2]], reward=[[1.0, 3.0]])
    for ours, theirs in zip(
        gradient(objective("rpo_bwd", beta=0.1, eta=eta), batch),
        gradient(objective("dpo", beta=0.1), batch),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", [name for name in CONTRASTIVE if "pair" in METHODS[name].knobs])
@pytest.mark.parametrize(
    ("pair", "draw", "other"), [("best_random", 0.9, 3), ("best_random", 0.1, 0), ("best_worst", 0.1, 2)]
)
def test_pair_methods_act_on_two_of_k(make: Make, method: str, pair: str, draw: float, other: int) -> None:
    """A pair method that uses responses outside its pair: equals the two-response batch, and leaves the rest alone."""
    logp, ref, reward = [-3.0, -9.0, -4.0, -7.0], [-2.0, -8.5, -5.0, -7.5], [1.0, 4.0, 0.0, 2.0]
    wide = make([logp], ref=[ref], reward=[reward], draw=[draw])
    two = make(*[[[v[1], v[other]]] for v in (logp,)], ref=[[ref[1], ref[other]]], reward=[[reward[1], reward[other]]])
    losses, slope = gradient(objective(method, pair=pair), wide)
    expected, expected_slope = gradient(objective(method), two)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(slope[:, [1, other]], expected_slope)
    assert slope.count_nonzero() == 2


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), k=st.integers(2, 6))
def test_a_batch_equals_its_groups_alone(make: Make, method: str, seed: int, k: int) -> None:
    """Groups that influence each other, ragged K through junk entries, and groups without a signal: at most one
    valid response, or for a pair method all rewards equal."""
    batch = random_batch(make, seed, 4, k)
    losses, slopes = gradient(objective(method), batch)
    assert batch.ref_logp_GK is not None
    assert batch.reward_GK is not None
    for g in range(4):
        own = batch.valid_GK[g]
        assert not slopes[g, ~own].any()
        if own.sum() == 0 or (own.sum() == 1 and method != "sft"):
            assert losses[g] == 0
            assert not slopes[g].any()
            continue
        alone = make(
            batch.logp_GK[g, own][None],
            ref=batch.ref_logp_GK[g, own][None],
            reward=batch.reward_GK[g, own][None],
            length=batch.length_GK[g, own][None],
            draw=batch.draw_G[g][None],
        )
        loss, slope = gradient(objective(method), alone)
        torch.testing.assert_close(losses[g], loss[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(slopes[g, own], slope[0], rtol=1e-11, atol=1e-11)
        if "pair" in METHODS[method].knobs and batch.reward_GK[g, own].unique().numel() == 1:
            assert losses[g] == 0
            assert not slopes[g].any()


@pytest.mark.parametrize("method", ["rpo_bwd", "rpo_fwd", "rpo_sqloo"])
def test_equal_rewards_pull_towards_the_reference(make: Make, method: str) -> None:
    """Equal rewards dropped as no signal: the K-way methods then have their optimum at equal log-ratios."""
    away = make([[-3.0, -5.0, -4.0]], ref=[[-3.0, -3.0, -3.0]], reward=[[1.0, 1.0, 1.0]])
    home = make([[-3.0, -5.0, -4.0]], ref=[[-5.0, -7.0, -6.0]], reward=[[1.0, 1.0, 1.0]])
    losses, slope = gradient(objective(method), away)
    assert losses.item() > 0
    assert slope[0, 0] > 0 > slope[0, 1]
    assert gradient(objective(method), home)[1].abs().max() < 1e-15


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_in_extreme_batches(make: Make, method: str, dtype: torch.dtype) -> None:
    """NaN or inf in losses, gradients or statistics: log-probabilities of -1e4, margins of 1e5, huge rewards."""
    batch = make(
        [[-1e4, -1.0, -5e4], [-1e5, 0.0, -1e4], [0.0, 0.0, 0.0]],
        ref=[[-1.0, -1e4, -1e5], [0.0, -1e5, -1e4], [0.0, 0.0, 0.0]],
        reward=[[1e5, -1e5, 0.0], [-1e5, 1e5, 1e5], [0.0, 0.0, 0.0]],
        valid=[[True] * 3, [True] * 3, [False] * 3],
        dtype=dtype,
    )
    knobs = {"beta": 1.0} if "beta" in METHODS[method].knobs else {}
    with torch.autograd.detect_anomaly(check_nan=True):  # a NaN on the way that a mask hides at the end
        losses, slopes = gradient(objective(method, **knobs), batch)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(slopes).all()
    assert losses[2] == 0
    assert all(torch.isfinite(total) for total, _ in objective(method, **knobs)(batch)[1].values())


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(make: Make, method: str) -> None:
    """A backward that does not belong to the forward."""
    batch = random_batch(make, 17, 4, 4)
    assert torch.autograd.gradcheck(
        lambda logp: objective(method)(with_logp(batch, logp))[0], batch.logp_GK.clone().requires_grad_()
    )


def test_differences_are_taken_in_fp64(make: Make) -> None:
    """fp32 arithmetic inside: two log-ratios of 1e3-sized sums that differ by one fp32 step (2^-14) each way."""
    step = 2.0**-14
    batch = make([[-1000.0 + step, -1000.0]], ref=[[-1000.0, -1000.0 + step]], reward=[[1.0, 0.0]], dtype=torch.float32)
    losses = objective("dpo", beta=1e-3)(batch)[0]
    assert losses.dtype == torch.float64
    assert losses.item() == pytest.approx(-F.logsigmoid(torch.tensor(2e-3 * step).double()).item(), rel=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_never_waits_for_the_device(make: Make, method: str) -> None:
    """.item(), bool(tensor) or a data-dependent shape in a step: none of them exists on the meta device."""
    batch = random_batch(make, 1, 3, 4)
    columns = {name: value.to("meta") for name, value in vars(batch).items()}
    losses, stats = objective(method)(Responses(**columns))
    assert losses.shape == (3,)
    assert all(total.shape == count.shape == () for total, count in stats.values())


@pytest.mark.parametrize("method", METHODS)
def test_reads_exactly_the_declared_columns(make: Make, method: str) -> None:
    """A row that reads a column it does not declare (here missing or NaN), or statistics that carry a gradient."""
    ours = objective(method)
    batch = random_batch(make, 2, 3, 4, ragged=False)
    bare = dataclasses.replace(
        batch,
        ref_logp_GK=batch.ref_logp_GK if "ref_logp" in ours.reads else None,
        reward_GK=batch.reward_GK if "reward" in ours.reads else None,
        length_GK=batch.length_GK if "length" in ours.reads else torch.full((3, 4), -(2**40)),
    )
    losses, stats = ours(with_logp(bare, bare.logp_GK.clone().requires_grad_()))
    torch.testing.assert_close(losses.detach(), ours(batch)[0])
    assert losses.requires_grad
    assert not any(total.requires_grad or count.requires_grad for total, count in stats.values())


def test_statistics_use_the_scaled_log_ratio(make: Make) -> None:
    """Implicit reward without beta, for ipo too, whose score is unscaled: beta (rho_best - rho_rest) = .1 * 1.7."""
    batch = make([[-20.0, -12.0]], ref=[[-20.5, -14.2]], reward=[[1.0, 3.0]])
    for method in ("dpo", "ipo", "rpo_bwd"):
        assert objective(method, beta=0.1)(batch)[1]["margin"][0].item() == pytest.approx(0.17)


def test_description_says_what_is_computed() -> None:
    """A log that does not tell formula, normalisation and the knobs in force."""
    text = objective("rpo_sq", beta=0.03, log_ratio="mean").describe()
    for part in ("1/2 (beta d", "mean over the groups", "beta = 0.03", "log_ratio = mean", "length", "2502.00203"):
        assert part in text
