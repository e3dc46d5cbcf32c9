"""What one sees while it runs: the log line, metrics.jsonl, TensorBoard. All numbers of all ranks in one reduction."""

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rpo_megatron.config import LoggingConfig
from rpo_megatron.data.packing import Balance
from rpo_megatron.distributed import Groups, gather_objects, sum_over_world
from rpo_megatron.fileio import write_text_atomically
from rpo_megatron.model.router import expert_numbers
from rpo_megatron.objectives.statistics import Stats, summarise
from rpo_megatron.training.forward import merge_stats

METRICS_FILE = "metrics.jsonl"
COLUMNS = (  # name, label, format
    ("loss", "loss", ".4f"),
    ("used", "used", ".2f"),
    ("accuracy", "acc", ".3f"),
    ("margin", "margin", "+z.4f"),
    ("reward_best", "reward best", "+z.4f"),
    ("reward_rest", "reward rest", "+z.4f"),
    ("logp_best", "logp best", ".1f"),
    ("logp_rest", "logp rest", ".1f"),
    ("logp_best_change", "best change", "+z.2f"),
    ("logp_rest_change", "rest change", "+z.2f"),
    ("kl", "kl", "+z.4f"),
    ("token_kl", "token kl", "z.4f"),
    ("entropy", "entropy", ".3f"),
    ("length_correlation", "length corr", "+z.3f"),
    ("load", "expert load", ".2f"),
    ("balance", "balance", ".3f"),
    ("router_z", "router z", ".2f"),
    ("best_of_n", "best of n", ".4f"),
    ("kendall_tau", "tau", "+z.3f"),
    ("brier", "brier", ".3f"),
    ("calibration_error", "calib", ".3f"),
    ("grad_norm", "grad", ".3g"),
    ("lr", "lr", ".2e"),
    ("useful", "useful", ".0%"),
    ("imbalance", "imbalance", ".2f"),
    ("tokens_per_second", "tok/s", ".0f"),
    ("step_seconds", "s/step", ".2f"),
    ("memory_gb", "GB", ".2f"),
)
"""The log line, in order; a record may lack some (a method without reference has no kl)."""
PERFECT = {"useful": 1.0, "imbalance": 1.0}
"""What the line passes over in silence; metrics.jsonl has it always."""
MEANINGS = {
    "loss": "of the objective, mean over the groups",
    "accuracy": "share of pairs that the model orders as the rewards do (chance 0.5)",
    "kendall_tau": "rank correlation with the rewards within a group, -1 to 1",
    "best_of_n": "reward of the response that the model ranks first",
    "reward_mean": "reward of a random response",
    "reward_max": "reward of the best response",
    "brier": "mean squared error of its preference probabilities (knows nothing 0.25)",
    "calibration_error": "mean distance between its confidence and its accuracy",
    "entropy": "of its next-token distribution, nats per token",
    "length_correlation": "of what it thinks responses are worth with their lengths, within a group",
}
"""The table of `rpo eval`, in order: the same for the implicit reward of a policy and for a reward model."""
DISPLACED = ("logp_best", "logp_rest")
"""An evaluation also shows how far these have moved since the run's first: likelihood displacement."""


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """The same on every rank."""

    means: dict[str, float]
    """And other numbers that follow from sums and counts."""
    tokens: float
    """Useful (non-padding) tokens over all data-parallel ranks."""
    memory_gb: float
    """Peak of the rank that needs most, in 1e9 bytes."""


class Reducer:
    """Turns the ranks' sums and counts into means with one all-reduce. For statistics that always have the same
    names: a training step and an evaluation need one each."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._names: list[str] = []

    def __call__(self, stats: Stats, *, tokens: int = 0, seen_LX: torch.Tensor | None = None) -> Reduced:
        """Every rank must call this; only the ranks that speak for their data are counted. `seen_LX` is what routers of
        experts saw (router.take_seen), of which every rank has its part."""
        if not self._names:
            self._names = max(gather_objects(list(stats)), key=len)  # only last stages know the names
        groups, num = self._groups, len(self._names)
        end = 2 * num + 1 + groups.world
        size = end + (0 if seen_LX is None else seen_LX.numel())
        vector = torch.zeros(size, dtype=torch.float64, device=groups.device)
        if seen_LX is not None:
            vector[end:] = seen_LX.flatten()
        if groups.speaks_for_data:
            vector[:num] = torch.stack([stats[name][0].double() for name in self._names])
            vector[num : 2 * num] = torch.stack([stats[name][1].double() for name in self._names])
            vector[2 * num] = tokens
        vector[2 * num + 1 + groups.rank] = peak_memory_gb(groups.device)
        reduced = sum_over_world(vector).cpu()
        numbers = reduced[:end].tolist()
        sums = dict(zip(self._names, numbers[:num], strict=True))
        counts = dict(zip(self._names, numbers[num : 2 * num], strict=True))
        means = summarise(sums, counts)
        if seen_LX is not None:
            means |= expert_numbers(reduced[end:].view_as(seen_LX), num_groups=counts["loss"])
        return Reduced(means=means, tokens=numbers[2 * num], memory_gb=max(numbers[2 * num + 1 :]))


class Metrics:
    """Collects steps on the device until a line is due, then reduces, prints and writes them."""

    _stats: Stats
    _balances: list[Balance]
    _tokens: int
    _steps: int
    _since: float

    def __init__(self, config: LoggingConfig, *, run_dir: str, num_steps: int, groups: Groups) -> None:
        self._every = config.every
        self._num_steps = num_steps
        self._reduce = Reducer(groups)
        self._reduce_evaluation = Reducer(groups)
        self._outputs = _open_outputs(config, Path(run_dir)) if groups.leads else None
        self._start_line()

    def add(self, stats: Stats, *, tokens: int, balance: Balance) -> None:
        """Take in one step: this rank's statistics, the tokens of its rows without padding, and how well they fill the
        rows and ranks of the whole step."""
        self._stats = merge_stats(self._stats, stats)
        self._tokens += tokens
        self._balances.append(balance)
        self._steps += 1

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._num_steps

    def log(self, step: int, *, lr: float, grad_norm: float, seen_LX: torch.Tensor | None = None) -> None:
        """Average over the steps since the last line, print and write; lr and grad_norm are the last step's, `seen_LX`
        what router.take_seen says of all of them.

        Every rank must call this.
        """
        reduced = self._reduce(self._stats, tokens=self._tokens, seen_LX=seen_LX)
        seconds = time.perf_counter() - self._since
        record = {
            **reduced.means,
            "grad_norm": grad_norm,
            "lr": lr,
            **_waste(self._balances),
            "tokens_per_second": reduced.tokens / seconds,
            "step_seconds": seconds / self._steps,
            "memory_gb": reduced.memory_gb,
        }
        self._write("train", step, record)
        self._start_line()

    def log_evaluation(self, step: int, stats: Stats, *, data: str, num_groups: int) -> None:
        """The same for statistics over the first `num_groups` of the store with the fingerprint `data`. Every rank must
        call this."""
        record = self._reduce_evaluation(stats).means
        about = {"data": data, "groups": num_groups}
        if self._outputs is not None:
            record = {**record, **_changes(record, first=_first_evaluation(self._outputs.jsonl, about))}
        self._write("valid", step, record, about=about)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is not a training step, whose time the steps' time leaves out."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def close(self) -> None:
        if self._outputs is not None and self._outputs.tensorboard is not None:
            self._outputs.tensorboard.close()

    def _start_line(self) -> None:
        self._stats = {}
        self._tokens = 0
        self._balances = []
        self._steps = 0
        self._since = time.perf_counter()

    def _write(self, kind: str, step: int, record: dict[str, float], *, about: dict[str, Any] | None = None) -> None:
        if self._outputs is None:
            return
        print(f"{kind} {step:>{len(str(self._num_steps))}}/{self._num_steps} | {format_line(record)}", flush=True)
        with self._outputs.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **(about or {}), **record}) + "\n")
        if self._outputs.tensorboard is not None:
            for name, value in record.items():
                self._outputs.tensorboard.add_scalar(f"{kind}/{name}", value, step)


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    jsonl: Path
    tensorboard: Any


def _open_outputs(config: LoggingConfig, run_dir: Path) -> _Outputs:
    writer = None
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        writer = SummaryWriter(str(run_dir / "tensorboard"))
    return _Outputs(jsonl=run_dir / METRICS_FILE, tensorboard=writer)


def format_line(record: dict[str, float]) -> str:
    shown = [(name, label, f"{record[name]:{form}}", form) for name, label, form in COLUMNS if name in record]
    return " | ".join(
        f"{label} {text}"
        for name, label, text, form in shown
        if name not in PERFECT or text != format(PERFECT[name], form)
    )


def format_table(record: dict[str, float]) -> str:
    """One line for each of MEANINGS that the record has."""
    return "\n".join(f"  {name:<19}{record[name]:>10.4f}  {text}" for name, text in MEANINGS.items() if name in record)


def _first_evaluation(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What the run logged at step 0, if that was about the same data."""
    if not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "valid" and record["step"] == 0:
            return record if about.items() <= record.items() else None
    return None


def _waste(balances: list[Balance]) -> dict[str, float]:
    """Shares of sums over steps: a step counts for as much as it takes."""
    return {
        "useful": sum(one.useful_tokens for one in balances) / sum(one.row_tokens for one in balances),
        "imbalance": sum(one.max_cost for one in balances) / sum(one.mean_cost for one in balances),
    }


def _changes(record: dict[str, float], *, first: dict[str, Any] | None) -> dict[str, float]:
    names = [name for name in DISPLACED if name in record]
    first = first or {}
    return {f"{name}_change": record[name] - first[name] for name in names if name in first}


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB (1e9): allocated on the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def drop_records_after(run_dir: str, step: int) -> None:
    """Forget what an interrupted run logged beyond the checkpoint that a resumed one starts from."""
    file = Path(run_dir) / METRICS_FILE
    if file.is_file():
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text_atomically(file, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # half a line: the process died while writing it
