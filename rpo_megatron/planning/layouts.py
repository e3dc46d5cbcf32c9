"""Every way to split a model over the GPUs of a cluster, judged: does it fit, how long does a step take."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from rpo_megatron.errors import UserError
from rpo_megatron.model.layout import check_layout
from rpo_megatron.planning.layout import Layout, Recompute
from rpo_megatron.planning.memory import Kernels, Row, Setting, Terms, worst_stage
from rpo_megatron.planning.time import Share, StepTime, Timing, step_time

VIRTUAL = (1, 2, 4, 8)
"""Chunks on each rank of a pipeline that are tried, where they have equally many layers: of unequal ones, ranks also
wait for each other inside a turn, which time.py does not count."""
BUDGETS = (2048, 4096, 8192, 16384, 32768, 65536)
"""Tokens in a row that are tried."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned."""

    timing: Timing
    kernels: Kernels
    budgets: tuple[int, ...] = BUDGETS
    recompute: tuple[Recompute, ...] = ("none", "mlp", "full")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A layout, judged."""

    question: Question
    layout: Layout

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.question.timing, self.layout)

    @cached_property
    def worst(self) -> tuple[int, Terms]:
        """(pipeline stage that needs most memory, its terms)."""
        timing, share = self.question.timing, self.share
        setting = Setting(
            model=timing.model,
            precision=timing.precision,
            reference=timing.reference,
            kernels=self.question.kernels,
            row=largest_row(share, self.layout, longest=timing.work.longest),
            microbatches=share.microbatches,
            offloaded_moments=timing.offloaded_moments,
        )
        return worst_stage(setting, self.layout)

    @cached_property
    def share(self) -> Share:
        timing = self.question.timing
        return Share.of(timing.work, self.layout, groups_per_step=timing.groups_per_step)

    @property
    def memory(self) -> Terms:
        return self.worst[1]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.question.timing.cluster.gpu.usable

    @property
    def breaks(self) -> str | None:
        """The first term with which the sum is more than a plan may fill; None where all fit."""
        total = 0.0
        for name, size in self.memory.items():
            total += size
            if total > self.question.timing.cluster.gpu.usable:
                return name
        return None

    @property
    def tokens_per_second(self) -> float:
        timing = self.question.timing
        return timing.groups_per_step * timing.work.tokens / self.time.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over time, as a share of the peak of all GPUs."""
        cluster = self.question.timing.cluster
        peak = cluster.gpu.fp32_flops if self.question.timing.precision == "fp32" else cluster.gpu.bf16_flops
        return self.time.model_flops / self.time.seconds / (cluster.gpus * peak)


def largest_row(share: Share, layout: Layout, *, longest: int) -> Row:
    """The row that memory has to hold: a full one where there is that much data, or that of the longest group."""
    average = share.row.tokens
    most = max(average, min(layout.tokens_per_microbatch, average * share.microbatches), longest)
    scale = most / average
    return Row(tokens=most, scored=scale * share.row.scored, repeated=scale * share.row.repeated)


def candidates(question: Question) -> Iterator[Layout]:
    """Tensor ranks inside a node, pipelines of at most a layer per stage (or chunk of one), data as the rest."""
    for split in _splits(question):
        sequences = (False, True) if split.tensor > 1 else (False,)
        if question.timing.model.shape.experts:
            sequences = (split.tensor > 1,)
        for sequence in sequences:
            for recompute in question.recompute:
                for budget in _budgets(question):
                    for virtual in _virtual(question, split):
                        yield replace(
                            split,
                            virtual=virtual,
                            sequence=sequence,
                            recompute=recompute,
                            tokens_per_microbatch=budget,
                        )


def _virtual(question: Question, split: Layout) -> list[int]:
    layers = question.timing.model.shape.num_layers
    return [n for n in VIRTUAL if n == 1 or (split.pipeline > 1 and layers % (n * split.pipeline) == 0)]


def _budgets(question: Question) -> tuple[int, ...]:
    """Smaller ones than a group put each group in a row of its own: of these the largest stands for all."""
    group = question.timing.work.tokens
    small = [budget for budget in question.budgets if budget < group]
    return (*small[-1:], *(budget for budget in question.budgets if budget >= group))


def _splits(question: Question) -> Iterator[Layout]:
    cluster, model = question.timing.cluster, question.timing.model
    for tensor in divisors(cluster.gpus):
        if tensor > cluster.per_node:
            continue
        for pipeline in divisors(cluster.gpus // tensor):
            layout = Layout(tensor=tensor, pipeline=pipeline, data=cluster.gpus // tensor // pipeline)
            try:
                check_layout(model.shape, tensor=tensor, pipeline=pipeline)
            except UserError:
                continue
            yield from _expert_splits(question, layout)


def _expert_splits(question: Question, layout: Layout) -> Iterator[Layout]:
    experts = question.timing.model.shape.experts
    for expert in divisors(math.gcd(experts.count, layout.tensor * layout.data) if experts else 1):
        yield replace(layout, expert=expert)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer."""

    best: list[Estimate]
    """Of each split that fits at all its fastest variant; fastest first."""
    too_large: list[Estimate]
    """Of each split that does not fit its smallest variant; smallest first."""


def search(question: Question) -> Plan:
    splits: dict[tuple[int, int, int], list[Estimate]] = {}
    for layout in candidates(question):
        key = (layout.tensor, layout.pipeline, layout.expert)
        splits.setdefault(key, []).append(Estimate(question=question, layout=layout))
    fitting = {key: [one for one in variants if one.fits] for key, variants in splits.items()}
    best = [fastest(variants) for variants in fitting.values() if variants]
    too_large = [min(splits[key], key=lambda one: one.bytes) for key, variants in fitting.items() if not variants]
    return Plan(
        best=sorted(best, key=lambda one: one.time.seconds), too_large=sorted(too_large, key=lambda one: one.bytes)
    )


def fastest(estimates: Iterable[Estimate]) -> Estimate:
    """Of those within 1 % of the fastest the one that needs least memory: the estimate is no better than that."""
    ordered = sorted(estimates, key=lambda one: one.time.seconds)
    close = [one for one in ordered if one.time.seconds <= 1.01 * ordered[0].time.seconds]
    return min(close, key=lambda one: one.bytes)
