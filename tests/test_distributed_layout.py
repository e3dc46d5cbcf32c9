"""Which numbers of processes a layout can have; told before anything starts."""

import pytest

from rpo_megatron.config import ParallelConfig
from rpo_megatron.errors import UserError
from rpo_megatron.processes import check_world


@pytest.mark.parametrize(
    ("parallel", "world"),
    [
        (ParallelConfig(), 3),
        (ParallelConfig(tensor=2, pipeline=2, context=2), 16),
        (ParallelConfig(tensor=2, expert=4), 4),
        (ParallelConfig(pipeline=2, expert=2), 4),
    ],
)
def test_possible(parallel: ParallelConfig, world: int) -> None:
    """Catches a layout that is refused though it fits."""
    check_world(parallel, world)


@pytest.mark.parametrize(
    ("parallel", "world", "says"),
    [
        (ParallelConfig(tensor=2, pipeline=2), 6, "needs a multiple of 4 processes, got 6"),
        (ParallelConfig(tensor=2, context=2), 6, r"parallel\.context=2 needs a multiple of 4 processes"),
        (ParallelConfig(tensor=2, expert=4), 6, r"parallel\.expert=4 does not divide the 6 processes"),
        (ParallelConfig(pipeline=2, expert=4), 4, r"parallel\.expert=4 does not divide the 2 processes"),
    ],
)
def test_impossible(parallel: ParallelConfig, world: int, says: str) -> None:
    """Catches a layout that would leave processes over, or megatron's own words about it."""
    with pytest.raises(UserError, match=says):
        check_world(parallel, world)
