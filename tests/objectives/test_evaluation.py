"""Evaluation of models of the reward: by hand on one batch, against plain loops, and under what must not matter."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.objectives.evaluation import ranking
from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.statistics import Stats, summarise

Make = Callable[..., Responses]
Groups = list[list[tuple[float, int, bool]]]
"""What the model thinks, explicit reward and validity of each response of each group."""

HALVES = st.integers(-9, 9).map(lambda n: n / 2)
RESPONSE = st.tuples(HALVES, st.integers(0, 3), st.booleans())
GROUPS = st.integers(1, 5).flatmap(lambda k: st.lists(st.lists(RESPONSE, min_size=k, max_size=k), min_size=1))


def numbers(stats: Stats) -> dict[str, float]:
    sums = {name: total.item() for name, (total, _) in stats.items()}
    return summarise(sums, {name: count.item() for name, (_, count) in stats.items()})


def ranked(make: Make, groups: Groups, *, shift: float = 0.0) -> Stats:
    """Statistics of such groups, with a constant added to what the model thinks that grows from group to group."""
    implicit, reward, valid = ([[response[n] for response in group] for group in groups] for n in range(3))
    implicit = [[value + g * shift for value in row] for g, row in enumerate(implicit)]
    batch = make(torch.zeros(len(groups), len(groups[0])), reward=reward, valid=valid)
    return ranking(batch, implicit_GK=torch.tensor(implicit, dtype=torch.float64))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_by_hand(make: Make) -> None:
    """Group 1: r = 3, 1, 1; p(1 beats 2) = .81, p(1 beats 3) = .28. It ranks 3 first: reward 1 of at most 3. Of the
    pairs untied in r one is in order and one is not: tau 0. Group 2: r = 0, 4, equal a: both are first, tau 0. Group 3:
    r = 2, 2 has no pair and no tau. Group 4: p = .82, the right way: tau 1. Group 5 is padding.

    Pairs: p = .81, right; .28: confidence .72, wrong; .5, half right; .82, right. Bins of .05: [.8, .85) has a gap of
    .19 + .18, [.7, .75) of .72, [.5, .55) of 0. Calibration error 1.09 / 4."""
    a = [
        [0.0, -logit(0.81), -logit(0.28)],
        [0.4, 0.4, 99.0],
        [0.7, -0.7, 99.0],
        [logit(0.82), 0.0, 99.0],
        [99.0, 98.0, 97.0],
    ]
    batch = make(
        torch.zeros(5, 3),
        reward=[[3.0, 1.0, 1.0], [0.0, 4.0, 99.0], [2.0, 2.0, 99.0], [6.0, 5.0, 99.0], [1.0, 2.0, 3.0]],
        valid=[[True] * 3, [True, True, False], [True, True, False], [True, True, False], [False] * 3],
    )
    assert numbers(ranking(batch, implicit_GK=torch.tensor(a).double())) == pytest.approx(
        {
            "best_of_n": (1 + 2 + 2 + 6) / 4,
            "reward_mean": (5 / 3 + 2 + 2 + 5.5) / 4,
            "reward_max": (3 + 4 + 2 + 6) / 4,
            "kendall_tau": (0 + 0 + 1) / 3,
            "brier": (0.19**2 + 0.72**2 + 0.5**2 + 0.18**2) / 4,
            "calibration_error": 1.09 / 4,
        }
    )


def test_kendall_tau_with_ties_on_both_sides(make: Make) -> None:
    """tau-a, gamma, or a wrong tie correction: the example of SciPy's kendalltau, -0.47140452079103173."""
    batch = make(torch.zeros(1, 5), reward=[[12, 2, 1, 12, 2]])
    tau = numbers(ranking(batch, implicit_GK=torch.tensor([[1.0, 4.0, 7.0, 1.0, 0.0]])))["kendall_tau"]
    assert tau == pytest.approx(-0.47140452079103173, rel=1e-12)


def test_ends_of_the_scale(make: Make) -> None:
    """A certain pair that falls out of the last bin, or margins of 1e5 that give NaN. Half of the pairs are wrong with
    certainty. A model that knows nothing takes any response, and is calibrated."""
    batch = make(torch.zeros(2, 2), reward=[[1.0, 0.0], [1.0, 0.0]])
    certain = numbers(ranking(batch, implicit_GK=torch.tensor([[1e5, -1e5], [-1e5, 1e5]])))
    middle = {"best_of_n": 0.5, "reward_mean": 0.5, "reward_max": 1.0, "kendall_tau": 0.0}
    assert certain == {**middle, "brier": 0.5, "calibration_error": 0.5}
    assert numbers(ranking(batch, implicit_GK=torch.zeros(2, 2))) == {**middle, "brier": 0.25, "calibration_error": 0.0}


def test_a_true_bradley_terry_model_is_calibrated(make: Make) -> None:
    """A calibration error that a model with the right probabilities does not bring to 0; twice as sure of itself it is
    overconfident by E[sigmoid(2|d|) - sigmoid(|d|)], about 0.11 for d ~ Normal(0, 2)."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(20000, 2, generator=generator).double()
    first_is_better = torch.rand(20000, generator=generator) < torch.sigmoid(value[:, 0] - value[:, 1])
    batch = make(torch.zeros(20000, 2), reward=torch.stack([first_is_better, ~first_is_better], dim=1))
    error = {scale: numbers(ranking(batch, implicit_GK=scale * value))["calibration_error"] for scale in (1, 2)}
    margin = (value[:, 0] - value[:, 1]).abs()
    excess = (torch.sigmoid(2 * margin) - torch.sigmoid(margin)).mean().item()
    assert error[1] < 0.015
    assert error[2] == pytest.approx(excess, abs=0.015)


@settings(deadline=None)
@given(groups=GROUPS)
def test_against_plain_loops(make: Make, groups: Groups) -> None:
    """Sums over the wrong pairs or groups, a bin with a wrong edge, and what stands in invalid entries."""
    expected = _oracle([[(a, r) for a, r, valid in group if valid] for group in groups])
    assert numbers(ranked(make, groups)) == pytest.approx(expected)


@settings(deadline=None)
@given(groups=GROUPS, cut=st.integers(0, 10))
def test_sums_add_up_over_micro_batches(make: Make, groups: Groups, cut: int) -> None:
    """A calibration error or a correlation per micro-batch: two of them give the sums and counts of one."""
    whole = ranked(make, groups)
    parts = [ranked(make, part) for part in (groups[:cut], groups[cut:]) if part]
    for name, (total, count) in whole.items():
        assert math.isclose(total.item(), sum(part[name][0].item() for part in parts), rel_tol=1e-12, abs_tol=1e-12)
        assert count.item() == sum(part[name][1].item() for part in parts)


@settings(deadline=None)
@given(groups=GROUPS, shift=st.integers(-(2**20), 2**20))
def test_constants_of_groups_do_not_matter(make: Make, groups: Groups, shift: int) -> None:
    """An implicit reward judged by its unknown beta log Z(x): nothing may compare one group with another."""
    assert numbers(ranked(make, groups, shift=shift)) == pytest.approx(numbers(ranked(make, groups)), rel=1e-12)


def test_padding_alone_counts_nothing(make: Make) -> None:
    """An empty row that adds to a sum or a count, or turns it into NaN."""
    batch = make([[7.0, 8.0]], reward=[[5.0, 3.0]], valid=[[False, False]])
    for total, count in ranking(batch, implicit_GK=torch.ones(1, 2)).values():
        assert (total.item(), count.item()) == (0.0, 0.0)


def test_only_with_a_truth_and_a_model_of_it(make: Make) -> None:
    """A crash in the evaluation of a method that reads no reward or says nothing of it, or one that needs log-probs."""
    rewarded = make([[1.0, 2.0]], reward=[[1.0, 0.0]])
    value = torch.tensor([[0.5, 0.25]])
    assert ranking(make([[1.0, 2.0]]), implicit_GK=value) == {}
    assert ranking(rewarded, implicit_GK=None) == {}
    reward_model = dataclasses.replace(rewarded, logp_GK=None, value_GK=value)
    assert numbers(ranking(reward_model, implicit_GK=value))["best_of_n"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_fp64_scalars_that_never_visit_the_host(make: Make, dtype: torch.dtype) -> None:
    """Sums that lose digits over a store, and .item() or a data-dependent shape, which the meta device refuses."""
    batch = make([[-1.0, -2.0]], reward=[[1.0, 0.0]], dtype=dtype)
    columns = {name: value.to("meta") for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    stats = ranking(Responses(**columns), implicit_GK=columns["logp_GK"])
    assert len(stats) == 15
    assert all(part.shape == () and part.dtype == torch.float64 for statistic in stats.values() for part in statistic)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _oracle(groups: list[list[tuple[float, int]]]) -> dict[str, float]:
    filled = [group for group in groups if group]
    firsts = [[r for a, r in group if a == max(a for a, _ in group)] for group in filled]
    found: dict[str, list[float]] = {
        "best_of_n": [_mean(rewards) for rewards in firsts],
        "reward_mean": [_mean([r for _, r in group]) for group in filled],
        "reward_max": [max(r for _, r in group) for group in filled],
        "kendall_tau": [_tau_b(group) for group in filled if len({r for _, r in group}) > 1],
    }
    margins = [
        (a - b) * math.copysign(1, r - s) for group in groups for (a, r), (b, s) in combinations(group, 2) if r != s
    ]
    chances = [1 / (1 + math.exp(-margin)) for margin in margins]
    found["brier"] = [(1 - p) ** 2 for p in chances]
    numbers = {name: _mean(values) for name, values in found.items() if values}
    return numbers | ({"calibration_error": _calibration_error(chances)} if chances else {})


def _calibration_error(chances: list[float]) -> float:
    bins: list[list[tuple[float, float]]] = [[] for _ in range(10)]
    for p in chances:
        confidence, correct = max(p, 1 - p), 0.5 if p == 0.5 else float(p > 0.5)
        index = sum(confidence >= edge / 100 for edge in range(55, 100, 5))
        bins[index].append((confidence, correct))
    gaps = [abs(_mean([c for c, _ in pairs]) - _mean([c for _, c in pairs])) * len(pairs) for pairs in bins if pairs]
    return sum(gaps) / len(chances)


def _tau_b(group: list[tuple[float, int]]) -> float:
    def sign(x: float) -> int:
        return (x > 0) - (x < 0)

    signs = [(sign(a - b), sign(r - s)) for (a, r), (b, s) in combinations(group, 2)]
    untied = [sum(abs(pair[i]) for pair in signs) for i in range(2)]
    return sum(x * y for x, y in signs) / math.sqrt(untied[0] * untied[1]) if untied[0] else 0.0
