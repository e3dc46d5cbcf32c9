"""The reference sidecar of a store: it belongs to its tokens and its maker, or it is refused."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rpo_megatron.data.manifest import TokenizerInfo
from rpo_megatron.data.store import Store
from rpo_megatron.data.writer import StoreWriter, write_reference
from rpo_megatron.errors import UserError

INFO = TokenizerInfo(path="t", fingerprints={}, vocab_size=100, bos_id=1, eos_id=2)
IDENTITY = {"weights": "abc", "precision": "fp32"}
GROUPS = [([1, 5], [[7, 2], [8, 9, 2]]), ([1], [[3, 2], [4, 2], [99]]), ([1, 9], [[10, 2], [14]])]


def write_groups(prefix: str, *, reward: float | None = None, last_token: int = 9) -> None:
    with StoreWriter(prefix, tokenizer=INFO) as writer:
        for prompt, responses in GROUPS:
            rewards = None if reward is None else np.full(len(responses), reward)
            writer.add(np.array([*prompt, last_token]), list(map(np.array, responses)), rewards)
        writer.finish()


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    path = str(tmp_path / "store")
    write_groups(path, reward=1.0)
    return path


@pytest.fixture
def values() -> list[np.ndarray]:
    return [np.array([-1.5, -2.0]), np.array([-3.0, -4.0, -5.0]), np.array([-6.0, -7.0])]


def test_reference_comes_back(prefix: str, values: list[np.ndarray]) -> None:
    """Values shifted by a group would train against a wrong reference."""
    store = Store.open(prefix)
    write_reference(store, iter(values), identity=IDENTITY)
    scored = Store.open(prefix).with_reference(dict(reversed(IDENTITY.items())))
    assert scored.has_reference
    assert scored.has_reward
    assert scored.fingerprint == store.fingerprint
    assert not store.has_reference
    for i, value in enumerate(values):
        group = scored.group(i)
        assert group.ref_logp is not None
        assert group.ref_logp.dtype == np.float32
        assert group.ref_logp.tolist() == value.tolist()
    assert store.reference_identity() == IDENTITY


def test_reference_of_another_identity_is_refused(prefix: str, values: list[np.ndarray]) -> None:
    """The message names each differing entry with both values, also one that only one side has."""
    store = Store.open(prefix)
    with pytest.raises(UserError, match="rpo score"):
        store.with_reference(IDENTITY)
    write_reference(store, values, identity=IDENTITY)
    with pytest.raises(UserError, match="precision: stored 'fp32', this run 'bf16'") as caught:
        store.with_reference({"weights": "abc", "precision": "bf16", "template": "x"})
    assert "template: stored '(absent)', this run 'x'" in str(caught.value)
    assert "weights" not in str(caught.value)


def test_reference_of_other_tokens_is_refused_of_other_rewards_is_not(prefix: str, values: list[np.ndarray]) -> None:
    """Preparing again with another tokenizer invalidates the log-probabilities; new rewards do not."""
    write_reference(Store.open(prefix), values, identity=IDENTITY)
    write_groups(prefix, reward=None)
    assert Store.open(prefix).with_reference(IDENTITY).has_reference
    write_groups(prefix, last_token=42)
    with pytest.raises(UserError, match="earlier version"):
        Store.open(prefix).with_reference(IDENTITY)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[-1.5, -2.0], [-3.0, float("nan"), -5.0], [-6.0, -7.0]], "group 1.*not all finite"),
        ([[-1.5, -2.0], [-3.0, -float("inf"), -5.0], [-6.0, -7.0]], "not all finite"),
        ([[-1.5, -2.0], [-3.0, -4.0], [-6.0, -7.0]], "group 1: expected 3 numbers"),
        ([[-1.5, -2.0], [-3.0, -4.0, -5.0]], "of 2 groups"),
        ([[-1.5, -2.0], [-3.0, -4.0, -5.0], [-6.0, -7.0], [-1.0, -1.0]], "more than the 3"),
    ],
)
def test_bad_reference_values_leave_nothing(prefix: str, bad: list[list[float]], message: str) -> None:
    """NaN from a broken model, or a scorer that skipped a group, must not become a sidecar."""
    store = Store.open(prefix)
    with pytest.raises(ValueError, match=message):
        write_reference(store, map(np.array, bad), identity=IDENTITY)
    assert not list(Path(prefix).parent.glob("*ref_logp*"))


def test_interrupted_rescoring_keeps_the_old_reference(prefix: str, values: list[np.ndarray]) -> None:
    """Ctrl-C during `rpo score`: the old sidecar is complete and still belongs to its identity."""
    store = Store.open(prefix)
    write_reference(store, values, identity=IDENTITY)

    def interrupted() -> Iterator[np.ndarray]:
        yield values[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_reference(store, interrupted(), identity={"weights": "new"})
    assert store.with_reference(IDENTITY).group(0).ref_logp is not None


def test_truncated_reference_is_refused(prefix: str, values: list[np.ndarray]) -> None:
    """Its files are checked like those of the store."""
    store = Store.open(prefix)
    write_reference(store, values, identity=IDENTITY)
    path = Path(f"{prefix}.ref_logp.bin")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=str(path)):
        store.with_reference(IDENTITY)
