"""Logged statistics, by hand on one batch."""

import math
from collections.abc import Callable

import pytest
import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.statistics import Stats, collect, without_rounding

Make = Callable[..., Responses]


def means(stats: Stats) -> dict[str, float]:
    return {name: (total / count).item() for name, (total, count) in stats.items()}


def test_rounding_orders_nothing(make: Make) -> None:
    """Catches an accuracy that a stored reference's last bit decides while the policy is still the reference, and a
    threshold that swallows a real difference."""
    ref = [[-1000.0, -800.0]]
    noise = make([[-1000.0003, -799.9998]], ref=ref, reward=[[1.0, 0.0]])
    assert means(collect(without_rounding(noise), implicit_GK=_log_ratio(noise)))["accuracy"] == 0.5
    short = make([[-3.000004, -4.0]], ref=[[-3.0, -4.0]], reward=[[1.0, 0.0]])
    assert means(collect(without_rounding(short), implicit_GK=_log_ratio(short)))["accuracy"] == 0.5
    real = make([[-1000.01, -799.99]], ref=ref, reward=[[1.0, 0.0]])
    assert means(collect(without_rounding(real), implicit_GK=_log_ratio(real)))["accuracy"] == 0.0


def _log_ratio(batch: Responses) -> torch.Tensor:
    batch = without_rounding(batch)
    assert batch.ref_logp_GK is not None
    return batch.logp_GK - batch.ref_logp_GK


def test_by_hand(make: Make) -> None:
    """Group 1: r = 3 > 1 = 1, a = .2, .1, .5: of the two ordered pairs one is right. Group 2 (K = 2): r = 0 < 4 and
    equal a, half right. Group 3 has equal rewards, group 4 is padding. accuracy = (1 + .5) / 3; margin =
    ((.2 - .3) + (.4 - .4)) / 2; kl over 7 responses; ties 1 of 3 groups."""
    a = torch.tensor([[0.2, 0.1, 0.5], [0.4, 0.4, 99.0], [0.7, -0.7, 99.0], [99.0, 99.0, 99.0]]).double()
    batch = make(
        [[-10.0, -20.0, -30.0], [-5.0, -6.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]],
        ref=[[-11.0, -19.0, -30.0], [-5.0, -5.0, 9.0], [-1.0, 5.0, 9.0], [9.0, 9.0, 9.0]],
        reward=[[3.0, 1.0, 1.0], [0.0, 4.0, 9.0], [2.0, 2.0, 9.0], [0.0, 0.0, 0.0]],
        valid=[[True] * 3, [True, True, False], [True, True, False], [False] * 3],
    )
    assert means(collect(batch, implicit_GK=a)) == pytest.approx(
        {
            "accuracy": 0.5,
            "margin": -0.05,
            "reward_best": 0.3,
            "reward_rest": 0.35,
            "logp_best": -8.0,
            "logp_rest": -15.0,
            "kl": (-1 + 1 + 0 + 0 + 1 + 0 + 7) / 7,
            "ties": 1 / 3,
        }
    )


@pytest.mark.parametrize("k", [2, 3, 5])
def test_accuracy_of_chance_is_one_half(make: Make, k: int) -> None:
    """A chance level that depends on K: exactly 1/2 for a constant implicit reward, near it for a random one."""
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(2000, k, generator=generator)
    batch = make(torch.zeros(2000, k), ref=torch.zeros(2000, k), reward=reward)
    noise = torch.rand(2000, k, generator=generator).double()
    assert means(collect(batch, implicit_GK=torch.zeros(2000, k).double()))["accuracy"] == 0.5
    assert means(collect(batch, implicit_GK=noise))["accuracy"] == pytest.approx(0.5, abs=0.03)
    assert means(collect(batch, implicit_GK=reward.double()))["accuracy"] == 1.0


def test_padding_alone_counts_nothing(make: Make) -> None:
    """An empty row that adds to a sum or a count, or turns it into NaN."""
    batch = make([[7.0]], ref=[[1.0]], reward=[[5.0]], valid=[[False]])
    for total, count in collect(batch, implicit_GK=torch.ones(1, 1).double()).values():
        assert (total.item(), count.item()) == (0.0, 0.0)


def test_only_what_the_columns_allow(make: Make) -> None:
    """A statistic of rewards or of the reference for a method that reads none."""
    assert collect(make([[1.0, 2.0]]), implicit_GK=None) == {}
    assert set(collect(make([[1.0, 2.0]], reward=[[1.0, 0.0]]), implicit_GK=None)) == {"logp_best", "logp_rest", "ties"}


def test_sums_add_up_over_micro_batches(make: Make) -> None:
    """Statistics that are means of means: two micro-batches give the sums and counts of one."""
    generator = torch.Generator().manual_seed(1)
    logp, ref, reward = torch.randn(3, 6, 4, generator=generator)
    valid = torch.rand(6, 4, generator=generator) < 0.8

    def stats(rows: slice) -> Stats:
        batch = make(logp[rows], ref=ref[rows], reward=reward[rows], valid=valid[rows])
        return collect(batch, implicit_GK=(logp - ref)[rows].double())

    whole, parts = stats(slice(None)), [stats(slice(0, 2)), stats(slice(2, None))]
    for name, (total, count) in whole.items():
        assert math.isclose(total.item(), sum(part[name][0].item() for part in parts), rel_tol=1e-12)
        assert count.item() == sum(part[name][1].item() for part in parts)
