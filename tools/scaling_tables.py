"""Write the planner's tables into docs/scaling.md, where tests/planning/test_scaling.py wants them:

python tools/scaling_tables.py

Every figure is an estimate of rpo_megatron/planning, for H100s in nodes of eight, a global batch of 1,024 groups with a
prompt of 1,024 tokens and 4 responses of 512, and a resident bf16 reference.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rpo_megatron.errors import UserError
from rpo_megatron.model.layout import check_layout
from rpo_megatron.planning.hardware import GIB, GPUS, Cluster
from rpo_megatron.planning.layout import Layout
from rpo_megatron.planning.layouts import Estimate, Question, search
from rpo_megatron.planning.memory import GPU, Reference, checkpoint_bytes
from rpo_megatron.planning.models import find_model
from rpo_megatron.planning.question import RECOMPUTE
from rpo_megatron.planning.time import Timing
from rpo_megatron.planning.workload import given_lengths

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/scaling.md"
MODELS = {
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.1-70b": "Llama-3.1-70B",
    "llama-3.1-405b": "Llama-3.1-405B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
}
COUNTS = (8, 32, 128, 512, 1024, 4096)
GROUPS = 1024
BUDGETS = (4096, 16384)
SPLITS = [(1, 1), (2, 1), (8, 1), (1, 4), (4, 4), (8, 4), (8, 8), (8, 16), (8, 32)]
REFERENCES: list[tuple[Reference, bool]] = [
    ("stored", False),
    ("offloaded", False),
    ("resident", False),
    ("resident", True),
    ("resident_fp8", True),
]
"""Where the reference is, and whether matrices multiply in FP8."""


def question(model: str, gpus: int, *, reference: Reference = "resident", fp8: bool = False) -> Question:
    gpu = GPUS["H100"]
    timing = Timing(
        model=find_model(model),
        work=given_lengths(prompt=1024, response=512, responses=4, share_prompt=True),
        cluster=Cluster(gpu=gpu, gpus=gpus, per_node=8),
        precision="bf16",
        reference=reference,
        groups_per_step=GROUPS,
        efficiency=gpu.efficiency,
        overlap=True,
        fp8=fp8,
    )
    return Question(timing=timing, kernels=replace(GPU, fp8=fp8), budgets=BUDGETS)


def best_layouts() -> Iterator[str]:
    """The fastest layout of each model on each number of GPUs."""
    yield "| model | GPUs | layout | recompute | GiB per rank | s per step | tokens/s, GPU | MFU | bubble | waiting |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, title in MODELS.items():
        for gpus in COUNTS:
            asked = question(name, gpus)
            plan = search(asked)
            if not plan.best:
                yield f"| {title} | {gpus:,} | does not fit: {_smallest(plan.too_large[0])} | | | | | | | |"
                continue
            one = plan.best[0]
            seconds, phases = one.time.seconds, one.time.phases
            waiting = phases["tensor"] + phases["pipeline"] + phases["data"]
            yield (
                f"| {title} | {gpus:,} | {_name(one.layout)} | {one.layout.recompute} | {one.bytes / GIB:.1f} "
                f"| {seconds:.2f} | {one.tokens_per_second / gpus:,.0f} | {one.mfu:.0%} "
                f"| {phases['bubble'] / seconds:.0%} | {waiting / seconds:.0%} |"
            )


def memory_and_volume() -> Iterator[str]:
    """Of the same layouts: where memory goes, and what a rank sends in a step."""
    yield (
        "| model | GPUs | weights | gradients | optimizer | reference | kept for backward | rest "
        "| tensor, GB | pipeline, GB | data, GB | experts, GB | checkpoint, host GiB per node |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name, title in MODELS.items():
        for gpus in COUNTS:
            for one in search(question(name, gpus)).best[:1]:
                memory, volume = {term: size / GIB for term, size in one.memory.items()}, one.time.volume
                kept = memory["attention"] + memory["activations"]
                rest = memory["head"] + memory["working"] + memory["overhead"]
                yield (
                    f"| {title} | {gpus:,} | {memory['weights']:.1f} | {memory['gradients']:.1f} "
                    f"| {memory['optimizer']:.1f} | {memory['reference']:.1f} | {kept:.1f} | {rest:.1f} "
                    f"| {volume.tensor / 1e9:,.1f} | {volume.neighbour / 1e9:,.1f} "
                    f"| {(volume.gradients + volume.weights) / 1e9:,.1f} | {volume.expert / 1e9:,.1f} "
                    f"| {8 * checkpoint_bytes(find_model(name), one.layout, 'bf16').host / GIB:,.0f} |"
                )


def where_layouts_break() -> Iterator[str]:
    """From how many GPUs on a split fits at all, what is too large below, and when data ranks outnumber groups."""
    yield "| model | tensor x pipeline | fits from | with half as many: too large with | more than groups above |"
    yield "|---|---|---|---|---|"
    for name, title in MODELS.items():
        for tensor, pipeline in SPLITS:
            if not _allowed(name, tensor, pipeline):
                continue
            below, fits = None, None
            for data in (2**i for i in range(13) if 2**i * tensor * pipeline <= COUNTS[-1]):
                one = _smallest_of(name, Layout(tensor=tensor, pipeline=pipeline, data=data))
                if one.fits:
                    fits = data * tensor * pipeline
                    break
                below = one.breaks
            shown, most = f"{fits:,} GPUs" if fits else "never", GROUPS * tensor * pipeline
            yield f"| {title} | {tensor} x {pipeline} | {shown} | {below or '-'} | {most:,} GPUs |"


def references() -> Iterator[str]:
    """What each kind of reference costs."""
    yield "| model, GPUs | matrices | reference | best layout | GiB per rank | of it reference | s per step |"
    yield "|---|---|---|---|---|---|---|"
    for name, gpus in (("llama-3.1-8b", 8), ("llama-3.1-70b", 64)):
        for reference, fp8 in REFERENCES:
            one = search(question(name, gpus, reference=reference, fp8=fp8)).best[0]
            yield (
                f"| {MODELS[name]}, {gpus} | {'FP8' if fp8 else 'bf16'} | {reference} "
                f"| {_name(one.layout)}, recompute {one.layout.recompute} | {one.bytes / GIB:.1f} "
                f"| {one.memory['reference'] / GIB:.1f} | {one.time.seconds:.2f} |"
            )


TABLES = {
    "best layouts": best_layouts,
    "memory and volume": memory_and_volume,
    "where layouts break": where_layouts_break,
    "references": references,
}


def with_tables(text: str) -> str:
    """The document with the tables between its markers replaced by what the planner says now."""
    for name, rows in TABLES.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        assert found, f"no table '{name}'"
        assert ended, f"table '{name}' has no end"
        text = before + begin + "\n".join(rows()) + "\n" + end + after
    return text


def _name(layout: Layout) -> str:
    chunks = f" ({layout.virtual} chunks)" * (layout.virtual > 1)
    experts = f" (experts {layout.expert})" * (layout.expert > 1)
    return f"{layout.tensor} x {layout.pipeline}{chunks} x {layout.data}{experts}"


def _smallest(estimate: Estimate) -> str:
    return f"{_name(estimate.layout)} needs {estimate.bytes / GIB:.0f} GiB, too large with its {estimate.breaks}"


def _allowed(name: str, tensor: int, pipeline: int) -> bool:
    try:
        check_layout(find_model(name).shape, tensor=tensor, pipeline=pipeline)
    except UserError:
        return False
    return True


def _smallest_of(name: str, layout: Layout) -> Estimate:
    """Over sequence parallelism, recomputation and expert ranks."""
    asked = question(name, layout.world)
    experts = asked.timing.model.shape.experts
    ranks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if layout.data % n == 0] if experts else [1]
    variants = [
        replace(layout, sequence=layout.tensor > 1, recompute=recompute, expert=expert)
        for recompute in RECOMPUTE
        for expert in ranks
    ]
    return min((Estimate(question=asked, layout=variant) for variant in variants), key=lambda one: one.bytes)


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
