"""What a run says of itself: rewards, head and reference, in words that tell two runs apart."""

from pathlib import Path

import numpy as np
import pytest

from rpo_megatron.data.store import Store
from rpo_megatron.data.writer import write_column
from rpo_megatron.training import describe
from rpo_megatron.training.resolve import resolve
from tests import tiny

BARE = ["objective.beta=null", "objective.eta=null"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A training store with the columns reward, twice (mean 2, std 2) and foreign."""
    store = Store.open(tiny.write_store(tmp_path / "train", num_groups=12, max_responses=2))
    write_column(store, "twice", (np.array([0.0, 4.0]) for _ in range(12)), identity={})
    write_column(store, "foreign", (np.array([0.0, 1.0]) for _ in range(12)), identity={})
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "column reward, as stored"),
        (["rewards.columns=[twice]", "rewards.clip=2.5"], "column twice, as stored, then cut off at -2.5 and 2.5"),
        (["rewards.columns=[reward, twice]"], "mean of the columns reward, twice, as stored"),
        (["rewards.columns=[twice]", "rewards.standardise=group"], "column twice, standardised within each group"),
        (
            ["rewards.columns=[twice]", "rewards.standardise=dataset"],
            "column twice, standardised by the training store (twice: mean 2, std 2)",
        ),
        (
            ["objective.method=steerlm2", *BARE, "rewards.columns=[reward, twice]"],
            "columns reward, twice, each by itself and their mean, as stored",
        ),
        (
            ["objective.method=wrpo", "objective.eta=null", "data.source_column=foreign"],
            "column reward, as stored; of other models where 'foreign' is not 0",
        ),
        (["objective.method=sft", *BARE, "objective.responses=all"], "none: sft reads no rewards"),
    ],
)
def test_rewards(directory: Path, words: list[str], expected: str) -> None:
    """Catches a transform that is applied and not said, or said and not applied: here the words, with their numbers."""
    assert describe.rewards(resolve(tiny.run_config(directory, *words))) == expected


def test_chunks_of_layers(directory: Path) -> None:
    """Catches an interleaved pipeline that reads like a plain one."""
    plain, interleaved = ["parallel.pipeline=2"], ["parallel.pipeline=2", "parallel.virtual=2"]
    assert describe.stages(resolve(tiny.run_config(directory, *plain))) == "2+2 layers"
    assert describe.stages(resolve(tiny.run_config(directory, *interleaved))) == "1+1+1+1 layers, 2 chunks on each"


def test_steps_larger_than_the_store(directory: Path) -> None:
    """Catches steps that go through a store several times without a word."""
    assert describe.steps(resolve(tiny.run_config(directory))) == "3 of 6 groups (1.50 passes over the data)"
    large = resolve(tiny.run_config(directory, "train.groups_per_step=50"))
    assert "12.50 passes over the data; the store has fewer groups" in describe.steps(large)


def test_experts(tmp_path: Path) -> None:
    """Catches a loss of the routers that is added and not said, layers without experts that count as such."""
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES["qwen2_moe"])
    start = "2 of 4 for a token, and a shared one, in 3 layers; losses of their routers: "
    plan = resolve(tiny.run_config(tmp_path))
    assert describe.experts(plan) == start + "none, the objective alone trains them"
    plan = resolve(tiny.run_config(tmp_path, "moe.aux_loss=0.001"))
    assert describe.experts(plan) == start + "aux_loss 0.001"


def test_head_and_reference(directory: Path) -> None:
    """Catches a reward model that looks like a policy, and a reference that is loaded without a word what for."""
    policy = resolve(tiny.run_config(directory))
    assert describe.model(policy).endswith("untied embeddings")
    assert describe.reference(policy).endswith("; its log-probability of each response")
    rewards = resolve(tiny.run_config(directory, "objective.method=bradley_terry", *BARE))
    assert describe.model(rewards).endswith("value head (reward model)")
    # 131 x 32 embedding; 32 x (4 + 2 + 2 + 4) x 8 + 3 x 32 x 48 + 2 x 32 in each of 4 layers; final norm; head
    assert f"{131 * 32 + 4 * (32 * 96 + 3 * 32 * 48 + 64) + 32 + 32:,} parameters" in describe.model(rewards)
    assert describe.reference(rewards) == "none: bradley_terry reads no reference"
    expo = resolve(tiny.run_config(directory, "objective.method=expo", *BARE))
    assert describe.reference(expo).endswith(
        "; its distribution at each token of a response, for the KL over the vocabulary"
    )
    sample = resolve(tiny.run_config(directory, "objective.method=expo", *BARE, "objective.kl_estimator=sample"))
    assert describe.reference(sample) == "none: expo reads no reference"


def test_every_column_of_a_store_is_listed(directory: Path) -> None:
    """Catches a store whose further columns are invisible: nobody would know what `rewards.columns` may name."""
    line = describe.store(resolve(tiny.run_config(directory)).train_store)
    assert "twice 2 +- 2" in line
    assert "foreign 0.5 +- 0.5" in line
    assert ", reward 0." in line
