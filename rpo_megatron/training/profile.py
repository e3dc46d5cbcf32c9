"""Where the time of a training step goes: `rpo train run.yaml profile.steps=3`.

1. The first `profile.skip` steps of the process go by.
2. Of the next `profile.steps`, only phases are timed: by events on a GPU, which nobody waits for before the end, and by
   the host's clock on a CPU. Megatron says itself when a forward, a backward or a transfer between stages begins and
   ends (its `config.timers`).
3. One more step is traced with torch.profiler, which slows it down: its trace and the shares of its operations
   (operations.py) are good for proportions, the phases for times.
4. Rank 0 prints both tables; they and the ranks' traces are in the profile's directory.

A run without profile.steps has a Profiler that does nothing.
"""

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rpo_megatron.config import ProfileConfig, RunConfig
from rpo_megatron.distributed import Groups, gather_objects
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import write_json
from rpo_megatron.training import operations

PHASES = {
    "data": "the host waits for rows, and moves them to the device",
    "reference": "forward pass of a resident reference",
    "forward": "of the policy, with the objective",
    "backward": "with what overlaps it",
    "pipeline": "sending to other stages and waiting for them",
    "reduction": "of gradients over data-parallel ranks, as far as backward does not hide it",
    "optimizer": "gradient norm, clipping, update, gathering weights",
    "logging": "reducing and writing the statistics",
    "other": "all else",
}
"""In the order of the table."""
REDUCTIONS = ("all-grads-sync", "embedding-grads-all-reduce", "non-tensor-parallel-grads-all-reduce")
SUMMARY = "summary.json"


class Profiler:
    """Does nothing."""

    def step(self, step: int) -> AbstractContextManager[None]:
        """Around training step `step` (counted from 0)."""
        return nullcontext()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of a step, one of PHASES."""
        return nullcontext()

    def report(self) -> None:
        """Print and write, after the step that completes the profile. Every rank must call this after every step."""


def check_profile(config: ProfileConfig, *, num_steps: int) -> None:
    """Raises UserError when a process that trains `num_steps` steps ends before the profile does."""
    wanted = config.skip + config.steps + 1
    if config.steps and wanted > num_steps:
        raise UserError(
            f"profile.skip={config.skip} and profile.steps={config.steps}, then one to trace, are {wanted} steps; this "
            f"run has {num_steps} to go; profile fewer, or train more"
        )


def build_profiler(config: RunConfig, model: Any, groups: Groups, *, first_step: int) -> Profiler:
    """For a process that trains `model`, megatron's DDP, from step `first_step` on."""
    if not config.profile.steps:
        return Profiler()
    directory = Path(config.profile.directory or Path(config.run_dir) / "profile")
    first = first_step + config.profile.skip
    return StepProfiler(model, groups, directory=directory, first=first, count=config.profile.steps)


class StepProfiler(Profiler):
    """Times steps `first` to `first + count` (exclusive), traces the one that follows, prints and writes."""

    def __init__(self, model: Any, groups: Groups, *, directory: Path, first: int, count: int) -> None:
        self._model = model
        self._groups = groups
        self._directory = directory
        self._timed = range(first, first + count)
        self._watch = Stopwatch(groups.device)
        self._now: Stopwatch | None = None
        """The watch, in a step that is timed."""
        self._tracer: profile | None = None
        """What was traced and not yet reported."""

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        if step in self._timed:
            with self._timing():
                yield
        elif step == self._timed.stop:
            with self._tracing() as tracer:
                yield
            self._tracer = tracer
        else:
            yield

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(operations.PREFIX + name), self._now.span(name) if self._now else nullcontext():
            yield

    @contextlib.contextmanager
    def _timing(self) -> Iterator[None]:
        config = self._model.module.config
        self._now, config.timers = self._watch, MegatronTimers(self._watch)
        with self._watch.span("step"):
            yield
        self._now = config.timers = None

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[profile]:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._groups.device.type == "cuda")
        with (
            profile(activities=activities, acc_events=True) as tracer,
            operations.named_scopes(self._model.module),
            record_function(operations.PREFIX + "step"),
        ):
            yield tracer

    def report(self) -> None:
        if self._tracer is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        self._tracer.export_chrome_trace(str(self._directory / f"trace-rank{self._groups.rank}.json"))
        mine = {
            "phases": phases(self._watch.seconds(), len(self._timed)),
            "operations": operations.shares(self._tracer.events() or [], device=self._groups.device),
        }
        self._tracer = None
        ranks = gather_objects(mine)
        if self._groups.leads:
            steps = [self._timed.start + 1, self._timed.stop]
            write_json(self._directory / SUMMARY, {"steps": steps, "ranks": ranks})
            print(table(ranks, first=steps[0], last=steps[1], directory=self._directory), flush=True)


class Stopwatch:
    """Seconds of named spans of time on a device."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        """A moment: a number on the host, an event in the device's queue."""
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, began: Any) -> None:
        """A span that ends now."""
        self._spans.append((name, began, self.mark()))

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = self.mark()
        yield
        self.add(name, began)

    def seconds(self) -> dict[str, float]:
        """Sums over the spans of each name. Waits for the device."""
        if self._is_gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for name, began, ended in self._spans:
            seconds = began.elapsed_time(ended) / 1e3 if self._is_gpu else ended - began
            total[name] = total.get(name, 0.0) + seconds
        return total


class MegatronTimers:
    """What megatron takes for its timers (TransformerConfig.timers): called with a name, it gives something with
    `start` and `stop`. Here these write into a stopwatch; what is no phase of ours is let go by."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int = 0) -> "_Timer":
        if name not in self._timers:
            self._timers[name] = _Timer(self._watch, _phase_of(name))
        return self._timers[name]


class _Timer:
    def __init__(self, watch: Stopwatch, phase: str | None) -> None:
        self._watch, self._phase = watch, phase
        self._began: Any = None

    def start(self, barrier: bool = False) -> None:
        """Without the barrier that megatron suggests: it would take the waiting out of where it happens."""
        if self._phase is not None:
            self._began = self._watch.mark()

    def stop(self, barrier: bool = False) -> None:
        if self._phase is not None:
            self._watch.add(self._phase, self._began)


def _phase_of(timer: str) -> str | None:
    if timer in ("forward-compute", "backward-compute"):
        return timer.removesuffix("-compute")
    if timer in REDUCTIONS:
        return "reduction"
    return "pipeline" if timer.endswith(("-recv", "-send")) else None


def phases(seconds: dict[str, float], num_steps: int) -> dict[str, float]:
    """Seconds per step of each of PHASES and of the whole `step`, which they add up to."""
    per_step = {name: value / num_steps for name, value in seconds.items()}
    known = {name: per_step.get(name, 0.0) for name in PHASES if name != "other"}
    return {**known, "other": per_step["step"] - sum(known.values()), "step": per_step["step"]}


def table(ranks: list[dict[str, dict[str, float]]], *, first: int, last: int, directory: Path) -> str:
    """Both tables, averaged over the ranks. A phase that took no time on any of them has no line."""
    step = _mean(ranks, "phases", "step")
    lines = [
        f"profile of steps {first} to {last}: {1e3 * step:.1f} ms a step",
        f"  {'phase':<12}{'ms':>10}{'share':>8}",
    ]
    for name, meaning in PHASES.items():
        seconds = _mean(ranks, "phases", name)
        if any(rank["phases"][name] for rank in ranks):
            lines.append(f"  {name:<12}{1e3 * seconds:>10.2f}{seconds / step:>8.1%}  {meaning}")
    lines.append(f"  operations of step {last + 1}, as traced (slower than the steps above)")
    for name in sorted(ranks[0]["operations"], key=lambda name: -_mean(ranks, "operations", name)):
        lines.append(f"  {name:<22}{_mean(ranks, 'operations', name):>8.1%}")
    lines.append(f"  traces and numbers by rank: {directory}")
    return "\n".join(lines)


def _mean(ranks: list[dict[str, dict[str, float]]], kind: str, name: str) -> float:
    return sum(rank[kind].get(name, 0.0) for rank in ranks) / len(ranks)
