"""Named columns of a store: they come back as written, belong to their tokens, and are complete or not there."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.config import RewardsConfig
from rpo_megatron.config_verbs import InspectConfig
from rpo_megatron.data.manifest import TokenizerInfo
from rpo_megatron.data.rewards import make_view
from rpo_megatron.data.show import inspect
from rpo_megatron.data.store import Store
from rpo_megatron.data.writer import StoreWriter, write_column, write_reference
from rpo_megatron.errors import UserError

INFO = TokenizerInfo(path="t", fingerprints={}, vocab_size=100, bos_id=1, eos_id=2)
NUM_RESPONSES = (2, 3)


def write(prefix: Path, *, reward: bool = True, columns: tuple[str, ...] = (), token: int = 7) -> Store:
    """Two groups of 2 and 3 responses; column number c holds c, c + 1, ... over the whole store."""
    with StoreWriter(str(prefix), tokenizer=INFO) as writer:
        at = 0
        for k in NUM_RESPONSES:
            values = np.arange(at, at + k, dtype=np.float32)
            named = {name: values + c + 1 for c, name in enumerate(columns)}
            writer.add(np.array([1, token]), [np.array([3, 2])] * k, values if reward else None, named)
            at += k
        writer.finish()
    return Store.open(str(prefix))


def test_columns_of_the_input(tmp_path: Path) -> None:
    """Catches columns that change places, groups or values, and statistics of another column."""
    store = write(tmp_path / "s", columns=("helpful", "brief"))
    assert list(store.columns) == ["reward", "brief", "helpful"]
    assert [store.numbers(i)["helpful"].tolist() for i in (0, 1)] == [[1, 2], [3, 4, 5]]
    assert [store.numbers(i)["brief"].tolist() for i in (0, 1)] == [[2, 3], [4, 5, 6]]
    assert store.numbers(1)["reward"].tolist() == [2, 3, 4]
    assert store.columns["helpful"].statistics.mean == pytest.approx(3.0)
    assert store.columns["helpful"].statistics.std == pytest.approx(2**0.5)
    assert store.columns["helpful"].identity == {}
    group = store.group(0)
    assert (group.rewards, group.source) == (None, None)
    assert group.reward is not None
    assert group.reward.tolist() == [0, 1]


@settings(deadline=None, max_examples=25)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=5, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    """Catches any float32 that does not come back to the bit."""
    store = write(tmp_path_factory.mktemp("s") / "s")
    groups = [np.array(values[:2]), np.array(values[2:])]
    write_column(store, "x", iter(groups), identity={"what": "value"})
    read = Store.open(store.prefix)
    assert [read.numbers(i)["x"].tolist() for i in (0, 1)] == [group.tolist() for group in groups]
    assert read.columns["x"].identity == {"what": "value"}


@pytest.mark.parametrize("name", ["", "a b", "a.b", "../x", "reward"])
def test_bad_names(tmp_path: Path, name: str) -> None:
    """Catches a name that becomes another file, or hides the reward."""
    store = write(tmp_path / "s")
    with pytest.raises(ValueError, match="cannot name a column"):
        write_column(store, name, iter([]), identity={})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2]], "of 1 groups, '.*' has 2"),
        ([[1, 2], [1, 2]], "expected 3 numbers"),
        ([[1, 2], [1, 2, 3], [1, 2]], "more than the 2 groups"),
        ([[1, 2], [1, np.nan, 3]], "column 'x' of group 1: .* not all finite"),
    ],
)
def test_wrong_values_leave_the_old_column(tmp_path: Path, values: list[list[float]], message: str) -> None:
    """Catches a half-written column that opens, and one that destroys its predecessor before it is complete."""
    store = write(tmp_path / "s")
    write_column(store, "x", iter([np.array([5, 5]), np.array([5, 5, 5])]), identity={})
    with pytest.raises(ValueError, match=message):
        write_column(store, "x", iter(map(np.array, values)), identity={})
    assert Store.open(store.prefix).numbers(0)["x"].tolist() == [5, 5]
    assert not list(tmp_path.glob("*.partial"))


def test_columns_die_with_their_store(tmp_path: Path) -> None:
    """Catches numbers of an earlier store, prepared at the same prefix, beside the new one's responses."""
    write(tmp_path / "s", columns=("old",))
    store = write(tmp_path / "s", columns=("new",), token=8)
    assert list(store.columns) == ["reward", "new"]
    assert list(Store.open(str(tmp_path / "s")).columns) == ["reward", "new"]


def test_column_of_other_tokens_is_refused(tmp_path: Path) -> None:
    """Catches a column that was copied beside other tokens; it must not stop the store from opening either."""
    write(tmp_path / "a", columns=("x",))
    store = write(tmp_path / "b", token=8)
    for path in tmp_path.glob("a.column.x.*"):
        path.rename(tmp_path / path.name.replace("a.", "b.", 1))
    store = Store.open(store.prefix)
    assert list(store.columns) == ["reward"]
    view = make_view(RewardsConfig(), store, source_column=None)
    with pytest.raises(UserError, match=r"no column 'x' \(.*b\.column\.x\.json was made for an earlier version"):
        store.with_view(view.__class__(**{**view.__dict__, "columns": ("x",)}))


def test_all_groups_have_the_columns_of_the_first(tmp_path: Path) -> None:
    """Catches a column that is shorter than its store."""
    with StoreWriter(str(tmp_path / "s"), tokenizer=INFO) as writer:
        writer.add(np.array([1]), [np.array([3])] * 2, None, {"x": np.zeros(2)})
        with pytest.raises(ValueError, match="the first group has x"):
            writer.add(np.array([1]), [np.array([3])] * 2, None)


def test_fingerprint_covers_what_is_read(tmp_path: Path) -> None:
    """Catches a run that resumes on other rewards, and one that cannot resume because of a column it does not read."""
    store = write(tmp_path / "s", columns=("x", "y"))
    plain = store.fingerprint
    views = {
        names: store.with_view(make_view(RewardsConfig(columns=names), store, source_column=None)).fingerprint
        for names in (("reward",), ("x",), ("y",), ("x", "y"))
    }
    assert views["reward",] == plain
    assert len({plain, views["x",], views["y",], views["x", "y"]}) == 4
    write_column(store, "z", iter([np.zeros(2), np.zeros(3)]), identity={})
    assert Store.open(store.prefix).fingerprint == plain


def test_view_and_reference_in_any_order(tmp_path: Path) -> None:
    """Catches a copy of the store that forgets the other one."""
    store = write(tmp_path / "s", columns=("x",))
    write_reference(store, iter([np.array([-1, -2]), np.array([-3, -4, -5])]), identity={"a": "b"})
    view = make_view(RewardsConfig(columns=("x",)), store, source_column="reward")
    for both in (store.with_view(view).with_reference({"a": "b"}), store.with_reference({"a": "b"}).with_view(view)):
        group = both.group(0)
        assert group.reward is not None
        assert group.ref_logp is not None
        assert group.source is not None
        assert (group.reward.tolist(), group.ref_logp.tolist()) == ([1, 2], [-1, -2])
        assert group.source.tolist() == [False, True]
        assert (both.num_rewards, both.has_source, both.has_reward) == (1, True, True)


def test_inspect_shows_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches columns that a user cannot find."""
    store = write(tmp_path / "s", columns=("helpful",))
    write_column(store, "value", iter([np.zeros(2), np.ones(3)]), identity={"weights": "abc"})
    inspect(InspectConfig(prefix=store.prefix, examples=0))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "column helpful given: mean 3, std 1.41421" in lines
    assert "column value given: mean 0.6, std 0.489898" in lines
    assert "weights: abc" in lines
