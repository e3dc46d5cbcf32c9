"""What a run may change when it goes on from a checkpoint: refused, noted, or free."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpo_megatron.config import RunConfig
from rpo_megatron.data import sampler
from rpo_megatron.data.store import Store
from rpo_megatron.data.writer import write_column
from rpo_megatron.knobs import describe
from rpo_megatron.training import resume
from rpo_megatron.training import train as training
from rpo_megatron.training.resolve import Plan
from rpo_megatron.training.resume import FREE, KNOBS, NOTED, SET_BACK
from tests import tiny
from tests.training.conftest import Rpo, losses

CHANGED = "\nchanged "
"""The row of the header that names what is not as it was."""


@pytest.fixture
def begun(tmp_path: Path, rpo: Rpo) -> Path:
    """The state.json of a run that stopped after its first step."""
    tiny.run_config(tmp_path)  # makes the store
    store = Store.open(str(tmp_path / "train"))
    write_column(store, "length", [np.arange(k, dtype=np.float64) for k in store.num_responses_D], identity={})
    rpo("train", "train.stop_at=1")
    return tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json"


def knobs(config: type) -> set[str]:
    """Dotted names, as `rpo train --help` lists them."""
    lines = describe(config).splitlines()
    return {line.split(":")[0].strip() for line in lines if not line.startswith("      ")}


def test_every_knob_has_its_place() -> None:
    """Catches a new knob that a resumed run could change without anybody having thought of it."""
    new, gone = sorted(knobs(RunConfig) - KNOBS.keys()), sorted(KNOBS.keys() - knobs(RunConfig))
    assert not new, (
        f"{', '.join(new)}: may a run go on from its checkpoint with another value? Add a row to KNOBS in "
        f"rpo_megatron/training/resume.py: FREE if the weights come out the same (up to rounding), NOTED if training "
        f"just goes on otherwise (the header then says so), else the entry of state.json that says what the knob came "
        f'to: "objective" for what decides the loss of a group (and add the knob to `trained` there), or an entry of '
        f"your own (a field of RunState, filled in by train.py's _run_state, with a row in SET_BACK)"
    )
    assert not gone, f"{', '.join(gone)}: no knobs of RunConfig any more; remove their rows from KNOBS in resume.py"


def test_what_is_not_free_is_compared(tmp_path: Path, begun: Path) -> None:
    """Catches a knob whose entry in state.json is never written, or never looked at again."""
    kept = set(KNOBS.values()) - {FREE, NOTED}
    assert kept <= json.loads(begun.read_text()).keys()
    assert kept - SET_BACK.keys() == {"model", "adapter", "layout"}  # compared with the model itself
    recorded = resume.trained(Plan(config=tiny.run_config(tmp_path)))
    assert {KNOBS[name] for name in recorded} == {"objective"}
    assert recorded == json.loads(begun.read_text())["objective"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rewards.standardise=group", "rewards.standardise: none there, group here"),
        ("rewards.clip=2", "rewards.clip: None there, 2.0 here"),
        ("rewards.columns=[length]", "rewards.columns: ['reward'] there, ['length'] here"),
        ("objective.beta=0.25", "objective.beta: 0.5 there, 0.25 here"),
        ("objective.method=rpo_fwd", "objective.method: rpo_bwd there, rpo_fwd here"),
    ],
)
def test_another_objective_is_another_run(
    begun: Path, fails: Rpo, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    """Catches a run whose loss means something else from one line of its log to the next, and one that is refused only
    after what may take hours: a pass of the reference, loading the model."""
    monkeypatch.setattr(training, "make_reference", lambda *_: pytest.fail("more was done before"))
    message = fails("train", override)
    assert words in message
    assert "set it back, or start a new run in another run_dir" in message


def test_another_order_of_the_data(begun: Path, rpo: Rpo, fails: Rpo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a version of the program that orders the data otherwise and goes on in the middle of a pass, so that
    some groups come twice and others not at all."""
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "_ROUNDS", 20)
        assert "as another version of this program orders it" in fails("train")
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "_DRAW", 3)
        assert "as another version of this program orders it" in fails("train")
    record: dict[str, Any] = json.loads(begun.read_text())
    older = {name: value for name, value in record.items() if name not in ("order", "objective")}
    begun.write_text(json.dumps(older))
    shown = rpo("train", "train.stop_at=2")
    assert shown.split(CHANGED)[1].count("does not say") == 1
    assert "objective and rewards" in shown
    assert "in which order its data came" in shown


def test_noted_and_free(tmp_path: Path, begun: Path, rpo: Rpo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a knob that changes unseen, or is said to change and comes back from the checkpoint all the same; a note
    on a run that goes on as it was, and a default that is taken for a change when it is written out."""
    same = rpo("train", "rewards.columns=[reward]", "rewards.standardise=none", f"data.train={tmp_path}/./train")
    assert CHANGED not in same
    assert len(losses(same)) == 2
    (begun.parent.parent / "latest").write_text("step-00000001\n")
    groups: list[dict[str, Any]] = []
    step = training.train_step

    def train_step(model: Any, optimizer: Any, *args: Any, **options: Any) -> Any:
        result = step(model, optimizer, *args, **options)
        groups.extend(dict(group) for group in optimizer.param_groups)
        return result

    monkeypatch.setattr(training, "train_step", train_step)
    noted = ["optimizer.lr=0.02", "optimizer.weight_decay=0.3", "optimizer.beta1=0.8", "optimizer.eps=1e-4"]
    other = rpo("train", *noted, "train.steps=4", "train.stop_at=2", "data.packing=false", "recompute=full")
    changed = other.split(CHANGED)[1].split("\nlayout ")[0].split("\n")
    assert [line.strip() for line in changed] == [
        "optimizer.lr was 0.01, is 0.02 from here on",
        "optimizer.weight_decay was 0.0, is 0.3 from here on",
        "optimizer.beta1 was 0.9, is 0.8 from here on",
        "optimizer.eps was 1e-08, is 0.0001 from here on",
        "train.steps was 3, is 4 from here on",
    ]
    assert {(group["lr"], *group["betas"], group["eps"], group["step"]) for group in groups} == {
        (0.02, 0.8, 0.95, 1e-4, 2)
    }
    assert max(group["weight_decay"] for group in groups) == 0.3
