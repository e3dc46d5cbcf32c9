"""AlphaPO (arXiv 2501.03884) and SimPO: golden numbers, gradients by formula, limits, digits at extreme arguments."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from rpo_megatron.objectives.rewards import LARGEST_EXPONENT, alpha_shaped
from tests.objectives.batches import Make, assert_same, fp64, gradient, losses_of, objective, random_batch

BETA, GAMMA = 2.5, 0.25
ALPHAS = [-10.0, -2.0, -1.0, -0.25, -1e-3, 0.0, 1e-3, 0.1, 0.25, 1.0, 3.0]


def shaped(alpha: float, mean_logp: Decimal) -> Decimal:
    """BETA (1 - exp(-alpha m)) / alpha to 50 digits."""
    with localcontext() as context:
        context.prec = 80
        exact = Decimal(alpha)
        return Decimal(BETA) * (mean_logp if alpha == 0 else (1 - (-exact * mean_logp).exp()) / exact)


def score(make: Make, alpha: float, mean_logp: list[float]) -> torch.Tensor:
    """Of one-token responses."""
    batch = make([mean_logp], length=[[1] * len(mean_logp)])
    return alpha_shaped(batch, alpha=alpha, beta=BETA)[0]


@pytest.mark.parametrize(
    ("alpha", "loss"),
    [(-1, 0.6017513177), (0, 0.3132616875), (0.1, 0.2778503305), (0.25, 0.2251546888), (1, 0.03416611071)],
)
def test_golden_numbers(make: Make, alpha: float, loss: float) -> None:
    """The sign of alpha, pi/pi_ref for pi, sums for means: m = -.8 (5 tokens, the better one, second) and -1.3 (9)."""
    batch = make([[-11.7, -4.0]], reward=[[0.0, 1.0]], length=[[9, 5]])
    method = objective("alphapo", alpha=float(alpha), beta=BETA, gamma=GAMMA)
    found, slope = gradient(method, batch)
    assert found.item() == pytest.approx(loss, rel=1e-9)
    if alpha == 0.25:
        assert (slope[0] * fp64([9, 5])).tolist() == pytest.approx([0.6975766805, -0.6156092599], rel=1e-9)
    if alpha == 0:
        assert_same(method, objective("simpo", beta=BETA, gamma=GAMMA), batch)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_slopes(make: Make, alpha: float) -> None:
    """A7-A9: by m the slopes are -beta sigmoid(-z) exp(-alpha m_1) and +beta sigmoid(-z) exp(-alpha m_2)."""
    m_1, m_2 = -0.5, -0.7
    batch = make([[3 * m_1, 8 * m_2]], reward=[[1.0, 0.0]], length=[[3, 8]])
    slope = gradient(objective("alphapo", alpha=alpha, beta=BETA, gamma=GAMMA), batch)[1][0] * fp64([3, 8])
    z = float(shaped(alpha, Decimal(m_1)) - shaped(alpha, Decimal(m_2))) - GAMMA
    scale = BETA / (1 + math.exp(z))
    expected = [-scale * math.exp(-alpha * m_1), scale * math.exp(-alpha * m_2)]
    assert slope.tolist() == pytest.approx(expected, rel=1e-9)
    assert (-slope[1] / slope[0]).item() == pytest.approx(math.exp(alpha * (m_1 - m_2)), rel=1e-9)


@pytest.mark.parametrize(("alpha", "shape"), [(1.0, lambda p: 1 - 1 / p), (-1.0, lambda p: p - 1), (0.0, math.log)])
def test_special_cases(make: Make, alpha: float, shape: object) -> None:
    """Inverse-linear, linear and logarithmic rewards in the geometric mean p of the token probabilities."""
    assert callable(shape)
    for p in (1e-3, 0.2, 0.9, 1.0):
        assert score(make, alpha, [math.log(p)]).item() == pytest.approx(BETA * shape(p), rel=1e-12)


@pytest.mark.parametrize("alpha", [-2.0, -0.25, 0.1, 0.25, 3.0])
def test_score_is_the_slope_of_an_alpha_divergence(make: Make, alpha: float) -> None:
    """Where the shape comes from: beta f'(p), f(u) = (u^(1-alpha) - (1-alpha) u - alpha) / (alpha (alpha - 1))."""
    u = fp64([0.05, 0.3, 0.8, 1.0]).requires_grad_()
    f = (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))
    expected = BETA * torch.autograd.grad(f.sum(), u)[0]
    torch.testing.assert_close(score(make, alpha, u.detach().log().tolist()), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_range(make: Make, alpha: float) -> None:
    """Scores above 0, or below -beta/|alpha| for alpha < 0, which bounds the margin: the loss cannot reach 0 there."""
    scores = score(make, alpha, [-1e-9, -0.1, -1.0, -10.0, -1e3])
    assert (scores <= 0).all()
    assert (scores.diff() <= 0).all()
    if alpha < 0:
        assert (scores >= BETA / alpha).all()
        batch = make([[-1e-9, -1e4]], reward=[[1.0, 0.0]], length=[[1, 1]])
        loss = losses_of(objective("alphapo", alpha=alpha, beta=BETA, gamma=GAMMA), batch).item()
        assert loss == pytest.approx(math.log1p(math.exp(GAMMA + BETA / alpha)), rel=1e-6)


@pytest.mark.parametrize("power", range(1, 17))
def test_continuous_around_simpo(make: Make, power: int) -> None:
    """A jump where the formula changes near alpha = 0, or noise of 1 - exp(-alpha m) over alpha: against 50 digits. The
    first order in alpha is beta (m - alpha m^2 / 2)."""
    for alpha in (10.0**-power, -(10.0**-power), 0.99 * 10.0**-power):
        for m in (-1e-6, -0.3, -2.3457, -12.0):
            found = score(make, alpha, [m]).item()
            assert found == pytest.approx(float(shaped(alpha, Decimal(m))), rel=1e-10)
            if power > 6:
                assert found == pytest.approx(BETA * (m - alpha * m * m / 2), rel=1e-9)


@pytest.mark.parametrize("alpha", [-1.0, -1e-5, 1e-7, 1e-5, 0.25, 1.0])
def test_digits_of_small_margins(make: Make, alpha: float) -> None:
    """Cancellation in r_1 - r_2 = -(beta/alpha) e^(-alpha m_2) expm1(-alpha (m_1 - m_2)): a margin of 1e-6 nats per
    token near m = -2.375 keeps at least eight digits of loss above ln 2, also from fp32 columns."""
    m_1, m_2 = -2.375 + 2.0**-20, -2.375
    batch = make([[m_1, m_2]], reward=[[1.0, 0.0]], length=[[1, 1]], dtype=torch.float32)
    margin = shaped(alpha, Decimal(m_1)) - shaped(alpha, Decimal(m_2))
    found = math.log(2) - losses_of(objective("alphapo", alpha=alpha, beta=BETA, gamma=0.0), batch).item()
    expected = float(margin) / 2 - float(margin) ** 2 / 8  # ln 2 - softplus(-z) = z/2 - z^2/8 + O(z^4)
    assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 1.0])
def test_long_responses(make: Make, alpha: float) -> None:
    """pi^(-alpha) of a whole response, which overflows: 4000 tokens of mean -.8 are one token of -.8."""
    method = objective("alphapo", alpha=alpha, beta=BETA, gamma=GAMMA)
    short = make([[-0.8, -1.3]], reward=[[1.0, 0.0]], length=[[1, 1]])
    long = make([[-3200.0, -2600.0]], reward=[[1.0, 0.0]], length=[[4000, 2000]])
    (loss, slope), (expected, expected_slope) = gradient(method, long), gradient(method, short)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope * fp64([4000, 2000]), expected_slope)


def test_theorem_of_vanishing_and_exploding_slopes(make: Make) -> None:
    """Theorem 3.1: to alpha = -inf the gradient vanishes; to +inf it vanishes where the better response is ahead and
    explodes where it is behind; in between it rises and falls."""

    def steepness(alpha: float, better: float, other: float) -> float:
        batch = make([[better, other]], reward=[[1.0, 0.0]], length=[[1, 1]])
        return gradient(objective("alphapo", alpha=alpha, beta=BETA, gamma=GAMMA), batch)[1].abs().max().item()

    assert max(steepness(-10.0, -1.3, -1.5), steepness(-10.0, -1.5, -1.3)) < 1e-4
    assert steepness(10.0, -1.3, -1.5) < 1e-12
    assert steepness(10.0, -1.5, -1.3) > 1e6
    ahead = [steepness(alpha, -1.3, -1.5) for alpha in (-10.0, -3.0, 0.0, 0.5, 3.0, 10.0)]
    assert max(ahead) == max(ahead[1:-1]) > ahead[0] > ahead[-1]


@pytest.mark.parametrize("method", ["simpo", "alphapo"])
@pytest.mark.parametrize("beta", [2.5, 10.0])
def test_gamma_and_its_ratio_are_one_number(make: Make, method: str, beta: float) -> None:
    """gamma taken for gamma / beta (as a published recipe did), or a default ratio that a given gamma does not
    replace."""
    batch = random_batch(make, 0, 6, 4)
    by_ratio = objective(method, beta=beta, gamma_beta_ratio=0.3)
    assert_same(by_ratio, objective(method, beta=beta, gamma=0.3 * beta), batch)
    free = losses_of(objective(method, beta=beta, gamma=0.0), batch)
    assert (losses_of(by_ratio, batch) >= free).all()
    assert (losses_of(by_ratio, batch) > free + 0.1).any()


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_margin_is_not_rounded(make: Make, alpha: float) -> None:
    """A gamma that passes through fp32: .1 is not one of its numbers. Equal responses give softplus(gamma)."""
    batch = make([[-2.0, -2.0]], reward=[[1.0, 0.0]], length=[[3, 3]])
    loss = losses_of(objective("alphapo", alpha=alpha, beta=1.0, gamma=0.1), batch).item()
    assert loss == pytest.approx(math.log1p(math.exp(0.1)), rel=1e-15)


def test_cut_off(make: Make) -> None:
    """exp(-alpha m) that overflows in fp32 for responses of no probability: constant beyond the largest exponent."""
    largest = LARGEST_EXPONENT / 0.25
    batch = make([[-largest + 1, -largest - 1, -1e5]], reward=[[0.0, 1.0, 0.0]], length=[[1] * 3])
    scores = alpha_shaped(batch, alpha=0.25, beta=BETA)[0]
    assert scores[1] == scores[2] == -10 * math.expm1(LARGEST_EXPONENT)
    assert scores[0] > scores[1]
    assert torch.isfinite(scores.float()).all()
