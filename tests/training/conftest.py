"""Verbs run in this process, on tiny runs in tmp_path."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rpo_megatron import cli
from rpo_megatron.config_io import dump
from rpo_megatron.distributed import stop
from tests import tiny

Rpo = Callable[..., str]


@pytest.fixture
def rpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Rpo]:
    """`rpo("train", "a.b=c")` runs a verb on a tiny run in tmp_path, wants success, and gives what it prints."""

    def run(verb: str, *words: str) -> str:
        code = cli.main([verb, yaml_of(tmp_path), *words])
        stop()
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    yield run
    stop()


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Rpo]:
    """`fails("train", "a.b=c")` runs a verb on a tiny run in tmp_path, wants exit code 2, and gives the message."""

    def run(verb: str, *words: str) -> str:
        code = cli.main([verb, yaml_of(tmp_path), *words])
        stop()
        message = capsys.readouterr().err
        assert code == 2, message
        assert message.startswith(f"rpo {verb}: error: "), message
        assert message.count("\n") == 1, "one message"
        return message

    yaml_of(tmp_path)
    yield run
    stop()


def losses(shown: str) -> list[str]:
    """The lines of the training steps that a run printed, up to what it says of its speed."""
    return [
        line.split(" | tok/s")[0] for line in shown.splitlines() if " | loss " in line and line.startswith("train ")
    ]


def yaml_of(directory: Path) -> str:
    """The config file of a tiny run, made if it is not there: model, store, and a held-out store where that exists."""
    file = directory / "run.yaml"
    if not file.exists():
        valid = [f"data.valid={directory / 'valid'}"] if (directory / "valid.json").exists() else []
        file.write_text(dump(tiny.run_config(directory, *valid)))
    return str(file)
