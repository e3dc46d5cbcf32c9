"""Distances against hand-computed numbers, their published gradients and the identities between them."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.objectives.distances import (
    absolute_squared,
    backward_kl,
    cross_entropy,
    forward_kl,
    hinge,
    noise_corrected_cross_entropy,
    reinforce_loo,
    squared,
    squared_loo,
    squared_probability,
)

Distance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
rloo: Distance = partial(reinforce_loo, beta=0.3)
ALL = [backward_kl, cross_entropy, forward_kl, squared, squared_loo, rloo, squared_probability]
"""Distances that ignore constants. The others know pairs only, or scores without an unknown constant."""
seeds = st.integers(0, 2**31)
sizes = st.integers(2, 6)
fast = settings(deadline=None, max_examples=40)


def row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def loss_and_slope(
    distance: Distance, a: torch.Tensor, b: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [G] and S = dD/da [G, K]."""
    a = a.clone().requires_grad_()
    losses = distance(a, b, torch.ones_like(a, dtype=torch.bool) if valid is None else valid)
    return losses.detach(), torch.autograd.grad(losses.sum(), a)[0]


def random_pair(seed: int, *shape: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * scale
    return a, b


def random_mask(seed: int, num_groups: int, k: int) -> torch.Tensor:
    return torch.rand(num_groups, k, generator=torch.Generator().manual_seed(seed + 1)) < 0.7


A, B = [0.3, -1.2, 0.8, 0.05], [1.0, -0.5, 0.2, 2.0]


@pytest.mark.parametrize(
    ("distance", "loss", "slope"),
    [
        (backward_kl, 0.4562392366, [0.04617166329, 0.01030229062, 0.3492881908, -0.4057621447]),
        (forward_kl, 0.5050380924, [-0.08777772279, -0.01958585734, 0.4423898863, -0.3350263062]),
        (squared_loo, 2.890555556, [-0.02222222222, -0.02222222222, 2.288888889, -2.244444444]),
    ],
)
def test_golden_numbers_of_four_responses(distance: Distance, loss: float, slope: list[float]) -> None:
    """Any change of a formula or its normalisation. For sqloo by hand: d = (-.7, -.7, .6, -1.95), mean -.6875."""
    losses, slopes = loss_and_slope(distance, row(A), row(B))
    assert losses.item() == pytest.approx(loss, rel=1e-9)
    assert slopes[0].tolist() == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize(
    ("distance", "loss"), [(backward_kl, 0.2896779643), (forward_kl, 0.2141604968), (squared_loo, 2.4375)]
)
def test_golden_numbers_of_equal_targets(distance: Distance, loss: float) -> None:
    """Treating equal rewards as no signal: away from the reference they pull back to it."""
    assert loss_and_slope(distance, row([0.3, -1.2, 0.8]), row([1.0, 1.0, 1.0]))[0].item() == pytest.approx(
        loss, rel=1e-9
    )


def test_golden_slope_of_equal_targets() -> None:
    """A wrong K/(K-1) in sqloo: K = 3, d = a - 1 has mean -1.0333.., S = 9/4 (d - mean)."""
    slope = loss_and_slope(squared_loo, row([0.3, -1.2, 0.8]), row([1.0, 1.0, 1.0]))[1]
    assert slope[0].tolist() == pytest.approx([0.75, -2.625, 1.875])


def test_golden_numbers_of_a_pair() -> None:
    """A pair's margins beta delta = .17 against .5: (.33)^2 = .1089 is Fisch's distillation = sqloo = 2 D^sq. The
    EXO pair loss is forward_kl against logit(.9)."""
    a, b, ones = row([0.17, 0.0]), row([0.5, 0.0]), torch.ones(1, 2, dtype=torch.bool)
    assert squared_loo(a, b, ones).item() == pytest.approx(0.1089)
    assert squared(a, b, ones).item() == pytest.approx(0.1089 / 2)
    assert backward_kl(a, b, ones).item() == pytest.approx(0.01308993399, rel=1e-8)
    assert forward_kl(a, row([math.log(9.0), 0.0]), ones).item() == pytest.approx(0.4212673179, rel=1e-9)


@fast
@given(seed=seeds, k=sizes)
def test_slopes_follow_the_published_formulas(seed: int, k: int) -> None:
    """A gradient that is not the paper's: Eq. 9 and 11 for bwd and sqloo, p (log p - log q - KL) for fwd, and for RLOO
    the advantages -A_k / K (here by a = beta rho, so over beta too)."""
    a, b = random_pair(seed, 3, k)
    p, q = a.softmax(-1), b.softmax(-1)
    a_loo, b_loo = ((v - (v.sum(-1, keepdim=True) - v) / (k - 1)) for v in (a, b))
    kl = (p * (p.log() - q.log())).sum(-1, keepdim=True)
    expected = {
        backward_kl: p - q,
        cross_entropy: p - q,
        forward_kl: p * (p.log() - q.log() - kl),
        squared_loo: k / (k - 1) * (a_loo - b_loo),
        squared: 2 * (a - b - (a - b).mean(-1, keepdim=True)),
        rloo: (a_loo - b_loo) / (k * 0.3),
        squared_probability: p * (p - q - (p * (p - q)).sum(-1, keepdim=True)),
        absolute_squared: 2 * (a - b) / k,
    }
    for distance, slope in expected.items():
        torch.testing.assert_close(loss_and_slope(distance, a, b)[1], slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distance", ALL)
@fast
@given(seed=seeds, k=sizes, shift_a=st.floats(-100, 100), shift_b=st.floats(-100, 100))
def test_constants_per_group_change_nothing(
    distance: Distance, seed: int, k: int, shift_a: float, shift_b: float
) -> None:
    """A distance in which the unknown log Z(x) or an offset of the rewards survives, for ragged groups too; and
    slopes that do not sum to 0, which is the same statement for the gradient."""
    a, b = random_pair(seed, 3, k)
    valid = random_mask(seed, 3, k)
    losses, slopes = loss_and_slope(distance, a, b, valid)
    shifted, shifted_slopes = loss_and_slope(distance, a + shift_a, b + shift_b, valid)
    torch.testing.assert_close(shifted, losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted_slopes, slopes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slopes.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("distance", [*ALL, absolute_squared])
@fast
@given(seed=seeds, k=sizes)
def test_a_ragged_group_equals_the_group_alone(distance: Distance, seed: int, k: int) -> None:
    """Masked entries that leak into a sum, a softmax, a mean or K. They hold large junk here."""
    a, b = random_pair(seed, 4, k)
    valid = random_mask(seed, 4, k)
    losses, slopes = loss_and_slope(distance, torch.where(valid, a, 1e4), torch.where(valid, b, -1e4), valid)
    for g in range(4):
        own = valid[g]
        alone, slope = loss_and_slope(distance, a[g, own][None], b[g, own][None])
        if own.sum() <= (0 if distance is absolute_squared else 1):
            assert losses[g] == 0
            assert not slopes[g].any()
        else:
            torch.testing.assert_close(losses[g], alone[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(slopes[g, own], slope[0], rtol=1e-12, atol=1e-12)
        assert not slopes[g, ~own].any()


@fast
@given(seed=seeds, k=sizes)
def test_identities_between_distances(seed: int, k: int) -> None:
    """Wrong factors between the forms: sqloo over all pairs (3), eta-scaling (5), cross-entropy = bwd + entropy (6)."""
    a, b = random_pair(seed, 1, k)
    ones = torch.ones(1, k, dtype=torch.bool)
    over_pairs = sum(
        (((a[0, i] - a[0, j]) - (b[0, i] - b[0, j])) ** 2 for i in range(k) for j in range(i)),
        start=torch.zeros((), dtype=torch.float64),
    )
    torch.testing.assert_close(squared_loo(a, b, ones)[0], k / (2 * (k - 1) ** 2) * over_pairs)
    torch.testing.assert_close(squared_loo(a, 3 * b, ones), 9 * squared_loo(a / 3, b, ones))
    entropy = torch.special.entr(b.softmax(-1)).sum(-1)
    torch.testing.assert_close(cross_entropy(a, b, ones), backward_kl(a, b, ones) + entropy)


@fast
@given(seed=seeds)
def test_two_responses_are_the_pair_form(seed: int) -> None:
    """Identities 1 and 2: Bernoulli divergences and squares of margins, written with logsigmoid here."""
    a, b = random_pair(seed, 5, 2)
    ones = torch.ones(5, 2, dtype=torch.bool)
    da, db = a[:, 0] - a[:, 1], b[:, 0] - b[:, 1]
    ls = torch.nn.functional.logsigmoid
    bernoulli = lambda x, y: y.sigmoid() * (ls(y) - ls(x)) + (-y).sigmoid() * (ls(-y) - ls(-x))  # noqa: E731
    torch.testing.assert_close(backward_kl(a, b, ones), bernoulli(da, db), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(forward_kl(a, b, ones), bernoulli(db, da), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(squared(a, b, ones), 0.5 * (da - db) ** 2)
    torch.testing.assert_close(squared_loo(a, b, ones), (da - db) ** 2)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_small_signals_make_all_distances_one(k: int) -> None:
    """Identity 4: near 0, bwd = fwd = (K-1)^2/K^3 sqloo up to third order."""
    a, b = random_pair(3, 1, k, scale=1e-3)
    ones = torch.ones(1, k, dtype=torch.bool)
    expected = (k - 1) ** 2 / k**3 * squared_loo(a, b, ones)
    torch.testing.assert_close(backward_kl(a, b, ones), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(forward_kl(a, b, ones), expected, rtol=1e-2, atol=0)


def test_large_eta_is_the_label_of_the_best() -> None:
    """Identity 7: eta -> inf gives -log softmax(a)_best; with an m-way tie -(1/m) sum_ties log p - log m."""
    ones, log_p = torch.ones(1, 4, dtype=torch.bool), row(A).log_softmax(-1)[0]
    assert backward_kl(row(A), 1e4 * row(B), ones).item() == pytest.approx(-log_p[3].item())
    label = row([-math.inf, -math.inf, -math.inf, 0.0])
    assert backward_kl(row(A), label, ones).item() == pytest.approx(-log_p[3].item())
    tied = 1e4 * row([2.0, 0.0, 2.0, 1.0])
    expected = -0.5 * (log_p[0] + log_p[2]).item() - math.log(2)
    assert backward_kl(row(A), tied, ones).item() == pytest.approx(expected)


@pytest.mark.parametrize("distance", [backward_kl, forward_kl, squared, squared_loo, rloo, squared_probability])
def test_zero_exactly_at_the_target(distance: Distance) -> None:
    """Identity 8: the loss vanishes where a = b + constant, and nowhere else."""
    losses, slopes = loss_and_slope(distance, row(B) + 5.0, row(B))
    assert losses.item() == pytest.approx(0.0, abs=1e-14)
    assert slopes.abs().max() < 1e-14
    assert loss_and_slope(distance, row([5.1, 0.0, 0.0, 0.0]), row([5.0, 0.0, 0.0, 0.0]))[0].item() > 1e-6


def test_regression_is_not_centred() -> None:
    """A reward model that may be off by any constant: (1 + 4) / 2 for d = (1, 2), and the target itself is 0."""
    assert loss_and_slope(absolute_squared, row([2.0, 5.0]), row([1.0, 3.0]))[0].item() == 2.5
    assert loss_and_slope(absolute_squared, row(B), row(B))[0].item() == 0.0


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("distance", "loss", "slope"),
    [
        (hinge, 0.83, -1.0),  # 1 - .17
        (partial(noise_corrected_cross_entropy, label_smoothing=0.1), 0.5905053389, -0.457602 - 0.125),
        (partial(noise_corrected_cross_entropy, label_smoothing=0.0), 0.6117553389, -0.457602),  # sigmoid(-.17)
        (squared_probability, 0.457602**2, -2 * 0.457602 * 0.457602 * 0.542398),
    ],
)
def test_pair_distances_by_hand(distance: Distance, loss: float, slope: float, swap: bool) -> None:
    """A sign, a factor or the order of the pair: margin .17 of the preferred over the other, wherever it stands. Behind
    it stands junk, and below it a group without a pair, which counts nothing."""
    a, b, valid = [1.17, 1.0], [0.0, -math.inf], [True, True]
    if swap:
        a, b = a[::-1], b[::-1]
    groups = torch.tensor([[*a, 1e4], [7.0, 8.0, 9.0]]).double()
    target = torch.tensor([[*b, 0.0], [-math.inf] * 3]).double()
    mask = torch.tensor([[*valid, False], [False] * 3])
    losses, slopes = loss_and_slope(distance, groups, target, mask)
    assert losses.tolist() == pytest.approx([loss, 0.0], abs=1e-6)
    assert slopes.flatten().tolist() == pytest.approx([*([-slope, slope] if swap else [slope, -slope]), *[0] * 4], 1e-5)


def test_hinge_is_flat_beyond_the_margin() -> None:
    """A hinge that goes on pulling, or becomes negative, where the margin exceeds 1."""
    loss, slope = loss_and_slope(hinge, row([1.1, 0.0]), row([0.0, -math.inf]))
    assert loss.item() == 0.0
    assert not slope.any()


@pytest.mark.parametrize("distance", [*ALL, absolute_squared])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_finite_at_huge_margins(distance: Distance, sign: float) -> None:
    """exp overflow, log 0, or inf - inf in the loss or its backward at margins of 1e5."""
    losses, slopes = loss_and_slope(distance, row([1e5, 0.0, -1e5]), sign * row([1e5, 0.0, -1e5]))
    assert torch.isfinite(losses).all()
    assert torch.isfinite(slopes).all()


@pytest.mark.parametrize("distance", [*ALL, absolute_squared])
def test_gradcheck(distance: Distance) -> None:
    """A backward that does not belong to the forward, on a ragged batch with an empty and a one-response group."""
    a, b = random_pair(11, 4, 3, scale=1.0)
    valid = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
    assert torch.autograd.gradcheck(lambda x: distance(x, b, valid), a.requires_grad_())
