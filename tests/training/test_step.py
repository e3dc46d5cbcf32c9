"""A gradient that is not finite stops the run in time, whether its norm comes to the host by itself or not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_megatron.errors import UserError
from rpo_megatron.training import train as training
from rpo_megatron.training.step import GradientNorms, StepResult
from tests.training.conftest import Rpo


class Watched:
    """A norm on a device: how often it was fetched from there is counted."""

    fetched = 0


class _Tensor(torch.Tensor):
    def __float__(self) -> float:
        Watched.fetched += 1
        return float(self.as_subclass(torch.Tensor))


def on_device(value: float) -> torch.Tensor:
    return torch.tensor([value]).as_subclass(_Tensor)


def test_a_norm_on_the_host_is_looked_at_in_its_step() -> None:
    """Catches a diverged run that goes on to the next log line although nothing would have to wait."""
    norms = GradientNorms()
    norms.add(1, 0.5)
    assert norms.latest() == 0.5
    with pytest.raises(UserError, match="step 2 is nan"):
        norms.add(2, float("nan"))


def test_a_norm_on_the_device_is_fetched_when_it_is_wanted() -> None:
    """Catches a wait for the device in every step, and an infinite gradient that is forgotten because those after it
    were finite."""
    norms = GradientNorms()
    before = Watched.fetched
    norms.add(1, on_device(0.5))
    norms.add(2, on_device(2.0))
    assert Watched.fetched == before
    assert norms.latest() == 2.0
    assert norms.latest() == 2.0
    assert Watched.fetched == before + 2
    for step, value in ((3, 1.0), (4, float("inf")), (5, 1.0)):
        norms.add(step, on_device(value))
    with pytest.raises(UserError, match="step 4 is inf"):
        norms.latest()


@pytest.mark.parametrize("wrap", [float, on_device], ids=["host", "device"])
def test_a_diverged_run_leaves_no_checkpoint_of_it(
    tmp_path: Path, fails: Rpo, monkeypatch: pytest.MonkeyPatch, wrap: Any
) -> None:
    """Catches NaNs in the newest checkpoint: the run could not go on from before it diverged."""
    step = training.train_step
    done: list[int] = []

    def diverges(*args: Any, **options: Any) -> StepResult:
        result = step(*args, **options)
        done.append(1)
        return StepResult(stats=result.stats, grad_norm=wrap(float("nan") if len(done) == 3 else 1.0))

    monkeypatch.setattr(training, "train_step", diverges)
    words = ["train.steps=8", "checkpoint.every=2", "logging.every=8"]
    assert "the gradient norm of step 3 is nan" in fails("train", *words)
    assert len(done) == (3 if wrap is float else 4)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert names == ["step-00000002"]
