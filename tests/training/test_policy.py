"""Which weights a verb takes, and how far a run had come when they were saved."""

import json
from pathlib import Path

import pytest

from rpo_megatron.errors import UserError
from rpo_megatron.training.metrics import METRICS_FILE
from rpo_megatron.training.policy import choose_weights, progress
from rpo_megatron.training.resolve import resolve
from tests import tiny
from tests.training.conftest import Rpo

REWARD_MODEL = ["objective.method=bradley_terry", "objective.beta=null", "objective.eta=null"]


def test_chosen_weights_and_their_progress(tmp_path: Path, rpo: Rpo) -> None:
    """Catches an evaluation of other weights than were named, and a schedule that an evaluation reads at its end
    although the checkpoint is from its middle."""
    plan = resolve(tiny.run_config(tmp_path))
    with pytest.raises(UserError, match=r"no checkpoint yet.*score\.checkpoint=start"):
        choose_weights(plan, key="score.checkpoint", wish=None)
    with pytest.raises(UserError, match=r"score\.checkpoint: 'nowhere' is not a directory"):
        choose_weights(plan, key="score.checkpoint", wish="nowhere")
    rpo("train", "train.stop_at=2")
    newest = choose_weights(plan, key="k", wish=None)
    assert newest.source.path == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert progress(plan, newest) == pytest.approx(2 / 3)
    assert progress(plan, choose_weights(plan, key="k", wish="start")) == 0.0
    assert progress(plan, choose_weights(plan, key="k", wish=str(tmp_path / "model"))) == 1.0


@pytest.mark.parametrize("words", [["model.init=random"], REWARD_MODEL, [*REWARD_MODEL, "model.init=random"]])
def test_the_start_is_where_training_starts(tmp_path: Path, rpo: Rpo, words: list[str]) -> None:
    """Catches `start` that reads weights which the run would draw, or draws a value head other than the run's."""
    tiny.write_store(tmp_path / "valid", num_groups=5, seed=2)
    shown = json.loads(rpo("eval", *words, "evaluation.checkpoint=start").splitlines()[-1])
    rpo("train", *words, "evaluation.every=3")
    first = json.loads((tmp_path / "run" / METRICS_FILE).read_text().splitlines()[0])
    assert first["kind"] == "valid"
    names = first.keys() - {"kind", "step", "data"}
    assert {"loss", "accuracy", "best_of_n", "calibration_error"} <= names
    assert {name: shown[name] for name in names} == {name: first[name] for name in names}


def test_weights_of_the_other_kind(tmp_path: Path, fails: Rpo, rpo: Rpo) -> None:
    """Catches a reward model taken for a policy, which has no output layer to tell log-probabilities, and a policy
    taken for a reward model, whose value head would be noise."""
    valid = f"data.valid={tiny.write_store(tmp_path / 'valid', num_groups=3, seed=2)}"
    rpo("train", *REWARD_MODEL, f"run_dir={tmp_path / 'rm'}", "train.steps=1")
    assert "is no reward model" in fails("eval", valid, *REWARD_MODEL, f"evaluation.checkpoint={tmp_path / 'model'}")
    for key in ("model.path", "reference.path", "evaluation.checkpoint"):
        verb = "eval" if key == "evaluation.checkpoint" else "train"
        message = fails(verb, valid, f"{key}={tmp_path / 'rm'}")
        assert "is a reward model" in message, key
        assert "step-00000001" in message, key


def test_chosen_weights_must_read_the_data(tmp_path: Path, fails: Rpo) -> None:
    """Catches tokens of one vocabulary fed to a model of another, which model.path's own check does not see."""
    valid = f"data.valid={tiny.write_store(tmp_path / 'valid', num_groups=3, seed=2)}"
    tiny.write_model(tmp_path / "other", vocab_size=64)
    message = fails("eval", valid, f"evaluation.checkpoint={tmp_path / 'other'}")
    assert "vocabulary of 131" in message
    assert str(tmp_path / "other") in message
