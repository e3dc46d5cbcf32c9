"""Which responses a method acts on: above all the seeded choice of a pair's opponent."""

from collections.abc import Callable

import pytest
import torch

from rpo_megatron.objectives.responses import Responses
from rpo_megatron.objectives.selections import best, best_or_all, pair, worse

Make = Callable[..., Responses]


@pytest.mark.parametrize("reward", [[5.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 5.0]])
def test_random_opponent_is_uniform_over_the_others(make: Make, reward: list[float]) -> None:
    """A draw that misses a candidate, favours one, or hits the best itself: 1200 evenly spaced draws, 3 candidates."""
    draws = (torch.arange(1200, dtype=torch.float64) + 0.5) / 1200
    batch = make(torch.zeros(1200, 4), reward=[reward] * 1200, draw=draws)
    chosen = pair(batch, pair="best_random")
    assert chosen.sum(1).unique().tolist() == [2]
    expected = [1200 if value == max(reward) else 400 for value in reward]
    assert chosen.sum(0).tolist() == expected


def test_draws_at_the_ends_stay_inside(make: Make) -> None:
    """floor(draw * n) = n for the largest draw below 1, which would select nobody."""
    largest = 1.0 - 2.0**-53
    for k in range(2, 12):
        batch = make(torch.zeros(2, k), reward=[[1.0] + [0.0] * (k - 1)] * 2, draw=[0.0, largest])
        chosen = pair(batch, pair="best_random")
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
    assert pair(alone, pair="best_random")[0].tolist() == pair(packed, pair="best_random")[1, :3].tolist()
    assert not pair(packed, pair="best_random")[1, 3:].any()


def test_ties(make: Make) -> None:
    """Best = the first of the maxima; a response that ties with it is never its opponent; no pair if all tie."""
    batch = make([[0.0] * 4] * 2, reward=[[1.0, 5.0, 5.0, 0.0], [2.0] * 4], draw=[0.99, 0.5])
    assert best(batch).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert worse(batch).tolist() == [[True, False, False, True], [False] * 4]
    assert pair(batch, pair="best_random").tolist() == [[False, True, False, True], [False] * 4]
    assert pair(batch, pair="best_worst").tolist() == [[False, True, False, True], [False] * 4]


def test_best_worst_ignores_draws_and_padding(make: Make) -> None:
    """The lowest reward of the padding (0) taken for the worst response; the first of two lowest is."""
    batch = make(
        [[0.0] * 4] * 3,
        reward=[[4.0, 2.0, 2.0, 0.0]] * 3,
        valid=[[True, True, True, False]] * 2 + [[False] * 4],
        draw=[0.0, 0.9, 0.0],
    )
    assert pair(batch, pair="best_worst").tolist() == [[True, True, False, False]] * 2 + [[False] * 4]


def test_best_or_all(make: Make) -> None:
    """sft learning from the wrong response, or from padding."""
    batch = make([[0.0] * 3], reward=[[-4.0, -2.0, 0.0]], valid=[[True, True, False]])
    assert best_or_all(batch, responses="best").tolist() == [[False, True, False]]
    assert best_or_all(batch, responses="all").tolist() == [[True, True, False]]
