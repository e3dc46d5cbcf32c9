"""`rpo prepare` goes on where it was killed, writes the same bytes, and never meets another one at the same store."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.config_verbs import ColumnsConfig, PrepareConfig
from rpo_megatron.data import prepare as prepare_module
from rpo_megatron.data import workers
from rpo_megatron.data.collector import Collector
from rpo_megatron.data.journal import locked
from rpo_megatron.data.prepare import prepare
from rpo_megatron.data.store import Store
from rpo_megatron.errors import UserError

ROWS = [
    {
        "prompt": f"question {i}",
        "responses": [
            {"text": f"one {i}", "reward": i % 5, "brief": -i},
            {"text": f"two {i}" * (i % 3), "reward": 0.25, "brief": 1},
            {"text": "three", "reward": 0, "brief": 0},
        ],
    }
    for i in range(100)
]


class Killed(BaseException):
    """As sudden as a signal: nothing in the program expects it."""


@pytest.fixture
def config(
    tmp_path: Path, write_rows: Callable[..., str], sentencepiece_model: str, monkeypatch: pytest.MonkeyPatch
) -> PrepareConfig:
    """Chunks of seven rows, a checkpoint behind each."""
    monkeypatch.setattr(workers, "CHUNK_ROWS", 7)
    monkeypatch.setattr(prepare_module, "JOURNAL_SECONDS", 0.0)
    return PrepareConfig(
        input=write_rows(ROWS),
        output_prefix=str(tmp_path / "out" / "store"),
        tokenizer=sentencepiece_model,
        workers=1,
        columns=ColumnsConfig(extra={"brief": "brief"}),
    )


def content(config: PrepareConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.output_prefix).parent.iterdir()}


def killed_at(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """A `prepare` that dies before it writes this chunk (counted from 0)."""
    add = Collector.add
    seen: list[None] = []

    def dying_add(self: Collector, result: Any) -> None:
        if len(seen) == chunk:
            raise Killed
        seen.append(None)
        add(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "add", dying_add)
        with pytest.raises(Killed):
            prepare(config)


@pytest.mark.parametrize("chunks", [[1], [14], [3, 2, 5]])
def test_resumed_run_writes_the_same_bytes(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chunks: list[int]
) -> None:
    """Tokens, index, rewards, extra column, and the statistics and counts of the manifest; interrupted early, late, and
    several times. A run that started anew would pass for one that went on but for the message."""
    prepare(config)
    expected = content(config)
    assert len(expected) == 8  # three pairs of files, two manifests
    for path in Path(config.output_prefix).parent.iterdir():
        path.unlink()
    for chunk in chunks:
        killed_at(config, monkeypatch, chunk)
    capsys.readouterr()
    prepare(config)
    assert f"going on behind row {7 * sum(chunks)}" in capsys.readouterr().out
    assert content(config) == expected


def test_what_was_not_journaled_is_done_again(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that grew behind the last checkpoint are cut back to it; without, groups would be there twice."""
    prepare(config)
    expected = content(config)
    killed_at(config, monkeypatch, 4)
    for path in Path(config.output_prefix).parent.glob("*.partial"):
        if "journal" not in path.name:
            path.write_bytes(path.read_bytes() + b"later")
    prepare(config)
    assert content(config) == expected


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"max_length": 50}, "it had another max_length"),
        ({"columns": ColumnsConfig()}, "it had another columns"),
        ({"limit": 90}, "it had another limit"),
        ("touch", r"it had another input"),
        ("damage", "its files are damaged"),
        ("shorten", "its files are damaged"),
    ],
)
def test_anything_else_starts_anew(
    config: PrepareConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Any,
    why: str,
) -> None:
    """Half a store of one configuration and half of another, or of other input, would open without complaint."""
    killed_at(config, monkeypatch, 3)
    prefix = config.output_prefix
    if isinstance(change, dict):
        config = PrepareConfig(**{**vars(config), **change})
    elif change == "touch":
        os.utime(config.input, ns=(1, 1))
    elif change == "damage":
        Path(f"{prefix}.journal.partial").write_bytes(b"\x93")
    else:
        Path(f"{prefix}.reward.bin.partial").write_bytes(b"")
    capsys.readouterr()
    prepare(config)
    assert f"{prefix}: an earlier run was interrupted, but {why}" in capsys.readouterr().out
    assert len(Store.open(prefix, verify=True)) == (config.limit or 100)
    assert not list(Path(prefix).parent.glob("*.partial"))


def test_workers_may_change(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that died for want of memory is started again with fewer."""
    prepare(config)
    expected = content(config)
    killed_at(config, monkeypatch, 5)
    monkeypatch.setattr(workers, "FEW_CHUNKS", 0)
    prepare(PrepareConfig(**{**vars(config), "workers": 2}))
    assert content(config) == expected


def test_dropped_rewards_stay_dropped(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[..., str]
) -> None:
    """What an earlier row decided for all must outlive the interruption."""
    bare = {"prompt": "x", "responses": ["one", "two"]}
    rows = [*ROWS[:20], bare, *ROWS[20:40]]
    knobs = {"input": write_rows(rows), "missing_reward": "no_rewards", "columns": ColumnsConfig()}
    config = PrepareConfig(**{**vars(config), **knobs})
    killed_at(config, monkeypatch, 4)
    prepare(config)
    store = Store.open(config.output_prefix, verify=True)
    assert (len(store), store.has_reward) == (41, False)


def test_wrong_input_leaves_nothing(config: PrepareConfig, write_rows: Callable[..., str]) -> None:
    """Also when checkpoints were written before the bad row: it would be met again."""
    config = PrepareConfig(**{**vars(config), "input": write_rows([*ROWS, {"bad": 1}])})
    with pytest.raises(UserError, match=r"rows\.jsonl:101"):
        prepare(config)
    assert content(config) == {}


SCRIPT = """
import sys, time
from rpo_megatron.config_verbs import PrepareConfig
from rpo_megatron.data import prepare, workers
from rpo_megatron.data.collector import Collector
workers.CHUNK_ROWS, prepare.JOURNAL_SECONDS = 7, 0.0
add = Collector.add
Collector.add = lambda self, result: (add(self, result), time.sleep(0.05))
prepare.prepare(PrepareConfig(input=sys.argv[1], output_prefix=sys.argv[2], tokenizer=sys.argv[3], workers=1))
"""


def test_sigkill_and_the_lock(config: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that dies without a word, and a second one that starts while it lives: the second is refused, and once
    the first is dead its lock is no obstacle."""
    config = PrepareConfig(**{**vars(config), "columns": ColumnsConfig()})
    prepare(config)
    expected = content(config)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, config.input, config.output_prefix, config.tokenizer],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = Path(f"{config.output_prefix}.journal.partial")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not journal.exists() and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"another `rpo prepare` writes to this output_prefix"):
        prepare(config)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.exists()
    capsys.readouterr()
    prepare(config)
    assert "going on behind row" in capsys.readouterr().out
    assert content(config) == expected


def test_lock_is_free_again(tmp_path: Path) -> None:
    """After its holder left, also by an exception; a lock file of a dead process is no lock."""
    prefix = str(tmp_path / "s")
    Path(f"{prefix}.lock").touch()
    with pytest.raises(ZeroDivisionError), locked(prefix):
        1 / 0  # noqa: B018
    with locked(prefix), pytest.raises(UserError, match=r"s\.lock is locked"), locked(prefix):
        pass
    assert list(tmp_path.iterdir()) == []
