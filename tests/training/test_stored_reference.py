"""reference.mode=stored: what is missing is made, what fits is used, what belongs to others is left alone."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron import cli
from rpo_megatron.distributed import stop
from rpo_megatron.fileio import locked
from rpo_megatron.training import score
from rpo_megatron.training import train as training
from tests import tiny
from tests.training.conftest import Rpo, losses

STORED = "reference.mode=stored"
COMES_FIRST = "one pass over it with the reference comes first"


def sidecar(directory: Path, name: str = "train") -> bytes:
    return (directory / f"{name}.ref_logp.bin").read_bytes()


def test_missing_is_made_and_then_used(tmp_path: Path, rpo: Rpo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches other numbers than those of `rpo score` or of a resident reference, a held-out store that is left out,
    and a second pass over data that has been scored."""
    tiny.write_store(tmp_path / "valid", num_groups=5, seed=2)
    tiny.write_model(tmp_path / "other", seed=1)
    other = f"reference.path={tmp_path / 'other'}"
    shown = rpo("config", STORED, other)
    assert shown.count("is not there: `rpo train` makes it") == 2
    first = rpo("train", STORED, other, f"run_dir={tmp_path / 'first'}")
    assert first.count(COMES_FIRST) == 2
    assert first.index("scored") < first.index("train 1/3")
    made = sidecar(tmp_path), sidecar(tmp_path, "valid")
    rpo("score", other)
    assert made == (sidecar(tmp_path), sidecar(tmp_path, "valid"))
    monkeypatch.setattr(score, "load_reference", lambda *args: pytest.fail("loaded the reference again"))
    assert rpo("config", STORED, other).count("ref_logp is there") == 2
    again = rpo("train", STORED, other, f"run_dir={tmp_path / 'again'}")
    resident = rpo("train", other, f"run_dir={tmp_path / 'resident'}")
    assert COMES_FIRST not in again
    assert losses(first) == losses(again) == losses(resident)
    assert len(losses(first)) == 3
    assert not list(tmp_path.glob("*.lock"))


def test_whoever_reads_it_makes_it(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a verb that sends the user away for what another verb does by itself, makes more than it reads, or gives
    other numbers than with the reference in memory."""
    tiny.write_store(tmp_path / "valid", num_groups=5, seed=2)
    tiny.write_model(tmp_path / "other", seed=1)
    words = [f"reference.path={tmp_path / 'other'}", "evaluation.checkpoint=start", "score.checkpoint=start"]
    resident = rpo("eval", *words), implicit(tmp_path, rpo, *words)
    evaluated = rpo("eval", STORED, *words)
    assert evaluated.count(COMES_FIRST) == 1  # of the held-out store alone
    assert not (tmp_path / "train.ref_logp.bin").exists()
    assert COMES_FIRST not in rpo("eval", STORED, *words)
    assert evaluated.splitlines()[-2] == resident[0].splitlines()[-2]
    assert implicit(tmp_path, rpo, STORED, *words) == resident[1]
    assert (tmp_path / "train.ref_logp.bin").exists()


def implicit(directory: Path, rpo: Rpo, *words: str) -> list[bytes]:
    rpo("score", "--with", "implicit", *words)
    return [(directory / f"{name}.column.implicit.bin").read_bytes() for name in ("train", "valid")]


def test_outdated_is_made_again(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a run that stops over numbers for tokens that no longer exist, or reads them."""
    rpo("score")
    old = sidecar(tmp_path)
    tiny.write_store(tmp_path / "train", num_groups=12, seed=9)
    assert "belongs to tokens that are no longer there" in rpo("config", STORED)
    assert "was made for tokens that are no longer there" in rpo("train", STORED)
    assert sidecar(tmp_path) != old


def test_another_references_numbers_are_left_alone(tmp_path: Path, rpo: Rpo, fails: Rpo) -> None:
    """Catches hours of a large model's work that a misspelt path or precision replaces."""
    rpo("score")
    before = sidecar(tmp_path)
    message = fails("train", STORED, "precision=bf16")
    assert "made by another reference: precision: stored 'fp32', this run 'bf16'" in message
    assert "rpo score" in message
    assert sidecar(tmp_path) == before
    assert "not known yet" in rpo("config", STORED, "precision=bf16")
    assert "scored" in rpo("score", "precision=bf16")  # asked for, it is replaced


def test_nowhere_to_write(tmp_path: Path, fails: Rpo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, after minutes of loading, over data that lies on a read-only disk."""
    monkeypatch.setattr(score, "load_reference", lambda *args: pytest.fail("loaded the reference"))
    (tmp_path / "train.ref_logp.lock").mkdir()  # stands for a directory without permission: root may write anywhere
    message = fails("train", STORED)
    assert "nothing can be written" in message
    assert "reference.mode=resident, or copy the store" in message


def test_two_runs_do_not_write_at_once(tmp_path: Path, fails: Rpo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches runs of a sweep that start together and write into one temporary file."""
    monkeypatch.setattr(score, "load_reference", lambda *args: pytest.fail("loaded the reference"))
    with locked(tmp_path / "train.ref_logp.lock"):
        assert "another process is writing" in fails("train", STORED)
        assert "another process is writing" in fails("score")


def test_one_store_to_train_on_and_to_hold_out(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a run that waits for the lock that it holds itself, or scores the same store twice."""
    assert rpo("score", f"data.valid={tmp_path / 'train'}").count("scored") == 1


def test_the_reference_is_gone_before_the_policy_is_built(
    tmp_path: Path, rpo: Rpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the memory of two models where one is the point of storing the reference's numbers."""
    loaded: list[Any] = []
    load, build = score.load_reference, training.build_policy

    def load_reference(*args: Any) -> Any:
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    def build_policy(*args: Any, **options: Any) -> Any:
        assert [reference() for reference in loaded] == [None]
        return build(*args, **options)

    monkeypatch.setattr(score, "load_reference", load_reference)
    monkeypatch.setattr(training, "build_policy", build_policy)
    rpo("train", STORED, "train.steps=1")
    assert len(loaded) == 1


def test_an_interrupted_pass_leaves_nothing(tmp_path: Path, rpo: Rpo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a sidecar, or a lock, that the next start trips over."""

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    rpo("config")
    with monkeypatch.context() as patch:
        patch.setattr(score, "run_responses", interrupted)
        assert cli.main(["train", str(tmp_path / "run.yaml"), STORED]) == 130
        stop()
    assert not list(tmp_path.glob("*ref_logp*"))
    assert "train 3/3" in rpo("train", STORED)
