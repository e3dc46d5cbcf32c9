"""Which columns are the reward, and how they are transformed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.config import RewardsConfig
from rpo_megatron.data.cost import CostModel
from rpo_megatron.data.loader import Loader
from rpo_megatron.data.rewards import make_view
from rpo_megatron.data.store import Store
from rpo_megatron.data.view import RewardView
from rpo_megatron.errors import UserError
from tests.tiny import write_store


def view(**changes: object) -> RewardView:
    base = {"standardise": "none", "mean_M": (2.0, 0.0), "std_M": (4.0, 0.0), "clip": None, "source_column": None}
    return RewardView(columns=("a", "b"), **{**base, **changes})  # type: ignore[arg-type]


RAW_KM = np.array([[2.0, 5.0], [10.0, 5.0], [-6.0, 5.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "expected_KM"),
    [
        ({}, [[2, 5], [10, 5], [-6, 5]]),
        ({"clip": 4.0}, [[2, 4], [4, 4], [-4, 4]]),
        ({"standardise": "dataset"}, [[0, 5], [2, 5], [-2, 5]]),
        ({"standardise": "dataset", "clip": 1.5}, [[0, 1.5], [1.5, 1.5], [-1.5, 1.5]]),
        ({"standardise": "group"}, [[0, 0], [1.5**0.5, 0], [-(1.5**0.5), 0]]),
    ],
)
def test_apply_by_hand(changes: dict[str, object], expected_KM: list[list[float]]) -> None:
    """Catches columns standardised by each other's numbers, clipping before standardising, and a division by the
    standard deviation 0 of a column that does not vary."""
    values_KM = view(**changes).apply(RAW_KM)
    assert values_KM.dtype == np.float32
    np.testing.assert_allclose(values_KM, expected_KM, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=8), far=st.floats(-1e6, 1e6))
def test_standardised_groups(values: list[float], far: float) -> None:
    """Catches noise that is blown up to rewards of size 1 where all are equal, and an order that changes."""
    raw_KM = np.array(values, dtype=np.float32)[:, None] + np.float32(far)
    out_K = view(standardise="group").apply(raw_KM)[:, 0].astype(np.float64)
    if (raw_KM == raw_KM[0]).all():
        assert (out_K == 0).all()
    else:
        assert out_K.mean() == pytest.approx(0, abs=1e-5)
        assert out_K.std() == pytest.approx(1, abs=1e-5)
    order = np.argsort(raw_KM[:, 0], kind="stable")
    assert (np.diff(out_K[order]) >= 0).all()


def test_choice_of_columns(tmp_path: Path) -> None:
    """Catches a column that is silently another than the config's, or guessed where it is not clear."""
    both = Store.open(write_store(tmp_path / "both", num_groups=3, columns=("helpful", "brief")))
    assert make_view(RewardsConfig(), both, source_column=None).columns == ("reward",)
    chosen = make_view(RewardsConfig(columns=("brief", "reward")), both, source_column=None)
    assert chosen.columns == ("brief", "reward")
    assert chosen.mean_M[0] == pytest.approx(both.columns["brief"].statistics.mean)
    with pytest.raises(UserError, match=r"rewards.columns: .* no column 'brif'; did you mean 'brief'\?"):
        make_view(RewardsConfig(columns=("brif",)), both, source_column=None)
    with pytest.raises(UserError, match=r"data.source_column: .* no column 'origin'"):
        make_view(RewardsConfig(), both, source_column="origin")

    one = Store.open(
        write_store(tmp_path / "one", num_groups=3, rewards=False, columns=("helpful",), source_column="origin")
    )
    assert not one.has_reward
    assert make_view(RewardsConfig(), one, source_column="origin").columns == ("helpful",)
    with pytest.raises(UserError, match=r"no column 'reward': say with rewards.columns"):
        make_view(RewardsConfig(), one, source_column=None)


def test_held_out_rewards_are_on_the_training_scale(tmp_path: Path) -> None:
    """Catches a held-out store standardised by its own numbers, whose losses then do not compare."""
    train = Store.open(write_store(tmp_path / "train", num_groups=8, seed=0))
    valid = Store.open(write_store(tmp_path / "valid", num_groups=3, seed=1))
    scale = train.columns["reward"].statistics
    standardised = valid.with_view(make_view(RewardsConfig(standardise="dataset"), train, source_column=None))
    for i in range(len(valid)):
        raw, got = valid.group(i).reward, standardised.group(i).reward
        assert raw is not None
        assert got is not None
        np.testing.assert_allclose(got, (raw - scale.mean) / scale.std, rtol=1e-5, atol=1e-6)


def test_rows_carry_the_columns(tmp_path: Path) -> None:
    """Catches ensembles whose columns are swapped, ragged groups filled from their neighbours, and surplus ranks whose
    empty rows lack a column that the others' rows have."""
    prefix = write_store(tmp_path / "s", num_groups=3, columns=("x", "y"), source_column="origin")
    raw = Store.open(prefix)
    store = raw.with_view(make_view(RewardsConfig(columns=("y", "x")), raw, source_column="origin"))
    options = {"seed": 0, "groups_per_step": 3, "tokens_per_microbatch": 40, "packing": True, "multiple": 4}
    options["cost"] = CostModel(per_pair=0.0, per_scored=0.0)
    rows = [
        row
        for rank in range(4)
        for row in Loader(store, dp_rank=rank, dp_size=4, share_prompt=True, **options).sequential(0, 3)  # type: ignore[arg-type]
    ]
    assert any(row.num_groups == 0 for row in rows)
    for row in rows:
        assert row.rewards_GKM is not None
        assert row.source_GK is not None
        assert row.reward_GK is not None
        assert row.rewards_GKM.shape == (*row.length_GK.shape, 2)
        np.testing.assert_allclose(row.reward_GK, row.rewards_GKM.mean(axis=2), rtol=1e-6)
        for g, group_id in enumerate(row.group_ids_G):
            k = int(row.valid_GK[g].sum())
            if group_id >= 0:
                numbers = raw.numbers(int(group_id))
                np.testing.assert_array_equal(row.rewards_GKM[g, :k], np.stack([numbers["y"], numbers["x"]], axis=1))
                assert row.source_GK[g, :k].tolist() == (numbers["origin"] != 0).tolist()
            assert not row.rewards_GKM[g, k:].any()
