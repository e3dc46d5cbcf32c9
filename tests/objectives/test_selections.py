"""Which responses a method acts on: above all the seeded choice of a pair's opponent, and what becomes of the rows."""

import pytest
import torch

from rpo_megatron.objectives.selections import Selection, all_responses, best, pair, weighted_sources, worse
from tests.objectives.batches import Batch, Make


def mask(batch: Batch, how: str) -> torch.Tensor:
    selection = pair(batch, pair=how)
    assert selection.batch is batch  # a part of each group, not new rows
    return selection.mask_RK


@pytest.mark.parametrize("reward", [[5.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 5.0]])
def test_random_opponent_is_uniform_over_the_others(make: Make, reward: list[float]) -> None:
    """A draw that misses a candidate, favours one, or hits the best itself: 1200 evenly spaced draws, 3 candidates."""
    draws = (torch.arange(1200, dtype=torch.float64) + 0.5) / 1200
    batch = make(torch.zeros(1200, 4), reward=[reward] * 1200, draw=draws)
    chosen = mask(batch, "best_random")
    assert chosen.sum(1).unique().tolist() == [2]
    expected = [1200 if value == max(reward) else 400 for value in reward]
    assert chosen.sum(0).tolist() == expected


def test_draws_at_the_ends_stay_inside(make: Make) -> None:
    """floor(draw * n) = n for the largest draw below 1, which would select nobody."""
    largest = 1.0 - 2.0**-53
    for k in range(2, 12):
        batch = make(torch.zeros(2, k), reward=[[1.0] + [0.0] * (k - 1)] * 2, draw=[0.0, largest])
        chosen = mask(batch, "best_random")
        assert chosen[0].nonzero().flatten().tolist() == [0, 1]
        assert chosen[1].nonzero().flatten().tolist() == [0, k - 1]


def test_choice_does_not_depend_on_the_rest_of_the_row(make: Make) -> None:
    """A pair that changes with packing: the same group alone, and beside others in a wider row."""
    alone = make([[0.0] * 3], reward=[[1.0, 3.0, 2.0]], draw=[0.7])
    packed = make(
        [[0.0] * 5] * 2,
        reward=[[9.0, 8.0, 7.0, 6.0, 5.0], [1.0, 3.0, 2.0, 0.0, 0.0]],
        valid=[[True] * 5, [True, True, True, False, False]],
        draw=[0.1, 0.7],
    )
    assert mask(alone, "best_random")[0].tolist() == mask(packed, "best_random")[1, :3].tolist()
    assert not mask(packed, "best_random")[1, 3:].any()


def test_ties(make: Make) -> None:
    """Best = the first of the maxima; a response that ties with it is never its opponent; no pair if all tie."""
    batch = make([[0.0] * 4] * 2, reward=[[1.0, 5.0, 5.0, 0.0], [2.0] * 4], draw=[0.99, 0.5])
    assert best(batch).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert worse(batch).tolist() == [[True, False, False, True], [False] * 4]
    assert mask(batch, "best_random").tolist() == [[False, True, False, True], [False] * 4]
    assert mask(batch, "best_worst").tolist() == [[False, True, False, True], [False] * 4]


def test_best_worst_ignores_draws_and_padding(make: Make) -> None:
    """The lowest reward of the padding (0) taken for the worst response; the first of two lowest is."""
    batch = make(
        [[0.0] * 4] * 3,
        reward=[[4.0, 2.0, 2.0, 0.0]] * 3,
        valid=[[True, True, True, False]] * 2 + [[False] * 4],
        draw=[0.0, 0.9, 0.0],
    )
    assert mask(batch, "best_worst").tolist() == [[True, True, False, False]] * 2 + [[False] * 4]


def test_all_responses_are_the_valid_ones(make: Make) -> None:
    """A K-way method that sees padding or only the best."""
    batch = make([[0.0] * 3], reward=[[-4.0, -2.0, 0.0]], valid=[[True, True, False]])
    assert all_responses(batch).mask_RK.tolist() == [[True, True, False]]


def test_rows_of_all_pairs(make: Make) -> None:
    """A pair that is missing, counted twice, tied, of two groups or with padding; columns that lose their response."""
    batch = make(
        [[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]],
        value=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
        ref=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
        token_kl=[[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]],
        reward=[[7.0, 9.0, 7.0], [1.0, 2.0, 3.0]],
        rewards=[[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], [[4.0, 40.0], [5.0, 50.0], [6.0, 60.0]]],
        source=[[True, False, False], [False, True, False]],
        valid=[[True] * 3, [True, True, False]],
        length=[[1, 2, 3], [4, 5, 0]],
        draw=[0.25, 0.75],
    )
    selection = pair(batch, pair="all_pairs")
    rows: Batch = selection.batch
    assert rows.logp_GK.tolist() == [[-1, -2], [-1, -3], [-2, -3], [-4, -5], [-4, -6], [-5, -6]]
    assert selection.mask_RK.tolist() == [[True] * 2, [False] * 2, [True] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert rows.valid_GK.tolist() == selection.mask_RK.tolist()
    assert rows.draw_G.tolist() == [0.25] * 3 + [0.75] * 3
    assert rows.length_GK.tolist() == [[1, 2], [1, 3], [2, 3], [4, 5], [4, 0], [5, 0]]
    assert rows.source_GK.tolist()[:3] == [[True, False], [True, False], [False, False]]
    assert rows.rewards_GKM[3].tolist() == [[4.0, 40.0], [5.0, 50.0]]
    for name in ("value_GK", "ref_logp_GK", "token_kl_GK", "reward_GK"):
        assert getattr(rows, name)[1].tolist() == getattr(batch, name)[0, [0, 2]].tolist(), name


def test_rows_become_groups_by_their_mean(make: Make) -> None:
    """Rows that do not count but are averaged, or let NaN into a group; a sum; rows that go to another group."""
    mask_RK = torch.tensor([[True, True], [False, False], [True, True], [False, False], [False, False], [False, False]])
    selection = Selection(batch=make([[0.0, 0.0]]), mask_RK=mask_RK)
    losses_R = torch.tensor([1.0, torch.nan, 3.0, torch.nan, torch.inf, 7.0])
    assert selection.per_group(losses_R, num_groups=2).tolist() == [2.0, 0.0]
    assert selection.per_group(losses_R, num_groups=6).tolist() == [1.0, 0.0, 3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("how", ["best_random", "best_worst", "all_pairs"])
def test_a_group_of_one_has_no_pair(make: Make, how: str) -> None:
    """A crash on the widths 1: a micro-batch of padding, or of groups that lost all but one response."""
    batch = make([[-1.0], [-2.0]], reward=[[1.0], [2.0]], valid=[[True], [False]])
    selection = pair(batch, pair=how)
    assert not selection.mask_RK.any()
    assert selection.per_group(torch.zeros(len(selection.mask_RK)), num_groups=2).tolist() == [0.0, 0.0]


def test_mixture_of_sources(make: Make) -> None:
    """WRPO's three responses: the best source (here the worst response of all counts too, if it is the only source),
    the best and the worst of the own ones; ties take the first, junk behind the padding is nobody."""
    batch = make(
        [[-1.0, -2.0, -4.0, -8.0, 99.0]] * 2,
        ref=[[-0.5, -1.0, -2.0, -3.0, 77.0]] * 2,
        reward=[[3.0, 5.0, 5.0, 1.0, 100.0], [3.0, 5.0, 5.0, 1.0, -100.0]],
        source=[[False, True, True, False, True], [False, False, False, True, False]],
        valid=[[True, True, True, True, False]] * 2,
        progress=0.5,
    )
    constant = weighted_sources(batch, source_weight=0.25, source_schedule="constant")
    rows: Batch = constant.batch
    assert rows.logp_GK.tolist() == [[0.25 * -2 + 0.75 * -1, -8], [0.25 * -8 + 0.75 * -2, -1]]
    assert rows.ref_logp_GK.tolist() == [[0.25 * -1 + 0.75 * -0.5, -3], [0.25 * -3 + 0.75 * -1, -0.5]]
    assert constant.mask_RK.all()
    assert best(rows).tolist() == [[True, False]] * 2
    linear: Batch = weighted_sources(batch, source_weight=0.5, source_schedule="linear").batch
    assert linear.logp_GK.tolist() == rows.logp_GK.tolist()
