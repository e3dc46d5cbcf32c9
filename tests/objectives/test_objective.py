"""Objectives as the step sees them: published losses by hand, constants at step 0, edge cases, the implicit reward."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rpo_megatron.objectives.methods import METHODS
from tests.objectives.batches import Make, assert_same, gradient, losses_of, objective, random_batch, with_columns

WITH_LOG_RATIOS = [name for name, method in METHODS.items() if "log_ratio" in method.knobs]


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


@pytest.mark.parametrize("method", WITH_LOG_RATIOS)
def test_mean_log_ratio_divides_by_the_own_length(make: Make, method: str) -> None:
    """log_ratio=mean that divides by a wrong length: equals log_ratio=sum of log-ratios divided by hand."""
    batch = random_batch(make, 5, 6, 4)
    zero = torch.zeros_like(batch.logp_GK)
    per_token = (batch.logp_GK - batch.ref_logp_GK) / batch.length_GK.clamp(min=1)
    by_hand = with_columns(batch, logp_GK=per_token, ref_logp_GK=zero)
    torch.testing.assert_close(
        losses_of(objective(method, log_ratio="mean"), batch), losses_of(objective(method), by_hand)
    )


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


@pytest.mark.parametrize("eta", [1e3, 1e5])
def test_large_eta_turns_rpo_bwd_into_dpo(make: Make, eta: float) -> None:
    """eta -> inf limit: for two responses with different rewards rpo_bwd is dpo, loss and gradient."""
    batch = make([[-20.0, -12.0]], ref=[[-20.5, -14.2]], reward=[[1.0, 3.0]])
    assert_same(objective("rpo_bwd", beta=0.1, eta=eta), objective("dpo", beta=0.1), batch)


@pytest.mark.parametrize("method", [name for name in WITH_LOG_RATIOS if "pair" in METHODS[name].knobs])
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


@pytest.mark.parametrize("method", ["rpo_bwd", "rpo_fwd", "rpo_sqloo", "rloo", "distill_dpo", "dno"])
def test_equal_rewards_pull_towards_the_reference(make: Make, method: str) -> None:
    """Equal rewards dropped as no signal: the K-way methods then have their optimum at equal log-ratios."""
    away = make([[-3.0, -5.0, -4.0]], ref=[[-3.0, -3.0, -3.0]], reward=[[1.0, 1.0, 1.0]])
    home = make([[-3.0, -5.0, -4.0]], ref=[[-5.0, -7.0, -6.0]], reward=[[1.0, 1.0, 1.0]])
    losses, slope = gradient(objective(method), away)
    assert losses.item() > 0
    assert slope[0, 0] > 0 > slope[0, 1]
    assert gradient(objective(method), home)[1].abs().max() < 1e-15


def test_differences_are_taken_in_fp64(make: Make) -> None:
    """fp32 arithmetic inside: two log-ratios of 1e3-sized sums that differ by one fp32 step (2^-14) each way."""
    step = 2.0**-14
    batch = make([[-1000.0 + step, -1000.0]], ref=[[-1000.0, -1000.0 + step]], reward=[[1.0, 0.0]], dtype=torch.float32)
    losses = objective("dpo", beta=1e-3)(batch)[0]
    assert losses.dtype == torch.float64
    assert losses.item() == pytest.approx(-F.logsigmoid(torch.tensor(2e-3 * step).double()).item(), rel=1e-15)


def test_statistics_use_the_scaled_log_ratio(make: Make) -> None:
    """Implicit reward without beta, for ipo too, whose score is unscaled: beta (rho_best - rho_rest) = .1 * 1.7."""
    batch = make([[-20.0, -12.0]], ref=[[-20.5, -14.2]], reward=[[1.0, 3.0]])
    for method in ("dpo", "ipo", "rpo_bwd"):
        assert objective(method, beta=0.1)(batch)[1]["margin"][0].item() == pytest.approx(0.17)


def test_implicit_reward_of_each_kind(make: Make) -> None:
    """A trained policy judged by something else than its implicit reward: beta rho, SimPO's without the margin, values,
    log-probabilities; sft has no such notion."""
    batch = make(
        [[-8.0, -2.0, 5.0]],
        value=[[0.5, -0.5, 3.0]],
        ref=[[-9.0, -4.0, 3.0]],
        reward=[[1.0, 0.0, 9.0]],
        length=[[4, 2, 1]],
        valid=[[True, True, False]],
        dtype=torch.float32,
    )
    expected = {
        ("dpo", "beta", 0.5): [0.5, 1.0],
        ("ipo", "beta", 0.5): [0.5, 1.0],
        ("rebel", "eta", 9.0): [1.0, 2.0],
        ("kto", "beta", 0.5): [0.5, 1.0],
        ("simpo", "beta", 3.0): [-6.0, -3.0],
        ("alphapo", "alpha", 0.0): [-5.0, -2.5],
        ("expo", "kl_weight", 1.0): [-8.0, -2.0],
        ("wrpo", "beta", 0.5): [0.5, 1.0],
        ("orpo", "odds_weight", 1.0): [-2.0, -1.0],
        ("bradley_terry", "pair", "best_worst"): [0.5, -0.5],
    }
    for (method, knob, value), implicit in expected.items():
        found = objective(method, **{knob: value}).implicit(batch)
        assert found.dtype == torch.float64
        assert found[0, :2].tolist() == pytest.approx(implicit), method
    with pytest.raises(ValueError, match="method 'sft' has no implicit reward"):
        objective("sft").implicit(batch)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_of_every_method(make: Make, method: str) -> None:
    """A method without evaluation, or one that judges something else than the implicit reward: nothing where that or
    the truth is missing; otherwise the pairs that `accuracy` counts are those that the Brier score averages."""
    batch = random_batch(make, 4, 5, 4)
    ours = objective(method)
    stats = ours.evaluate(batch)
    if ours.reward is None:
        assert stats == {}
        return
    assert torch.equal(ours(batch)[1]["accuracy"][1], stats["brier"][1])
    assert not stats["brier"][0].requires_grad
    assert ours.evaluate(with_columns(batch, reward_GK=None)) == {}


def test_progress_makes_another_objective() -> None:
    """A schedule that is a state of the objective: two points of one run at once."""
    start = objective("wrpo").at(0.0)
    assert (start.progress, start.at(0.5).progress, start.progress, objective("wrpo").progress) == (0.0, 0.5, 0.0, 1.0)


def test_used_counts_groups_with_something_to_compare(make: Make) -> None:
    """A run whose data give the method nothing to act on, with loss 0 and no sign of it: of three groups one is tied,
    one is padding."""
    batch = make(
        [[-1.0, -2.0], [-1.0, -2.0], [0.0, 0.0]],
        ref=[[-1.0, -1.0]] * 3,
        reward=[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]],
        valid=[[True, True], [True, True], [False, False]],
    )
    for pair in ("best_random", "all_pairs"):
        _, stats = objective("dpo", pair=pair)(batch)
        assert [float(number) for number in stats["used"]] == [1.0, 2.0]
    _, stats = objective("rpo_bwd")(batch)
    assert [float(number) for number in stats["used"]] == [2.0, 2.0]
    assert "used" not in objective("sft")(batch)[1]
