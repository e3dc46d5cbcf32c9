"""`rpo score`: numbers written next to the stores, against numbers that are computed another way."""

from pathlib import Path

import numpy as np
import pytest

from rpo_megatron import cli
from rpo_megatron.config import RewardsConfig
from rpo_megatron.data.rewards import make_view
from rpo_megatron.data.store import Store
from rpo_megatron.distributed import stop
from tests import tiny
from tests.training.conftest import Rpo

BARE = ["objective.beta=null", "objective.eta=null"]
REWARD_MODEL = ["objective.method=bradley_terry", *BARE]


def column(prefix: Path, name: str) -> list[np.ndarray]:
    """K numbers per group, as a run would read them."""
    store = Store.open(str(prefix))
    view = make_view(RewardsConfig(columns=(name,)), store, source_column=None)
    viewed = store.with_view(view)
    return [reward for i in range(len(store)) if (reward := viewed.group(i).reward) is not None]


def test_implicit_reward_is_beta_times_the_log_ratio(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a column of other weights, of another order than the store's, or without its reference; and a stored
    reference that gives other rewards than a resident one."""
    rpo("train", "train.steps=2")
    rpo("score", "--with", "logp", "score.checkpoint=start", "score.column=before")
    rpo("score", "--with", "logp", "score.column=after")
    rpo("score", "--with=implicit")
    before, after, implicit = (column(tmp_path / "train", name) for name in ("before", "after", "implicit"))
    assert len(implicit) == 12
    for old, new, reward in zip(before, after, implicit, strict=True):
        assert reward == pytest.approx(0.5 * (new - old), abs=2e-5)
    assert max(float(np.abs(reward).max()) for reward in implicit) > 0.1
    rpo("score")
    rpo("score", "--with=implicit", "reference.mode=stored", "score.column=stored")
    for reward, stored in zip(implicit, column(tmp_path / "train", "stored"), strict=True):
        assert stored == pytest.approx(reward, abs=2e-5)


def test_values_are_those_that_the_run_was_evaluated_by(tmp_path: Path, rpo: Rpo) -> None:
    """Catches values of a head that is drawn again, and a sign or an order lost on the way to the store: the accuracy
    of the column, counted by hand, must be the run's."""
    tiny.write_store(tmp_path / "valid", num_groups=9, seed=2)
    rpo("train", *REWARD_MODEL, "train.steps=4")
    line = rpo("eval", *REWARD_MODEL).splitlines()[-2]
    shown = rpo("score", *REWARD_MODEL, "--with", "value", "data.tokens_per_microbatch=40")
    assert f"-> {tmp_path / 'valid'}.column.value.*" in shown
    values, rewards = column(tmp_path / "valid", "value"), column(tmp_path / "valid", "reward")
    right = [
        value[i] > value[j]
        for value, reward in zip(values, rewards, strict=True)
        for i in range(len(reward))
        for j in range(len(reward))
        if reward[i] > reward[j]
    ]
    assert f"acc {np.mean(right):.3f}" in line
    identity = Store.open(str(tmp_path / "train")).columns["value"].identity
    assert identity["what"] == "value"
    assert identity["method"] == "bradley_terry"
    assert identity["objective.pair"] == "all_pairs"
    assert identity["precision"] == "fp32"
    assert len(identity["weights"]) == 64


def test_data_without_rewards_can_be_given_some(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a reward model that can only score what has rewards already."""
    rpo("train", *REWARD_MODEL)
    bare = tiny.write_store(tmp_path / "bare", num_groups=4, rewards=False)
    rpo("score", *REWARD_MODEL, "--with", "value", f"data.train={bare}")
    shown = rpo("train", f"data.train={bare}", f"run_dir={tmp_path / 'policy'}")
    assert "column value, as stored" in shown
    assert "train 3/3" in shown


def test_what_cannot_be_scored(tmp_path: Path, rpo: Rpo, fails: Rpo) -> None:
    """Catches a column of noise: values of a head that nobody trained, an implicit reward of a method without one; and
    a name that would take the place of the data's own rewards."""
    assert "trains a policy" in fails("score", "--with", "value")
    assert "trains a reward model" in fails("score", *REWARD_MODEL, "--with", "implicit")
    assert "has no implicit reward" in fails("score", *BARE, "objective.method=sft", "--with", "implicit")
    assert "no checkpoint yet" in fails("score", "--with", "implicit")
    for start in ("pretrained", "random"):
        words = ["--with", "value", "score.checkpoint=start", f"model.init={start}"]
        assert "is no reward model" in fails("score", *REWARD_MODEL, *words)
    assert "is no reward model" in fails(
        "score", *REWARD_MODEL, "--with", "value", f"score.checkpoint={tmp_path / 'model'}"
    )
    for name in ("reward", "a/b"):
        words = ["--with", "logp", "score.checkpoint=start", f"score.column={name}"]
        assert f"'{name}'" in fails("score", *words), name
    assert "score.column is not used" in fails("score", "score.column=x")
    assert "score.checkpoint is not used" in fails("score", "score.checkpoint=start")
    assert not list(tmp_path.glob("*.column.*"))


def test_an_exported_reward_model_scores_the_same(tmp_path: Path, rpo: Rpo) -> None:
    """Catches an evaluation or a score that only takes the program's own checkpoints, or the shape of model.path for
    that of the weights it is given."""
    tiny.write_store(tmp_path / "valid", num_groups=5, seed=2)
    rpo("train", *REWARD_MODEL)
    assert cli.main(["export", str(tmp_path / "run"), f"save={tmp_path / 'hf'}"]) == 0
    stop()
    tiny.write_model(tmp_path / "small", num_hidden_layers=2)
    other = [*REWARD_MODEL, f"model.path={tmp_path / 'small'}"]
    ours = rpo("eval", *REWARD_MODEL).splitlines()[-2]
    theirs = rpo("eval", *other, f"evaluation.checkpoint={tmp_path / 'hf'}").splitlines()[-2]
    assert theirs == ours
