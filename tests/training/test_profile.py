"""`profile.steps`: the phases are those of the step, the trace can be opened, and nothing else changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_megatron.training import operations, profile
from rpo_megatron.training.profile import MegatronTimers, Stopwatch, phases
from tests.training.conftest import Rpo, losses

WORDS = ["train.steps=5", "profile.steps=2"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a profiled run of five steps with a resident reference wrote and printed."""
    import contextlib
    import io

    from rpo_megatron import cli
    from rpo_megatron.distributed import stop
    from tests.training.conftest import yaml_of

    directory = tmp_path_factory.mktemp("profiled")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["train", yaml_of(directory), *WORDS]) == 0
    stop()
    folder = directory / "run" / "profile"
    return {
        "directory": directory,
        "printed": printed.getvalue(),
        "summary": json.loads((folder / profile.SUMMARY).read_text()),
        "trace": json.loads((folder / "trace-rank0.json").read_text()),
    }


def test_phases_add_up_to_the_step(profiled: dict[str, Any]) -> None:
    """Catches a phase that is counted twice or not at all: what no phase explains must be little."""
    (rank,) = profiled["summary"]["ranks"]
    seconds = rank["phases"]
    step = seconds.pop("step")
    assert sum(seconds.values()) == pytest.approx(step, rel=1e-9)
    assert -1e-6 < seconds["other"] < 0.35 * step
    for name in ("data", "reference", "forward", "backward", "optimizer", "logging"):
        assert seconds[name] > 0, name
    assert seconds["pipeline"] == 0
    assert seconds["forward"] > 0.1 * step
    assert seconds["backward"] > 0.1 * step


def test_the_trace_is_of_one_step(profiled: dict[str, Any]) -> None:
    """Catches a trace that no viewer opens, or one of all steps, too large to open."""
    assert profiled["summary"]["steps"] == [3, 4]
    names = [event.get("name") for event in profiled["trace"]["traceEvents"]]
    assert names.count("rpo: step") == 1
    assert {"rpo: optimizer", "rpo: reference", "rpo: attention"} <= set(names)
    assert set(operations.MATMULS) & set(names)


def test_operations_are_all_somewhere(profiled: dict[str, Any]) -> None:
    """Catches shares of something else than the step, and a part of the model whose operations nobody recognises."""
    (rank,) = profiled["summary"]["ranks"]
    shares = rank["operations"]
    assert sum(shares.values()) == pytest.approx(1)
    for row in ("attention", "output head", "other matmuls", "norms and elementwise", "optimizer", "reference pass"):
        assert shares[row] > 0.0005, row


def test_both_tables_are_printed_once(profiled: dict[str, Any]) -> None:
    """Catches a profile that only a viewer shows."""
    printed = profiled["printed"]
    assert printed.count("profile of steps 3 to 4") == 1
    for line in ("  backward ", "  output head ", "operations of step 5"):
        assert line in printed, line
    assert "pipeline" not in printed.split("profile of steps")[1], "a phase that took no time has no line"


def test_profiling_changes_no_number(profiled: dict[str, Any], rpo: Rpo, tmp_path: Path) -> None:
    """Catches hooks or timers that change what is computed, or that stay behind."""
    assert losses(rpo("train", "train.steps=5")) == losses(profiled["printed"])
    assert not (tmp_path / "run" / "profile").exists()


def test_directory(tmp_path: Path, rpo: Rpo) -> None:
    """Catches a knob that is not read."""
    rpo("train", "profile.steps=1", "profile.skip=0", f"profile.directory={tmp_path / 'elsewhere'}")
    assert (tmp_path / "elsewhere" / profile.SUMMARY).is_file()


def test_a_resumed_run_counts_from_where_it_starts(rpo: Rpo) -> None:
    """Catches a profile of steps that an earlier process has done, which would never come."""
    rpo("train", "train.steps=6", "train.stop_at=3")
    assert "profile of steps 5 to 5" in rpo("train", "train.steps=6", "profile.steps=1", "profile.skip=1")


def test_phases_of_megatrons_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a timer of megatron's under a new name, and one that holds others and would count them twice."""
    clock = iter(range(100))
    monkeypatch.setattr(profile.time, "perf_counter", lambda: float(next(clock)))
    watch = Stopwatch(torch.device("cpu"))
    timers = MegatronTimers(watch)
    with watch.span("step"):
        timers("forward-backward", log_level=1).start(barrier=True)
        for name in ("forward-compute", "forward-send-backward-recv", "backward-compute", "backward-recv"):
            timers(name, log_level=2).start()
            timers(name).stop()
        timers("all-grads-sync", log_level=1).start(barrier=True)
        timers("all-grads-sync").stop()
        timers("forward-backward").stop()
    assert phases(watch.seconds(), 1) == {
        **dict.fromkeys(("data", "reference", "optimizer", "logging"), 0.0),
        **{"forward": 1.0, "pipeline": 2.0, "backward": 1.0, "reduction": 1.0, "other": 6.0, "step": 11.0},
    }


class Event:
    """As much of torch.profiler's event as is read."""

    device_type = operations.DeviceType.CPU

    def __init__(self, name: str, time: float, parent: "Event | None" = None, sequence: int = -1) -> None:
        self.name, self.self_cpu_time_total, self.cpu_parent, self.sequence_nr = name, time, parent, sequence


def test_a_backward_operation_counts_where_its_forward_ran() -> None:
    """Catches a backward, two thirds of the work, that is all in one row; by hand: the head's product took 3 + 5 of
    20, attention's 2 + 4, that of the layers 1 + 3, the engine 2."""
    step = Event("rpo: step", 0)
    policy, backward = Event("rpo: policy", 0, step), Event("rpo: backward", 0, step)
    layers = Event("rpo: layers", 0, policy)
    attention = Event("rpo: attention", 0, layers)
    engine = operations.ENGINE + ": Mm"
    nodes = [Event(engine, 1, backward, sequence=7), Event(engine, 1, backward, sequence=8), Event(engine, 0, step, 9)]
    events = [
        *(step, policy, backward, layers, attention, *nodes),
        Event("aten::mm", 3, policy, sequence=9),
        Event("aten::mm", 1, layers, sequence=8),
        Event("aten::mm", 2, attention, sequence=7),
        Event("aten::mm", 4, Event("MmBackward0", 0, nodes[0])),
        Event("aten::mm", 3, nodes[1]),
        Event("aten::mm", 5, nodes[2]),
        Event("aten::mm", 50),  # before the step began
    ]
    assert operations.shares(events, device=torch.device("cpu")) == pytest.approx(
        {"output head": 0.4, "attention": 0.3, "other matmuls": 0.2, "between operations": 0.1}
    )
