"""WRPO (arXiv 2412.03187): golden numbers, its two ends, its gradient, its schedule, and groups that lack a part."""

import pytest
import torch

from tests.objectives.batches import (
    Batch,
    Make,
    assert_same,
    fp64,
    gradient,
    losses_of,
    objective,
    random_batch,
    take,
    with_columns,
)

WS, WT, L = 2, 0, 3
"""Where the triple of the group below stands: best of the sources, best and worst of the policy's own."""


@pytest.fixture
def group(make: Make) -> Batch:
    """beta rho = .7, .2, -.4 of ws, wt, l at beta = .5; a worse source and an own response in between do not matter."""
    rho = fp64([[0.2, 9.0, 0.7, -0.4, 5.0]]) / 0.5
    ref = fp64([[-30.0, -31.0, -32.0, -33.0, -34.0]])
    return make(
        ref + rho,
        ref=ref,
        reward=[[3.0, 1.0, 2.0, 0.0, 1.5]],
        source=[[False, True, True, False, False]],
        length=[[3, 4, 5, 6, 7]],
    )


@pytest.mark.parametrize(("weight", "loss"), [(0.0, 0.4374879505), (0.1, 0.4200553357), (1.0, 0.2873353251)])
def test_golden_numbers(group: Batch, weight: float, loss: float) -> None:
    """The weight on the wrong response, a length in the log-ratio, or another than the best and worst responses."""
    method = objective("wrpo", beta=0.5, source_weight=weight)
    assert losses_of(method, group).item() == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize(("weight", "chosen"), [(0.0, WT), (1.0, WS)])
def test_ends_are_dpo(group: Batch, weight: float, chosen: int) -> None:
    """Weight 0 that is not DPO of the own pair, weight 1 that is not DPO of the source against the worst own one."""
    two = with_columns(take(group, [0], [chosen, L]), reward_GK=fp64([[1.0, 0.0]]))
    dpo = gradient(objective("dpo", beta=0.5), two)
    loss, slope = gradient(objective("wrpo", beta=0.5, source_weight=weight), group)
    torch.testing.assert_close(loss, dpo[0])
    torch.testing.assert_close(slope[:, [chosen, L]], dpo[1])
    assert slope.count_nonzero() == 2


@pytest.mark.parametrize("weight", [0.1, 0.4])
def test_gradient_splits_as_the_weights(group: Batch, weight: float) -> None:
    """alpha : 1 - alpha : -1 over ws, wt, l, and nothing for the others; not even the source's weight is detached."""
    slope = gradient(objective("wrpo", beta=0.5, source_weight=weight), group)[1][0]
    expected = torch.zeros(5, dtype=torch.float64)
    expected[WS], expected[WT], expected[L] = weight, 1 - weight, -1
    torch.testing.assert_close(-slope / slope[L], expected)
    assert slope[WS] < 0


def test_schedule(make: Make) -> None:
    """A weight that does not grow from 0 to source_weight, or grows although it is to be constant."""
    batch = random_batch(make, 3, 12, 5)
    linear = objective("wrpo", source_weight=0.8)
    constant = objective("wrpo", source_weight=0.8, source_schedule="constant")
    assert len({losses_of(linear.at(progress), batch).sum().item() for progress in (0.0, 0.25, 1.0)}) == 3
    for progress in (0.0, 0.25, 1.0):
        same = objective("wrpo", source_weight=0.8 * progress, source_schedule="constant")
        assert_same(linear.at(progress), same, batch)
        assert_same(constant.at(progress), constant, batch)
    assert_same(linear, linear.at(1.0), with_columns(batch, progress=0.0))  # the objective's progress, not the batch's


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"source_GK": [[False] * 5]}, "no source"),
        ({"source_GK": [[False, True, True, True, True]]}, "one own response"),
        ({"source_GK": [[True] * 5]}, "no own response"),
        ({"valid_GK": [[True, False, False, True, True]]}, "the sources are padding"),
        ({"valid_GK": [[False, True, True, True, False]]}, "the other own ones are padding"),
        ({"reward_GK": [[1.0, 5.0, 6.0, 1.0, 1.0]]}, "the own ones tie"),
        ({"valid_GK": [[False] * 5]}, "padding"),
    ],
)
def test_groups_that_lack_a_part(group: Batch, change: dict[str, list[list[float]]], why: str) -> None:
    """A pair of a source and nothing, or of a response with itself: such a group gives no loss and no gradient."""
    columns = {name: torch.tensor(value, dtype=getattr(group, name).dtype) for name, value in change.items()}
    loss, slope = gradient(objective("wrpo", beta=0.5), with_columns(group, **columns))
    assert loss.item() == 0, why
    assert not slope.any()


def test_anchor_sees_the_whole_group(group: Batch) -> None:
    """An anchor over the mixture's two rows: it is the likelihood of the best response of all."""
    found = losses_of(objective("wrpo", beta=0.5, nll_weight=2.0), group) - losses_of(
        objective("wrpo", beta=0.5), group
    )
    assert found.item() == pytest.approx(2.0 * (30.0 - 0.4) / 3)
