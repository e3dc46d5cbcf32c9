"""A training step on several processes: its profile, and its stored reference."""

import json
from pathlib import Path

import pytest

from rpo_megatron.config_io import dump
from tests import tiny
from tests.parallel.launch import rpo


@pytest.mark.parallel
def test_profile_and_stored_reference_of_a_pipeline(tmp_path: Path) -> None:
    """Catches a rank that decides for itself whether there is a reference to make (the others would wait for it), a
    store that is scored into by all, a table that is printed by all, and waiting for other stages that looks like
    computation."""
    (tmp_path / "run.yaml").write_text(dump(tiny.run_config(tmp_path, "train.steps=4")))
    yaml, layout = str(tmp_path / "run.yaml"), ["parallel.pipeline=2", "reference.mode=stored"]
    done = rpo("train", yaml, *layout, "profile.steps=1", processes=2)
    assert done.returncode == 0, done.stdout[-3000:]
    for once in (
        "one pass over it with the reference comes first",
        "scored ",
        "profile of steps 3 to 3",
        "  pipeline ",
    ):
        assert done.stdout.count(once) == 1, once
    folder = tmp_path / "run" / "profile"
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["ranks"]) == 2
    for i, rank in enumerate(summary["ranks"]):
        phases, operations = rank["phases"], rank["operations"]
        assert phases["pipeline"] > 0
        assert sum(phases.values()) == pytest.approx(2 * phases["step"])
        assert (operations.get("output head", 0.0) > 0.01) == (i == 1), "only the last stage has one"
        assert ("embedding" in operations) == (i == 0)
        assert operations["communication"] > 0
        assert json.loads((folder / f"trace-rank{i}.json").read_text())["traceEvents"]
