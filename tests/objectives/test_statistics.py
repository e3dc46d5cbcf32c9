"""Logged statistics: by hand on one batch, against plain loops, and under what must not matter to them."""

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.statistics import CALIBRATION_BINS, Stats, collect, summarise, without_rounding

Make = Callable[..., Responses]
Groups = list[list[tuple[float, int, int, bool]]]
"""Implicit reward, explicit reward, length and validity of each response of each group."""

HALVES = st.integers(-3, 3).map(lambda n: n / 2)  # few values, so that ties are common; sums of them are exact
RESPONSE = st.tuples(HALVES, st.integers(0, 2), st.integers(1, 5), st.booleans())
GROUPS = st.integers(1, 4).flatmap(lambda k: st.lists(st.lists(RESPONSE, min_size=k, max_size=k), min_size=1))


def numbers(stats: Stats) -> dict[str, float]:
    sums = {name: total.item() for name, (total, _) in stats.items()}
    return summarise(sums, {name: count.item() for name, (_, count) in stats.items()})


def collected(make: Make, groups: Groups, *, shift: float = 0.0) -> Stats:
    """Statistics of such groups, with a constant added to the implicit rewards that grows from group to group."""
    implicit, reward, length, valid = ([[response[n] for response in group] for group in groups] for n in range(4))
    implicit = [[value + g * shift for value in row] for g, row in enumerate(implicit)]
    batch = make(torch.zeros(len(groups), len(groups[0])), reward=reward, length=length, valid=valid)
    return collect(batch, implicit_GK=torch.tensor(implicit, dtype=torch.float64))


def test_rounding_orders_nothing(make: Make) -> None:
    """Catches an accuracy that a stored reference's last bit decides while the policy is still the reference, and a
    threshold that swallows a real difference."""
    ref = [[-1000.0, -800.0]]
    noise = make([[-1000.0003, -799.9998]], ref=ref, reward=[[1.0, 0.0]])
    assert numbers(collect(without_rounding(noise), implicit_GK=_log_ratio(noise)))["accuracy"] == 0.5
    short = make([[-3.000004, -4.0]], ref=[[-3.0, -4.0]], reward=[[1.0, 0.0]])
    assert numbers(collect(without_rounding(short), implicit_GK=_log_ratio(short)))["accuracy"] == 0.5
    real = make([[-1000.01, -799.99]], ref=ref, reward=[[1.0, 0.0]])
    assert numbers(collect(without_rounding(real), implicit_GK=_log_ratio(real)))["accuracy"] == 0.0


def _log_ratio(batch: Responses) -> torch.Tensor:
    batch = without_rounding(batch)
    assert batch.ref_logp_GK is not None
    return batch.logp_GK - batch.ref_logp_GK


def test_by_hand(make: Make) -> None:
    """Group 1: r = 3 > 1 = 1, a = .2, .1, .5: of the two ordered pairs one is right. Group 2 (K = 2): r = 0 < 4 and
    equal a, half right. Group 3 has equal rewards, group 4 is padding. accuracy = (1 + .5) / 3; margin =
    ((.2 - .3) + (.4 - .4)) / 2; kl over 7 responses; ties 1 of 3 groups.

    Deviations of a from the groups' means, times 30: -2, -5, 7, 0, 0, 21, -21; of the lengths 4, 6, 2, 3, 5, 1, 9:
    0, 2, -2, -1, 1, -4, 4. Their products sum to -192, their squares to 960 and 42."""
    a = torch.tensor([[0.2, 0.1, 0.5], [0.4, 0.4, 99.0], [0.7, -0.7, 99.0], [99.0, 99.0, 99.0]]).double()
    batch = make(
        [[-10.0, -20.0, -30.0], [-5.0, -6.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]],
        ref=[[-11.0, -19.0, -30.0], [-5.0, -5.0, 9.0], [-1.0, 5.0, 9.0], [9.0, 9.0, 9.0]],
        reward=[[3.0, 1.0, 1.0], [0.0, 4.0, 9.0], [2.0, 2.0, 9.0], [0.0, 0.0, 0.0]],
        valid=[[True] * 3, [True, True, False], [True, True, False], [False] * 3],
        length=[[4, 6, 2], [3, 5, 99], [1, 9, 99], [99, 99, 99]],
    )
    batch = dataclasses.replace(
        batch, token_kl_GK=torch.tensor([[4.0, 3.0, 0.0], [1.5, 0.0, 9.0], [0.0, 18.0, 9.0], [9.0] * 3]).double()
    )
    assert numbers(collect(batch, implicit_GK=a)) == pytest.approx(
        {
            "accuracy": 0.5,
            "margin": -0.05,
            "reward_best": 0.3,
            "reward_rest": 0.35,
            "logp_best": -8.0,
            "logp_rest": -15.0,
            "kl": (-1 + 1 + 0 + 0 + 1 + 0 + 7) / 7,
            "token_kl": (1 + 0.5 + 0 + 0.5 + 0 + 0 + 2) / 7,
            "ties": 1 / 3,
            "length_correlation": -192 / math.sqrt(960 * 42),
        }
    )


@pytest.mark.parametrize("k", [2, 3, 5])
def test_accuracy_of_chance_is_one_half(make: Make, k: int) -> None:
    """A chance level that depends on K: exactly 1/2 for a constant implicit reward, near it for a random one."""
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(2000, k, generator=generator)
    batch = make(torch.zeros(2000, k), ref=torch.zeros(2000, k), reward=reward)
    noise = torch.rand(2000, k, generator=generator).double()
    assert numbers(collect(batch, implicit_GK=torch.zeros(2000, k).double()))["accuracy"] == 0.5
    assert numbers(collect(batch, implicit_GK=noise))["accuracy"] == pytest.approx(0.5, abs=0.03)
    assert numbers(collect(batch, implicit_GK=reward.double()))["accuracy"] == 1.0


def test_padding_alone_counts_nothing(make: Make) -> None:
    """An empty row that adds to a sum or a count, or turns it into NaN."""
    batch = make([[7.0]], ref=[[1.0]], reward=[[5.0]], valid=[[False]])
    batch = dataclasses.replace(batch, token_kl_GK=batch.logp_GK)
    for total, count in collect(batch, implicit_GK=torch.ones(1, 1).double()).values():
        assert (total.item(), count.item()) == (0.0, 0.0)


def test_only_what_the_columns_allow(make: Make) -> None:
    """A statistic of a column that the method does not read, and one that is forgotten for a reward model, which has no
    log-probabilities."""
    moments = {"_implicit_implicit", "_implicit_length", "_length_length"}
    compared = {"accuracy", "margin", "reward_best", "reward_rest", "ties"}
    value = torch.tensor([[0.5, 0.25]]).double()
    bare = make([[1.0, 2.0]])
    assert collect(bare, implicit_GK=None) == {}
    assert set(collect(bare, implicit_GK=value)) == moments
    rewarded = make([[1.0, 2.0]], reward=[[1.0, 0.0]])
    assert set(collect(rewarded, implicit_GK=None)) == {"logp_best", "logp_rest", "ties"}
    reward_model = dataclasses.replace(rewarded, logp_GK=None, value_GK=value, ref_logp_GK=rewarded.logp_GK)
    assert set(collect(reward_model, implicit_GK=value)) == moments | compared
    assert without_rounding(reward_model) is reward_model


@settings(deadline=None)
@given(groups=GROUPS, cut=st.integers(0, 10))
def test_sums_add_up_over_micro_batches(make: Make, groups: Groups, cut: int) -> None:
    """Statistics that are means of means: two micro-batches give the sums and counts of one."""
    whole = collected(make, groups)
    parts = [collected(make, part) for part in (groups[:cut], groups[cut:]) if part]
    for name, (total, count) in whole.items():
        assert math.isclose(total.item(), sum(part[name][0].item() for part in parts), rel_tol=1e-12, abs_tol=1e-12)
        assert count.item() == sum(part[name][1].item() for part in parts)


@settings(deadline=None)
@given(groups=GROUPS, shift=st.integers(-(2**20), 2**20))
def test_constants_of_groups_do_not_matter(make: Make, groups: Groups, shift: int) -> None:
    """A comparison across groups: it would depend on the unknown beta log Z(x) of each prompt."""
    before, after = (numbers(collected(make, groups, shift=constant)) for constant in (0, shift))
    assert before.keys() == after.keys()
    for name in before.keys() - {"reward_best", "reward_rest"}:
        assert math.isclose(before[name], after[name], rel_tol=1e-9, abs_tol=1e-9), name


@settings(deadline=None)
@given(groups=GROUPS)
def test_against_plain_loops(make: Make, groups: Groups) -> None:
    """Sums over the wrong pairs, means with the wrong divisor, and what stands in invalid entries."""
    agreements, deviations = [], []
    for group in groups:
        valid = [(a, r, n) for a, r, n, is_valid in group if is_valid]
        for one, other in combinations(valid, 2):
            (a, r, _), (b, s, _) = (one, other) if one[1] > other[1] else (other, one)
            agreements += [] if r == s else [0.5 if a == b else float(a > b)]
        mean_a, mean_n = (sum(v[i] for v in valid) / max(len(valid), 1) for i in (0, 2))
        deviations += [(a - mean_a, n - mean_n) for a, _, n in valid]
    moments = [sum(pair[i] * pair[j] for pair in deviations) for i, j in ((0, 0), (0, 1), (1, 1))]
    found = numbers(collected(make, groups))
    assert found.get("accuracy") == (pytest.approx(sum(agreements) / len(agreements)) if agreements else None)
    varies = min(moments[0], moments[2]) > 1e-9  # a variance of 0 may be 1e-33 after such a mean
    correlation = moments[1] / math.sqrt(moments[0] * moments[2]) if varies else None
    assert found.get("length_correlation") == (pytest.approx(correlation, abs=1e-12) if varies else None)


def test_length_correlation_of_nothing_that_varies(make: Make) -> None:
    """Noise over noise: three times 0.1 has a mean that is not 0.1. And lengths that differ only between groups."""
    batch = make(torch.zeros(2, 3), length=[[1, 5, 9], [2, 4, 6]])
    flat = torch.full((2, 3), 0.1).double()
    assert numbers(collect(batch, implicit_GK=flat)) == {}
    between = make(torch.zeros(2, 3), length=[[3, 3, 3], [8, 8, 8]])
    assert numbers(collect(between, implicit_GK=torch.rand(2, 3).double())) == {}
    rising = torch.tensor([[1.0, 5.0, 9.0], [-70.0, -68.0, -66.0]]).double()
    assert numbers(collect(batch, implicit_GK=rising)) == {"length_correlation": pytest.approx(1.0)}
    assert numbers(collect(batch, implicit_GK=-rising)) == {"length_correlation": pytest.approx(-1.0)}


def test_summarise_by_hand() -> None:
    """Division by a count of zero, parts that are logged, and a NaN that comes out as a perfect correlation. Gaps of
    the bins: .6 + .2 = .8 over 8 pairs."""
    sums = {"loss": 3.0, "kl": 0.0, "_implicit_implicit": 4.0, "_implicit_length": -3.0, "_length_length": 9.0}
    counts = {"loss": 4.0, "kl": 0.0, "_implicit_implicit": 5.0, "_implicit_length": 5.0, "_length_length": 5.0}
    bins, nums = dict.fromkeys(CALIBRATION_BINS, 0.0), dict.fromkeys(CALIBRATION_BINS, 0.0)
    assert summarise(sums, counts) == {"loss": 0.75, "length_correlation": -0.5}
    assert summarise(bins, nums) == {}
    bins |= {"_calibration_0": 0.6, "_calibration_7": -0.2}
    nums |= {"_calibration_0": 3.0, "_calibration_7": 5.0}
    assert summarise(bins, nums) == {"calibration_error": pytest.approx(0.1)}
    assert math.isnan(summarise({**sums, "_implicit_length": math.nan}, counts)["length_correlation"])
    assert summarise({}, {}) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_fp64_scalars_that_never_visit_the_host(make: Make, dtype: torch.dtype) -> None:
    """Sums that lose digits over a run, and .item() in a step: the meta device has no values to read."""
    batch = make([[-1.0, -2.0]], ref=[[-1.5, -2.5]], reward=[[1.0, 0.0]], dtype=dtype)
    columns = {name: value.to("meta") for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    stats = collect(Responses(**columns, token_kl_GK=columns["logp_GK"]), implicit_GK=columns["logp_GK"])
    assert len(stats) == 12
    assert all(part.shape == () and part.dtype == torch.float64 for statistic in stats.values() for part in statistic)
