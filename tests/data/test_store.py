"""The store: what is written is read, and nothing incomplete or damaged opens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.indexed import IndexedReader
from rpo_megatron.data.manifest import RewardMoments, TokenizerInfo, bucket
from rpo_megatron.data.store import Store
from rpo_megatron.data.writer import StoreWriter
from rpo_megatron.errors import UserError

INFO = TokenizerInfo(path="t", fingerprints={"tokenizer.model": "f"}, vocab_size=100, bos_id=1, eos_id=2)
GROUPS = [
    ([1, 5, 6], [[7, 2], [8, 9, 2]], [0.5, -1.0]),
    ([1], [[3, 2], [4, 2], [99]], [1.0, 1.0, 1.0]),
    ([1, 9, 9, 9], [[10, 11, 12, 13, 2], [14]], [2.0, 0.25]),
]


def row(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def write_groups(writer: StoreWriter, rewards: bool = True) -> None:
    for prompt, responses, reward in GROUPS:
        writer.add(row(prompt), list(map(row, responses)), np.array(reward) if rewards else None)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    path = str(tmp_path / "deep" / "store")
    with StoreWriter(path, tokenizer=INFO) as writer:
        write_groups(writer)
        writer.finish(dropped={"group_single_response": 3}, boundary_merges=2)
    return path


def test_groups_come_back(prefix: str) -> None:
    """Prompt and responses swapped, rewards shifted by a group, or lengths read from the wrong sequence."""
    store = Store.open(prefix, verify=True)
    assert len(store) == 3
    assert store.has_reward
    assert not store.has_reference
    assert store.prompt_length_D.tolist() == [3, 1, 4]
    assert store.num_responses_D.tolist() == [2, 3, 2]
    assert store.prompt_length_D.dtype == store.num_responses_D.dtype == store.response_lengths(0).dtype == np.int64
    for i, (prompt, responses, reward) in enumerate(GROUPS):
        group = store.group(i)
        assert group.prompt.tolist() == prompt
        assert group.prompt.dtype == group.responses[0].dtype == np.int64
        assert [response.tolist() for response in group.responses] == responses
        assert store.response_lengths(i).tolist() == list(map(len, responses))
        assert group.reward is not None
        assert group.reward.dtype == np.float32
        assert group.reward.tolist() == reward
        assert group.ref_logp is None
    with pytest.raises(IndexError):
        store.group(3)


def test_manifest_by_hand(prefix: str) -> None:
    """Counted by hand from GROUPS: tokens 8 + 6 + 10; longest prompt + response 9; rewards of one group all equal;
    mean (0.5 - 1 + 3 + 2.25) / 7."""
    manifest = Store.open(prefix).manifest
    assert (manifest.groups, manifest.responses, manifest.tokens, manifest.max_length) == (3, 7, 24, 9)
    assert manifest.responses_per_group == {2: 2, 3: 1}
    assert manifest.lengths.prompt == {1: 1, 4: 2}
    assert manifest.lengths.response == {1: 2, 2: 3, 4: 1, 8: 1}
    assert manifest.lengths.total == {8: 2, 16: 1}
    assert manifest.reward is not None
    assert manifest.reward.mean == pytest.approx(4.75 / 7)
    rewards = [0.5, -1.0, 1.0, 1.0, 1.0, 2.0, 0.25]
    assert manifest.reward.std == pytest.approx(np.std(rewards))
    assert (manifest.reward.min, manifest.reward.max, manifest.reward.all_equal) == (-1.0, 2.0, pytest.approx(1 / 3))
    assert manifest.dropped == {"group_single_response": 3}
    assert manifest.boundary_merges == 2
    assert manifest.tokenizer == INFO


def test_buckets() -> None:
    """Bucket b holds b/2 < length <= b."""
    assert bucket(np.array([0, 1, 2, 3, 4, 5, 8, 9])).tolist() == [1, 1, 2, 4, 4, 8, 8, 16]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5), min_size=1, max_size=10),
    st.sampled_from([0.0, 1e4]),
)
def test_streaming_moments(groups: list[list[float]], offset: float) -> None:
    """A sum of squares loses the variance of rewards that lie far from 0."""
    moments = RewardMoments()
    arrays = [np.array(group, dtype=np.float32) + np.float32(offset) for group in groups]
    for array in arrays:
        moments.add(array, np.array([array.size]))
    everything = np.concatenate(arrays).astype(np.float64)
    statistics = moments.statistics("given")
    assert statistics.mean == pytest.approx(everything.mean(), rel=1e-9, abs=1e-9)
    assert statistics.std == pytest.approx(everything.std(), rel=1e-6, abs=1e-6)


def test_token_file_is_an_indexed_dataset(prefix: str) -> None:
    """A document per group, prompt first: the file format that other tools rely on."""
    reader = IndexedReader(prefix)
    assert reader.dtype == np.uint16
    assert reader.border_D.tolist() == [0, 3, 7, 10]
    assert reader.get(0).tolist() == [1, 5, 6]


def test_large_vocabulary_takes_int32(tmp_path: Path) -> None:
    """Tokens from 65536 on would wrap in a uint16 file."""
    info = TokenizerInfo(path="t", fingerprints={}, vocab_size=150_000, bos_id=None, eos_id=2)
    with StoreWriter(str(tmp_path / "s"), tokenizer=info) as writer:
        writer.add(row([149_999]), [row([70_000]), row([1])], None)
        writer.finish()
    store = Store.open(str(tmp_path / "s"))
    assert store.group(0).prompt.tolist() == [149_999]
    assert not store.has_reward
    assert store.group(0).reward is None
    assert store.manifest.reward is None


@pytest.mark.parametrize(
    ("prompt", "responses", "reward", "message"),
    [
        ([1], [[2]], [0.0], "two responses"),
        ([], [[2], [3]], [0.0, 1.0], "non-empty"),
        ([1], [[2], []], [0.0, 1.0], "non-empty"),
        ([1], [[2], [100]], [0.0, 1.0], "vocabulary of 100"),
        ([-1], [[2], [3]], [0.0, 1.0], "vocabulary of 100"),
        ([1], [[2], [3]], [0.0, float("nan")], "not all finite"),
        ([1], [[2], [3]], [0.0, 1e39], "not all finite"),
        ([1], [[2], [3]], [0.0], "expected 2 numbers"),
        ([1], [[2], [3]], None, "for all groups"),
    ],
)
def test_what_is_no_group_is_refused(
    tmp_path: Path, prompt: list[int], responses: list[list[int]], reward: list[float] | None, message: str
) -> None:
    """Each would otherwise become a store that fails or misleads in training; none leaves a file behind."""
    with StoreWriter(str(tmp_path / "s"), tokenizer=INFO) as writer:
        write_groups(writer)
        with pytest.raises(ValueError, match=message):
            writer.add(row(prompt), list(map(row, responses)), None if reward is None else np.array(reward))
    assert list(tmp_path.iterdir()) == []


def test_dropping_rewards_midway(tmp_path: Path) -> None:
    """The sidecar of the first groups must not survive beside a store that says it has no rewards."""
    with StoreWriter(str(tmp_path / "s"), tokenizer=INFO) as writer:
        write_groups(writer)
        writer.drop_rewards()
        write_groups(writer, rewards=False)
        writer.finish()
    store = Store.open(str(tmp_path / "s"))
    assert len(store) == 6
    assert not store.has_reward
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx", "s.json"]


def test_overwriting_keeps_the_old_store_until_the_new_one_is_complete(prefix: str) -> None:
    """Leaving the block without `finish`, as an exception does, must cost nothing; a new store without rewards must
    not inherit the old ones."""
    before = {path.name: path.read_bytes() for path in Path(prefix).parent.iterdir()}
    with StoreWriter(prefix, tokenizer=INFO) as writer:  # left without finish
        write_groups(writer)
    assert {path.name: path.read_bytes() for path in Path(prefix).parent.iterdir()} == before
    with StoreWriter(prefix, tokenizer=INFO) as writer:
        write_groups(writer, rewards=False)
        writer.finish()
    assert not Store.open(prefix, verify=True).has_reward
    assert not Path(f"{prefix}.reward.idx").exists()


@pytest.mark.parametrize("renames", range(5))
def test_death_while_publishing(prefix: str, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Between the renames, files of the old and the new store lie side by side: that must not open."""
    replace = os.replace
    calls: list[str] = []

    def dying_replace(source: str, target: str) -> None:
        if len(calls) == renames:
            raise OSError("died")
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying_replace)
    with StoreWriter(prefix, tokenizer=INFO) as writer:
        write_groups(writer)
        with pytest.raises(OSError, match="died"):
            writer.finish()
    assert len(calls) == renames
    with pytest.raises(UserError, match="there is no store"):
        Store.open(prefix)


def test_empty_store_is_refused(tmp_path: Path) -> None:
    """A store without groups would fail only in the sampler."""
    with StoreWriter(str(tmp_path / "s"), tokenizer=INFO) as writer, pytest.raises(ValueError, match="a group"):
        writer.finish()


def test_killed_writer_leaves_nothing_that_opens(tmp_path: Path) -> None:
    """SIGKILL, which no `finally` sees, in the middle of writing."""
    script = (
        "import sys, numpy as np\n"
        "from rpo_megatron.data.manifest import TokenizerInfo\n"
        "from rpo_megatron.data.writer import StoreWriter\n"
        "info = TokenizerInfo(path='t', fingerprints={}, vocab_size=100, bos_id=1, eos_id=2)\n"
        "with StoreWriter(sys.argv[1], tokenizer=info) as writer:\n"
        "    while True:\n"
        "        writer.add(np.ones(50, int), [np.ones(50, int)] * 4, np.ones(4))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "s")], env=dict(os.environ))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any(path.stat().st_size for path in tmp_path.iterdir()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="there is no store"):
        Store.open(str(tmp_path / "s"))
    with pytest.raises(UserError):
        IndexedReader(str(tmp_path / "s"))


@pytest.mark.parametrize("name", ["bin", "idx", "reward.bin", "reward.idx"])
def test_damaged_files_are_named(prefix: str, name: str) -> None:
    """Absent, shorter, or (with verify) one flipped bit: the message says which file."""
    path = Path(f"{prefix}.{name}")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{path}.*checksum"):
        Store.open(prefix, verify=True)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=str(path)):
        Store.open(prefix)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: does not exist"):
        Store.open(prefix)


def test_manifest_is_needed_and_checked(prefix: str) -> None:
    """Without it, of another format, cut off, or of other files: no store."""
    path = Path(f"{prefix}.json")
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"format": 99}))
    with pytest.raises(UserError, match="format 99; this program reads format 1"):
        Store.open(prefix)
    path.write_text(json.dumps(tree)[:-20])
    with pytest.raises(UserError, match=f"{path}: damaged"):
        Store.open(prefix)
    path.write_text(json.dumps(tree | {"groups": 4}))
    with pytest.raises(UserError, match="not the groups"):
        Store.open(prefix)
    path.unlink()
    with pytest.raises(UserError, match="rpo prepare"):
        Store.open(prefix)


def test_fingerprint_follows_tokens_and_rewards(prefix: str, tmp_path: Path) -> None:
    """A resumed run must notice other data under the same name, and must not mind a copy."""
    with StoreWriter(str(tmp_path / "copy"), tokenizer=INFO) as writer:
        write_groups(writer)
        writer.finish()
    with StoreWriter(str(tmp_path / "other"), tokenizer=INFO) as writer:
        for prompt, responses, reward in GROUPS:
            writer.add(row(prompt), list(map(row, responses)), np.array(reward) + 1)
        writer.finish()
    store, copy, other = (Store.open(path) for path in (prefix, str(tmp_path / "copy"), str(tmp_path / "other")))
    assert store.fingerprint == copy.fingerprint != other.fingerprint
    assert store.token_fingerprint == other.token_fingerprint
