"""`rpo plan`: which layouts fit, what they need and how long a step takes, in words. Every figure is an estimate.

rpo plan run.yaml gpu=H100 gpus=8
rpo plan model=llama-3.1-8b gpu=H100 gpus=8 prompt=1024 response=512 responses=4
"""

from collections.abc import Iterator

from rpo_megatron.config_verbs import PlanConfig
from rpo_megatron.planning.hardware import GIB, LINK_EFFICIENCY, TENSOR_EFFICIENCY
from rpo_megatron.planning.layout import Layout
from rpo_megatron.planning.layouts import Estimate, Question, search
from rpo_megatron.planning.memory import checkpoint_bytes
from rpo_megatron.planning.models import count_active, count_parameters, count_trained
from rpo_megatron.planning.question import A_ROW_PER_GROUP, ask
from rpo_megatron.planning.time import FP8_GAIN

TERMS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimizer": "master weights and moments, fp32, over the data ranks",
    "reference": "weights of the reference",
    "attention": "what attention keeps for backward",
    "activations": "what the rest of the layers keeps",
    "head": "tiles of the output layer (logits of a row: none)",
    "working": "tensors of a moment: one layer's backward, the largest weight's gradient",
    "overhead": "CUDA, NCCL, allocator (assumed)",
}
PHASES = {
    "policy": "forward and backward, slowest stage",
    "reference": "the reference's forward pass",
    "tensor": "waiting for tensor, context and expert ranks",
    "bubble": "pipeline filling and draining",
    "pipeline": "sending between stages",
    "data": "gradients and weights between data ranks, as far as nothing hides it",
    "optimizer": "update",
}
HEADER = "tensor pipeline data  sequence recompute  tokens/row  rows   GiB/rank  s/step   tokens/s  groups/s   MFU"


def print_plan(config: PlanConfig) -> None:
    """Raises UserError when the question cannot be asked; that nothing fits is an answer."""
    asked = ask(config)
    for line in _answer(asked.question, asked.own, top=config.top, name=config.gpu):
        print(line)


def _answer(question: Question, own: Layout | None, *, top: int, name: str) -> Iterator[str]:
    yield from _premises(question, name)
    plan = search(question)
    if own is not None:
        yield from _own(question, own)
    if plan.best:
        listed = f"{min(top, len(plan.best))} of {len(plan.best)}"
        yield f"\nlayouts that fit, fastest first, {listed} (estimate, not measured)"
        yield from table(plan.best[:top])
        yield from _details(plan.best[0])
        yield f"\nto run the first: {overrides(plan.best[0].layout)}"
    else:
        yield "\nno layout fits"
    if plan.too_large:
        yield "\nwhat does not fit, at its smallest, and the term with which the sum is too large"
        yield from (_break(estimate) for estimate in plan.too_large[:top])
    yield from _assumptions(question)


def _premises(question: Question, name: str) -> Iterator[str]:
    timing = question.timing
    shape, cluster, work = timing.model.shape, timing.cluster, timing.work
    total, active = count_parameters(timing.model), count_active(timing.model)
    experts = f" ({_count(active)} of them per token)" * (active < total)
    yield (
        f"model    {timing.model.name}: {_count(total)} parameters{experts}, {shape.num_layers} layers, "
        f"hidden {shape.hidden_size}, {timing.precision}" + ", matrices in FP8" * timing.fp8
    )
    yield (
        f"GPUs     {cluster.gpus} {name} of {cluster.gpu.memory / GIB:.1f} GiB, "
        f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    )
    yield f"data     {work.source}"
    saved = f"; {work.repeated_tokens:,.0f} without shared prompts" * (work.repeated_tokens > work.tokens)
    yield f"group    {work.tokens:,.0f} tokens, {work.scored:,.0f} of them scored{saved}"
    if timing.model.adapter is not None:
        trained = f"{count_trained(timing.model) / 1e6:,.1f} million parameters are trained, the others frozen"
        yield f"adapter  rank {timing.model.adapter.rank}: {trained}"
    yield f"step     {timing.groups_per_step} groups; reference: {timing.reference}"


def _own(question: Question, own: Layout) -> Iterator[str]:
    estimate = Estimate(question=question, layout=own)
    yield "\nthe run's own layout (estimate, not measured)"
    yield from table([estimate])
    if not estimate.fits:
        yield _break(estimate)


def table(estimates: list[Estimate]) -> Iterator[str]:
    yield f"  {HEADER}"
    for one in estimates:
        layout, step = one.layout, one.time
        expert = f" expert {layout.expert}" * (layout.expert > 1)
        context = f" context {layout.context}" * (layout.context > 1)
        virtual = f" virtual {layout.virtual}" * (layout.virtual > 1)
        yield (
            f"  {layout.tensor:6} {layout.pipeline:8} {layout.data:4}  {_mark(layout.sequence):>8} "
            f"{layout.recompute:>9}  {one.share.row.tokens:10,.0f} {one.share.microbatches:5}  "
            f"{one.bytes / GIB:9.1f} {_seconds(step.seconds):>7} {one.tokens_per_second:10,.0f} "
            f"{one.question.timing.groups_per_step / step.seconds:9.1f}  {one.mfu:4.0%}{virtual}{expert}{context}"
        )


def _count(number: float) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f}"


def _seconds(number: float) -> str:
    return f"{number:.2f}" if number >= 1 else f"{number:.3g}"


def _mark(switch: bool) -> str:
    return "yes" if switch else "-"


def _details(estimate: Estimate) -> Iterator[str]:
    stage, memory = estimate.worst
    where = f", stage {stage} of {estimate.layout.pipeline}" * (estimate.layout.pipeline > 1)
    yield f"\nmemory of the first, GiB on the fullest rank{where}"
    yield from (f"  {memory[name] / GIB:7.2f}  {text}" for name, text in TERMS.items())
    timing = estimate.question.timing
    gpu = timing.cluster.gpu
    yield f"  {estimate.bytes / GIB:7.2f}  of {gpu.memory / GIB:.1f}, of which {gpu.usable / GIB:.1f} may be planned"
    saved = checkpoint_bytes(timing.model, estimate.layout, timing.precision)
    ranks = min(timing.cluster.gpus, timing.cluster.per_node)
    yield (
        f"  a checkpoint is {saved.disk / 1e9:,.0f} GB; to resume from it, a rank needs {saved.host / GIB:.1f} GiB "
        f"of host memory, a node {ranks * saved.host / GIB:,.0f}"
    )
    yield "\nstep of the first, seconds"
    phases = estimate.time.phases
    yield from (f"  {phases[name]:7.3f}  {text}" for name, text in PHASES.items())
    volume = estimate.time.volume
    sent = {
        "tensor": volume.tensor,
        "context": volume.context,
        "expert": volume.expert,
        "pipeline": volume.neighbour,
        "data": volume.gradients + volume.weights,
    }
    listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in sent.items() if size)
    yield f"  a rank sends: {listed or 'nothing'}"


def overrides(layout: Layout) -> str:
    """What makes a run use the layout."""
    words = [f"parallel.tensor={layout.tensor}", f"parallel.pipeline={layout.pipeline}"]
    words += [f"parallel.virtual={layout.virtual}"] * (layout.virtual > 1)
    words += [f"parallel.expert={layout.expert}"] * (layout.expert > 1)
    words += ["parallel.sequence=true"] * layout.sequence
    words += [f"recompute={layout.recompute}"] * (layout.recompute != "none")
    words += [f"data.tokens_per_microbatch={layout.tokens_per_microbatch}"] * (
        layout.tokens_per_microbatch > A_ROW_PER_GROUP
    )
    return " ".join(words)


def _break(estimate: Estimate) -> str:
    layout = estimate.layout
    expert = f" x expert {layout.expert}" * (layout.expert > 1)
    return (
        f"  tensor {layout.tensor} x pipeline {layout.pipeline}{expert}: {estimate.breaks} "
        f"({estimate.bytes / GIB:.1f} GiB in all: "
        + ", ".join(f"{name} {size / GIB:.1f}" for name, size in estimate.memory.items())
        + ")"
    )


def _assumptions(question: Question) -> Iterator[str]:
    timing = question.timing
    yield (
        f"\nassumed, not measured: matrices at {timing.efficiency:.0%} of the GPU's peak, {1 - TENSOR_EFFICIENCY:.0%} "
        f"less for each doubling of tensor; links at {LINK_EFFICIENCY:.0%} of their bandwidth; rows equally full"
        + f"; FP8 matrices {FP8_GAIN:g} times as fast as bf16's" * timing.fp8
        + ". docs/scaling.md has the formulas."
    )
