"""How a training step's CPU time and peak memory grow with what it is given, one quantity at a time.

    python -m tools.bench.growth [OUTPUT.json] [--short | --tiny]

Every point is a step of ours in processes of its own (stored reference, shared prompts): CPU time is the median of some
steps, summed over the ranks; memory is the peak above the weights, of the rank with most. The exponent is the slope of
a straight line through the logarithms: 1 is proportional, 0 is constant.

groups   groups in the step, in one row
prompt   tokens of the prompt
K        responses of a group
vocabulary
layers
TP, PP, DP   ranks (gloo, one thread each) of tensor, pipeline and data parallelism, on the same groups; each rank has
             its share of them (DP), or of the model (TP, PP), in as many rows as there are groups
"""

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start
from tools.bench import ours, processes
from tools.bench.common import TINY, Data, Report, Size, cpu_seconds, main, write_config

THREADS = 2
LAYOUT = ("TP", "PP", "DP")


@dataclass(frozen=True, kw_only=True)
class Point:
    size: Size
    data: Data
    tp: int = 1
    pp: int = 1
    dp: int = 1
    rows: int = 1
    """Into which all groups are divided."""

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


@dataclass(frozen=True, kw_only=True)
class Mode:
    base: Point
    values: dict[str, Sequence[int]]
    rounds: int


SMALL = Size(vocab=32000, layers=4)
MODES = {
    "full": Mode(
        base=Point(size=Size(vocab=32000), data=Data(groups=2, responses=4, prompt=256)),
        values={
            "groups": (1, 2, 4, 8),
            "prompt": (128, 256, 512, 1024, 2048),
            "K": (2, 4, 8, 16),
            "vocabulary": (8064, 32000, 64000, 128256),
            "layers": (2, 4, 8, 16),
            "TP": (1, 2, 4),
            "PP": (1, 2, 4),
            "DP": (1, 2, 4),
        },
        rounds=5,
    ),
    "short": Mode(
        base=Point(size=SMALL, data=Data(groups=1, responses=4, prompt=256)),
        values={
            "groups": (1, 2, 4),
            "prompt": (128, 512, 2048),
            "K": (2, 4, 8),
            "vocabulary": (8064, 32000, 128256),
            "layers": (2, 4, 8),
            "TP": (1, 2),
            "PP": (1, 2),
            "DP": (1, 2),
        },
        rounds=2,
    ),
    "tiny": Mode(
        base=Point(size=TINY, data=Data(groups=1, responses=2, prompt=6, shortest=3, longest=9)),
        values={"K": (2, 4), "TP": (1, 2)},
        rounds=1,
    ),
}


def point(base: Point, quantity: str, value: int) -> Point:
    match quantity:
        case "groups" | "prompt":
            return replace(base, data=replace(base.data, **{quantity: value}))
        case "K":
            return replace(base, data=replace(base.data, responses=value))
        case "vocabulary":
            return replace(base, size=replace(base.size, vocab=value))
        case "layers":
            return replace(base, size=replace(base.size, layers=value))
        case _:  # the same four groups whatever the layout, a row each
            data = replace(base.data, groups=4)
            ranks = {axis: value if axis == quantity else 1 for axis in LAYOUT}
            return replace(base, data=data, rows=4, tp=ranks["TP"], pp=ranks["PP"], dp=ranks["DP"])


def benchmark(mode: str) -> Report:
    chosen = MODES[mode]
    results: list[dict[str, Any]] = []
    found: dict[tuple[Point, int], dict[str, Any]] = {}
    for quantity, values in chosen.values.items():
        for value in values:
            where, num_threads = point(chosen.base, quantity, value), 1 if quantity in LAYOUT else THREADS
            if (where, num_threads) not in found:  # quantities meet in the base, and layouts in one rank
                found[where, num_threads] = measure(where, rounds=chosen.rounds, num_threads=num_threads)
            results.append({"quantity": quantity, "value": value, **found[where, num_threads]})
            print("{quantity} {value}: {cpu_seconds:.2f} CPU s, {peak_mib:.0f} MiB".format(**results[-1]), flush=True)
    return Report(
        name="growth",
        title="Growth of a step's CPU time (summed over ranks) and peak memory (of the largest rank)",
        settings={"base": asdict(chosen.base), "rounds": chosen.rounds, "threads": THREADS},
        results=results,
        summary=[summary(quantity, results) for quantity in chosen.values],
    )


def measure(where: Point, *, rounds: int, num_threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), where.size)  # weights are drawn by the ranks
        found = processes.run(run_point, Path(folder), where, rounds, ranks=where.ranks, num_threads=num_threads)
    seconds = statistics.median(map(sum, zip(*(times for times, _ in found), strict=True)))
    return {
        "cpu_seconds": seconds,
        "peak_mib": max(peak for _, peak in found),
        "seconds_by_rank": [times for times, _ in found],
        "peak_by_rank": [peak for _, peak in found],
    }


def run_point(folder: Path, where: Point, rounds: int) -> tuple[list[float], float]:
    """(CPU seconds of each round, MiB at the peak of the first step) of this rank."""
    ranks = start(ParallelConfig(tensor=where.tp, pipeline=where.pp))
    policy = ours.load(folder, ranks)
    groups = where.data.make(vocab=where.size.vocab)
    groups = ours.with_stored_reference(groups, torch.zeros(len(groups), where.data.responses))
    rows = [groups[first :: where.rows] for first in range(where.rows)]
    before = processes.Peak.start()
    trainer = ours.Trainer.of(policy, ours.LOSS)

    def step() -> None:
        mine = rows[ranks.dp.rank :: ranks.dp.size]
        trainer.backward([ours.batch_of(row, share_prompt=True) for row in mine])

    peak = before.of(step)
    return [cpu_seconds(step)[0] for _ in range(rounds)], peak


def summary(quantity: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the README's table."""
    points = [result for result in results if result["quantity"] == quantity]
    values = [result["value"] for result in points]
    row: dict[str, Any] = {"what grows": quantity, "from": values[0], "to": values[-1]}
    for what, unit in (("cpu_seconds", "CPU s"), ("peak_mib", "MiB")):
        ys = [result[what] for result in points]
        row |= {f"{unit} from": ys[0], f"{unit} to": ys[-1], f"{unit} exponent": f"{exponent(values, ys):.2f}"}
    return row


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of log y over log x, by least squares."""
    slope: float = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope
    return slope


if __name__ == "__main__":
    main(__doc__, benchmark)
