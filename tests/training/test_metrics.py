"""The log: which numbers, in which order, and how far log-probabilities have moved since the run began."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_megatron.config import LoggingConfig, ParallelConfig
from rpo_megatron.data.packing import Balance
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.objectives.statistics import Stats
from rpo_megatron.training.metrics import METRICS_FILE, Metrics, format_line, format_table
from tests import tiny
from tests.training.conftest import Rpo


@pytest.fixture
def groups() -> Iterator[Groups]:
    yield start(ParallelConfig())
    stop()


def stats(**means: float) -> Stats:
    """Means over 4 things each."""
    count = torch.tensor(4.0, dtype=torch.float64)
    return {name: (torch.tensor(4 * mean, dtype=torch.float64), count) for name, mean in means.items()}


def metrics(run_dir: Path, groups: Groups) -> Metrics:
    return Metrics(LoggingConfig(tensorboard=False), run_dir=str(run_dir), num_steps=4, groups=groups)


def balance(*, useful: int = 96, rows: int = 100, mean: float = 50.0, most: float = 52.0) -> Balance:
    return Balance(useful_tokens=useful, row_tokens=rows, mean_cost=mean, max_cost=most)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def test_displacement_is_measured_from_the_first_evaluation(tmp_path: Path, groups: Groups) -> None:
    """Catches a change since the last evaluation, or since the resume, in the place of the change since the start."""
    before = metrics(tmp_path, groups)
    before.log_evaluation(0, stats(loss=1.0, logp_best=-10.0, logp_rest=-20.0), data="a", num_groups=5)
    before.log_evaluation(2, stats(loss=1.0, logp_best=-11.0, logp_rest=-24.0), data="a", num_groups=5)
    resumed = metrics(tmp_path, groups)
    resumed.log_evaluation(4, stats(loss=1.0, logp_best=-9.5, logp_rest=-28.0), data="a", num_groups=5)
    first, middle, last = records(tmp_path)
    assert "logp_best_change" not in first
    assert (middle["logp_best_change"], middle["logp_rest_change"]) == (-1.0, -4.0)
    assert (last["logp_best_change"], last["logp_rest_change"]) == (0.5, -8.0)


def test_displacement_compares_like_with_like(tmp_path: Path, groups: Groups) -> None:
    """Catches a run that goes on with another held-out store, or more of it, and shows the difference between the two
    stores as a movement of the policy; and a reward model, which has no log-probabilities."""
    first = metrics(tmp_path, groups)
    first.log_evaluation(0, stats(logp_best=-10.0), data="a", num_groups=5)
    first.log_evaluation(2, stats(logp_best=-11.0), data="a", num_groups=6)
    metrics(tmp_path, groups).log_evaluation(4, stats(logp_best=-11.0), data="b", num_groups=5)
    metrics(tmp_path, groups).log_evaluation(4, stats(loss=1.0), data="a", num_groups=5)
    assert not any("logp_best_change" in record for record in records(tmp_path))


def test_displacement_needs_the_start(tmp_path: Path, groups: Groups) -> None:
    """Catches a run whose evaluations were switched on in the middle, and the change since then taken for the whole."""
    log = metrics(tmp_path, groups)
    for step in (2, 4):
        log.log_evaluation(step, stats(logp_best=-10.0 - step), data="a", num_groups=5)
    assert not any("logp_best_change" in record for record in records(tmp_path))


def test_evaluations_and_steps_have_names_of_their_own(tmp_path: Path, groups: Groups) -> None:
    """Catches one list of names for both: statistics that only an evaluation has would be lost, or looked for in
    vain at the next step."""
    log = metrics(tmp_path, groups)
    log.log_evaluation(0, stats(loss=1.0, brier=0.25), data="a", num_groups=5)
    log.add(stats(loss=2.0), tokens=3, balance=balance())
    log.log(1, lr=0.1, grad_norm=1.0)
    log.log_evaluation(1, stats(loss=3.0, brier=0.5), data="a", num_groups=5)
    assert [(record["loss"], record.get("brier")) for record in records(tmp_path)] == [(1, 0.25), (2, None), (3, 0.5)]


def test_a_new_start_forgets_an_aborted_one(tmp_path: Path, rpo: Rpo) -> None:
    """Catches the first evaluation of a run that died before its first checkpoint, perhaps of another model, taken for
    that of the run that is started in its place."""
    tiny.write_store(tmp_path / "valid", num_groups=3, seed=2)
    aborted = {"step": 0, "kind": "valid", "logp_best": 0.0, "logp_rest": 0.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / METRICS_FILE).write_text(json.dumps(aborted) + "\n")
    rpo("train", "evaluation.every=3")
    first, *_, last = records(tmp_path / "run")
    assert first["logp_best"] < -1
    assert last["logp_best_change"] == pytest.approx(last["logp_best"] - first["logp_best"])


def test_waste_is_weighted_by_what_steps_take(tmp_path: Path, groups: Groups) -> None:
    """Catches a mean of shares, in which a short step counts for as much as a long one, and steps that are carried over
    into the next line. By hand: (90 + 396) / (100 + 400), and (60 + 205) / (50 + 200)."""
    log = metrics(tmp_path, groups)
    log.add(stats(loss=1.0), tokens=1, balance=balance(useful=90, rows=100, mean=50.0, most=60.0))
    log.add(stats(loss=1.0), tokens=1, balance=balance(useful=396, rows=400, mean=200.0, most=205.0))
    log.log(2, lr=0.1, grad_norm=1.0)
    log.add(stats(loss=1.0), tokens=1, balance=balance(useful=100, rows=100, mean=50.0, most=50.0))
    log.log(3, lr=0.1, grad_norm=1.0)
    first, second = records(tmp_path)
    assert (first["useful"], first["imbalance"]) == pytest.approx((0.972, 1.06))
    assert (second["useful"], second["imbalance"]) == (1.0, 1.0)


def test_a_run_says_what_it_wastes(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a plan whose statistics do not reach the log: without padding and other ranks there is no waste."""
    shown = rpo("train")
    assert [(record["useful"], record["imbalance"]) for record in records(tmp_path / "run")] == [(1.0, 1.0)] * 3
    assert "useful" not in shown


def test_the_line_is_silent_about_no_waste() -> None:
    """Catches two columns in every line of a run that wastes nothing, and waste that is never shown."""
    assert format_line({"loss": 1.0, "useful": 0.996, "imbalance": 1.004}) == "loss 1.0000"
    assert format_line({"loss": 1.0, "useful": 0.97, "imbalance": 1.06}) == "loss 1.0000 | useful 97% | imbalance 1.06"


def test_the_line_and_the_table() -> None:
    """Catches a name that is in no line, a minus before a zero, and a row for something that was not measured."""
    record = {"calibration_error": 0.125, "accuracy": 0.75, "loss": 0.5, "logp_best_change": -1e-9, "unknown": 1.0}
    assert format_line(record) == "loss 0.5000 | acc 0.750 | best change +0.00 | calib 0.125"
    rows = format_table(record).splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["loss", "0.5000"],
        ["accuracy", "0.7500"],
        ["calibration_error", "0.1250"],
    ]
