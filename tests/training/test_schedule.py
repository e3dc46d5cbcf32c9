"""A knob with a schedule sees the share of the run that is done, in training and in evaluation, resumed or not."""

from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.objectives.objective import Objective
from rpo_megatron.training import evaluate, train
from tests import tiny
from tests.training.conftest import Rpo


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """The progress of the objective of every training step, and of every evaluation."""
    progress: dict[str, list[float]] = {"train": [], "valid": []}
    step, run = train.train_step, evaluate.Evaluation.run

    def train_step(model: Any, optimizer: Any, batches: Any, objective: Objective, **options: Any) -> Any:
        progress["train"].append(objective.progress)
        return step(model, optimizer, batches, objective, **options)

    def evaluation(self: Any, model: Any, objective: Objective) -> Any:
        progress["valid"].append(objective.progress)
        return run(self, model, objective)

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(evaluate.Evaluation, "run", evaluation)
    return progress


def test_progress_of_steps_and_evaluations(tmp_path: Path, rpo: Rpo, seen: dict[str, list[float]]) -> None:
    """Catches a schedule that is never advanced, that starts over after a resume, or that `rpo eval` reads at the end
    of the run whatever the checkpoint."""
    tiny.write_store(tmp_path / "valid", num_groups=3, seed=2)
    words = ["train.steps=4", "evaluation.every=2"]
    rpo("train", *words, "train.stop_at=1")
    rpo("train", *words, "train.stop_at=3")
    rpo("eval", *words)
    rpo("train", *words)
    assert seen == {"train": [0.0, 0.25, 0.5, 0.75], "valid": [0.0, 0.5, 0.75, 1.0]}
