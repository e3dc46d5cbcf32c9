"""Losses outside RPO's family, reward models, and the likelihood anchor: by hand and against plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from rpo_megatron.objectives.rewards import log_odds
from tests.objectives.batches import (
    Make,
    assert_same,
    fp64,
    gradient,
    labelled_pairs,
    losses_of,
    minimise,
    objective,
    random_batch,
    with_columns,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("rho_better", "rho_other", "baseline", "z"),
    [(2.0, 1.0, "group", 0.75), (2.0, -4.0, "group", 0.0), (2.0, 1.0, "zero", 0.0)],
)
def test_kto_by_hand(make: Make, rho_better: float, rho_other: float, baseline: str, z: float) -> None:
    """Weights exchanged, a sum over the pair, a baseline below 0 or over responses outside the pair, or one through
    which the gradient flows: beta = .5, w_D = 2, w_U = 3."""
    batch = make([[rho_other - 9, rho_better - 9, 5.0]], ref=[[-9.0, -9.0, -9.0]], reward=[[0.0, 2.0, 1.0]])
    knobs = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0, "pair": "best_worst"}
    loss, slope = gradient(objective("kto", kl_baseline=baseline, **knobs), batch)
    p, q = sigmoid(0.5 * rho_better - z), sigmoid(z - 0.5 * rho_other)
    assert loss.item() == pytest.approx((2 * (1 - p) + 3 * (1 - q)) / 2)
    assert slope[0].tolist() == pytest.approx([3 * 0.25 * q * (1 - q), -2 * 0.25 * p * (1 - p), 0.0])


def test_kto_averages_over_all_pairs(make: Make) -> None:
    """A desirable response that is undesirable in no pair, or a baseline of the whole group: rewards 2 > 1 > 0, so the
    middle one is once the better and once the other; all log-ratios 0 give sigmoid(0)."""
    batch = make([[-3.0, -4.0, -5.0]], ref=[[-3.0, -4.0, -5.0]], reward=[[0.0, 2.0, 1.0]])
    loss, slope = gradient(objective("kto", beta=1.0, pair="all_pairs", undesirable_weight=3.0), batch)
    assert loss.item() == pytest.approx((0.5 + 1.5) / 2)
    assert slope[0].tolist() == pytest.approx([2 * 3 / 8 / 3, -2 / 8 / 3, (3 - 1) / 8 / 3])


def test_orpo_by_hand(make: Make) -> None:
    """Odds of the whole response, a nll in nats per response or of the wrong one: p = .5 (2 tokens, better), .2 (5)."""
    batch = make([[5 * math.log(0.2), 2 * math.log(0.5)]], reward=[[0.0, 1.0]], length=[[5, 2]])
    loss, slope = gradient(objective("orpo", odds_weight=0.3), batch)
    assert loss.item() == pytest.approx(-math.log(0.5) - 0.3 * math.log(sigmoid(math.log(1.0 / 0.25))))
    # d log odds / dm = 1 / (1 - p), and sigmoid(-log 4) = .2
    assert slope[0].tolist() == pytest.approx([0.3 * 0.2 / 0.8 / 5, -1 / 2 - 0.3 * 0.2 / 0.5 / 2])


@pytest.mark.parametrize("mean_logp", [-1e4, -40.0, -5.0, -0.7, -0.69, -1e-3, -1e-12])
def test_digits_of_log_odds(make: Make, mean_logp: float) -> None:
    """log(1 - e^m) that loses its digits near p = 1 or p = 0, in the value or in its slope 1 / (1 - p)."""
    batch = make([[3 * mean_logp]], length=[[3]])
    leaf = batch.logp_GK.requires_grad_()
    found = log_odds(with_columns(batch, logp_GK=leaf))
    exact = -math.expm1(mean_logp)
    assert found.item() == pytest.approx(mean_logp - math.log(exact), rel=1e-13)
    assert torch.autograd.grad(found.sum(), leaf)[0].item() == pytest.approx(1 / exact / 3, rel=1e-13)


def test_certain_responses_have_finite_odds(make: Make) -> None:
    """log p = 0, which greedy sampling from a sharp model produces: no infinite odds, no NaN."""
    loss, slope = gradient(objective("orpo"), make([[0.0, -1.0]], reward=[[0.0, 1.0]], length=[[4, 4]]))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("pair", ["all_pairs", "best_worst"])
def test_bradley_terry_by_hand(make: Make, pair: str) -> None:
    """A sum over pairs, or one that is lost: v = 1, 3, 0 for rewards 2 > 1 > 0, a tie elsewhere."""
    batch = make(value=[[1.0, 3.0, 0.0], [5.0, 1.0, 2.0]], reward=[[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    loss, slope = gradient(objective("bradley_terry", pair=pair), batch, "value_GK")
    pairs = {"all_pairs": [1.0 - 3.0, 1.0 - 0.0, 3.0 - 0.0], "best_worst": [1.0 - 0.0]}[pair]
    expected = sum(math.log1p(math.exp(-margin)) for margin in pairs) / len(pairs)
    assert loss.tolist() == pytest.approx([expected, 0.0])
    slopes = [sigmoid(-margin) / len(pairs) for margin in pairs]
    first, last = (slopes[0] + slopes[1], slopes[1] + slopes[2]) if len(pairs) == 3 else (slopes[0], slopes[0])
    assert slope[0, [0, 2]].tolist() == pytest.approx([-first, last])
    assert not slope[1].any()


def test_bradley_terry_finds_the_reward(make: Make) -> None:
    """A reward model with another link or scale: on labels of a Bradley-Terry judge its values are log t + constant."""
    population = labelled_pairs(fp64([0.6, 0.3, 0.1]))
    method = objective("bradley_terry")

    def loss(value_A: torch.Tensor) -> torch.Tensor:
        return (method(make(value=value_A[population.arms_GK], **population.columns))[0] * population.weight_G).sum()

    value = minimise(loss, torch.zeros(3))
    torch.testing.assert_close(value - value[2], fp64([6.0, 3.0, 1.0]).log(), rtol=0, atol=1e-6)


def test_regression_by_hand(make: Make) -> None:
    """A sum over responses, padding in the mean, or eta on the value: eta r = 2, 4 against v = 1, 7."""
    batch = make(
        value=[[1.0, 7.0, 9.0], [1.0, 2.0, 3.0]],
        reward=[[1.0, 2.0, 9.0], [5.0, 6.0, 7.0]],
        valid=[[True, True, False], [False] * 3],
    )
    loss, slope = gradient(objective("reward_regression", eta=2.0), batch, "value_GK")
    assert loss.tolist() == [(1 + 9) / 2, 0.0]
    assert slope.tolist() == [[-1.0, 3.0, 0.0], [0.0] * 3]


@pytest.mark.parametrize("what", ["best", "all", "weighted"])
def test_likelihood_anchor_by_hand(make: Make, what: str) -> None:
    """Per-sequence likelihoods, the wrong responses, weights that count padding or do not sum to 1. The last group has
    one response, the third ties: the anchor does not need a pair."""
    batch = make(
        [[-4.0, -12.0, -7.0], [0.0, 0.0, 0.0], [-2.0, -9.0, -7.0], [-5.0, 8.0, 8.0]],
        ref=[[-4.0, -12.0, -7.0], [0.0, 0.0, 0.0], [-2.0, -9.0, -7.0], [-5.0, 8.0, 8.0]],
        reward=[[0.0, math.log(3.0), 99.0], [1.0, 2.0, 3.0], [1.0, 1.0, 9.0], [0.0, 50.0, 60.0]],
        valid=[[True, True, False], [False] * 3, [True, True, False], [True, False, False]],
        length=[[4, 3, 1], [1, 1, 1], [1, 3, 1], [5, 1, 1]],
    )
    expected = {
        "best": [4.0, 0.0, 2.0, 1.0],
        "all": [2.5, 0.0, 2.5, 1.0],
        "weighted": [1 / 4 + 4 * 3 / 4, 0.0, 2.5, 1.0],
    }
    for method in ("dpo", "rpo_bwd", "rloo", "simpo", "kto"):
        plain = losses_of(objective(method), batch)
        added = losses_of(objective(method, nll_weight=0.5, nll_on=what), batch) - plain
        torch.testing.assert_close(added, 0.5 * fp64(expected[what]))


def test_sft_is_the_anchor_alone(make: Make) -> None:
    """Two implementations of the same likelihood that drift apart."""
    batch = random_batch(make, 7, 6, 4)
    for what in ("best", "all"):
        sft = losses_of(objective("sft", responses=what), batch)
        expo = losses_of(objective("expo", kl_weight=0.0, nll_weight=1.0, nll_on=what), batch)
        torch.testing.assert_close(sft, expo - losses_of(objective("expo", kl_weight=0.0), batch))


def test_orpo_is_sft_and_a_pair(make: Make) -> None:
    """An odds term with a reference or a length in it: without it orpo is sft on the best response, and with it the
    loss of log odds in plain torch is added."""
    batch = random_batch(make, 7, 6, 2, ragged=False)
    reward = fp64([[1.0, 0.0], [0.0, 2.0]] * 3)
    batch = with_columns(batch, reward_GK=reward)
    mean_logp = batch.logp_GK / batch.length_GK
    odds = (mean_logp.exp() / (1 - mean_logp.exp())).log()
    term = -F.logsigmoid((odds[:, 0] - odds[:, 1]) * (reward[:, 0] - reward[:, 1]).sign())
    sft = losses_of(objective("sft"), batch)
    torch.testing.assert_close(losses_of(objective("orpo", odds_weight=0.4), batch), sft + 0.4 * term)
    assert_same(objective("orpo", odds_weight=1e-300), objective("sft"), batch)
