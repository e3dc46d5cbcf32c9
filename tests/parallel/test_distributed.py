"""The collectives that are ours."""

import os
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import gather_objects, on_leader, start
from rpo_megatron.errors import UserError
from tests.parallel import launch


def places() -> list[Any]:
    """One process's place in tensor 2 x data 2 (groups cannot be pickled), and how many threads it has more than with
    the groups of the layout before."""
    start(ParallelConfig())
    before = threads()
    groups = start(ParallelConfig(tensor=2))
    return [groups.tp.rank, groups.pp.rank, groups.dp.rank, groups.speaks_for_data, threads() - before]


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def leader_results() -> list[str]:
    """What every rank gets of a success, a user's mistake, a full disk and a bug on rank 0."""
    groups = start(ParallelConfig())
    seen = [on_leader(lambda: f"from rank {groups.rank}")]
    for error in (UserError("no such file"), OSError("disk full"), KeyError("bug")):
        try:
            on_leader(lambda error=error: _raise(error))
        except Exception as caught:
            seen.append(f"{type(caught).__name__}: {caught}")
    seen.append(str(gather_objects(groups.rank)))
    return seen


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parallel
def test_places_and_leader(tmp_path: Path) -> None:
    """Catches an axis order other than megatron's, groups of another layout that live on with dozens of threads, and
    ranks left waiting when the leader fails over a file."""
    found = launch.run("tests.parallel.test_distributed:places", processes=4, directory=tmp_path / "a")
    assert max(place.pop() for place in found) < 20
    assert found == [[0, 0, 0, True], [1, 0, 0, False], [0, 0, 1, True], [1, 0, 1, False]]
    first, second = launch.run("tests.parallel.test_distributed:leader_results", processes=2, directory=tmp_path / "b")
    user = ["from rank 0", "UserError: no such file", "UserError: disk full"]
    assert first == [*user, "KeyError: 'bug'", "[0, 1]"]
    assert second == [*user, "UserError: 'bug'", "[0, 1]"]
