"""Time of one training step, phase by phase, in seconds: FLOPs over a stated share of the peak, bytes over a stated
share of the links. An estimate: nothing here is measured.

FLOPs (a multiply-add is two) of a forward pass, per layer: 2 x matrix numbers per token, and 2 x heads x head_dim per
unit of `pairs` (workload.py), which is 4 per query-key pair (of latent attention the mean of a head's numbers in keys
and in values; zeros that values are filled up with do not count); and 2 x vocabulary x hidden per scored token. *Model*
FLOPs are 3 forward passes for the policy and 1 for a reference that is computed; MFU counts only these. *Executed*
FLOPs add what is computed twice: logits (all of them, although kernels.keep_logits_mib spares some), attention's scores
(0.5 of a forward pass), recomputed layers.

A stage's micro-batch takes c_i seconds; m micro-batches through p stages with v chunks on each take m max c_i and, to
fill and drain, (sum c_i - max c_i) / v: for equal stages m c / (1 - bubble) with bubble = (p - 1) / (v m + p - 1)
(arXiv 2104.04473, section 2.2). Transfers between stages count in full, although interleaving hides some of them.
"""

import math
from dataclasses import dataclass, field

from rpo_megatron.planning.hardware import TENSOR_EFFICIENCY, Cluster
from rpo_megatron.planning.layout import Layout, layer_parts, layers_of, rank_numbers, trained_numbers
from rpo_megatron.planning.memory import COMPUTED, WIDTH, Precision, Reference, Row
from rpo_megatron.planning.models import Model
from rpo_megatron.planning.volume import Volume, volumes
from rpo_megatron.planning.workload import Workload

ATTENTION_BACKWARD = 2.5
"""Flash attention's five products over the two of its forward pass."""
FP8_GAIN = 1.6
"""How much faster the layers' matrices multiply in FP8 than in bf16: 744 TFLOP/s of 8B pretraining (Megatron-Bridge
25.11) over 47 % of bf16's peak on an H100. An assumption, and less for small matrices."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of a forward pass over something, all ranks together."""

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


@dataclass(frozen=True, kw_only=True)
class Share:
    """A step's groups as the busiest data-parallel rank sees them."""

    groups: int
    microbatches: int
    row: Row
    pairs: float
    """Of a row."""

    @classmethod
    def of(cls, work: Workload, layout: Layout, *, groups_per_step: int) -> "Share":
        """Rows are taken as equally full, and their number as the least that holds the tokens."""
        groups = math.ceil(groups_per_step / layout.data)
        tokens = groups * work.tokens
        rows = min(groups, max(1, math.ceil(tokens / layout.tokens_per_microbatch)))
        if layout.virtual > 1:  # as packing.pack
            rows = max(rows, layout.pipeline)
        each = groups / rows
        repeated = each * work.repeated_tokens if work.repeated_tokens > work.tokens else 0.0
        row = Row(tokens=each * work.tokens, scored=each * work.scored, repeated=repeated)
        return cls(groups=groups, microbatches=rows, row=row, pairs=each * work.pairs)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by phase, and what was counted for it."""

    phases: dict[str, float]
    model_flops: float
    """Of all ranks together, of the groups of the step."""
    volume: Volume
    share: Share
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", sum(self.phases.values()))


def forward_flops(model: Model, *, tokens: float, pairs: float, scored: float) -> Flops:
    """Of all layers; of experts, those that compute a token."""
    shape, layers = model.shape, layers_of(model, 1, 0)
    matrices = layers.total * attention_matrices(model) + layers.dense * layer_parts(model).dense
    matrices += layers.expert * active_matrices(model)
    head = 2 * shape.vocab_size * shape.hidden_size * scored if shape.head == "lm" else 0.0
    return Flops(
        layers=2.0 * matrices * tokens,
        attention=1.0 * shape.num_layers * shape.num_heads * (shape.head_dim + shape.value_dim) * pairs,
        head=head,
    )


def attention_matrices(model: Model) -> int:
    """Numbers of a layer's attention that multiply a token: without biases."""
    shape = model.shape
    biases = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim if shape.qkv_bias else 0
    whole = shape.latent.width * shape.hidden_size if shape.latent is not None else 0
    return layer_parts(model).attention + whole - biases - shape.num_heads * shape.sinks


def active_matrices(model: Model) -> int:
    """The same of experts: the ones that compute the token, and the router."""
    experts, parts = model.shape.experts, layer_parts(model)
    return parts.experts // experts.count * experts.per_token + parts.shared + parts.router if experts else 0


def model_flops(flops: Flops, *, reference: Reference, adapter: bool = False) -> float:
    """Three passes for the policy, one for a reference that is computed in the step. With an adapter the policy's
    matrices have no gradients, which are one of the three; the adapter itself is not counted."""
    policy = flops.total * 3 - (flops.layers + flops.head if adapter else 0.0)
    return policy + flops.total * (reference in COMPUTED)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a step's time depends on besides the layout."""

    model: Model
    work: Workload
    cluster: Cluster
    precision: Precision
    reference: Reference
    groups_per_step: int
    efficiency: float
    """Share of the peak; see Gpu.efficiency."""
    overlap: bool
    """Data-parallel communication runs behind computation (parallel.overlap)."""
    fp8: bool = False
    """The layers' matrices multiply in FP8."""
    offloaded_moments: bool = False
    """Adam's moments are in host memory (optimizer.offload)."""


def step_time(timing: Timing, layout: Layout) -> StepTime:
    share = Share.of(timing.work, layout, groups_per_step=timing.groups_per_step)
    m, volume = share.microbatches, volumes(timing.model, layout, share.row, width=WIDTH[timing.precision])
    stages = sorted({0, layout.pipeline // 2, layout.pipeline - 1})
    forward = {stage: _forward(timing, layout, share, stage) for stage in stages}
    whole = {stage: _forward_backward(timing, layout, share, stage) for stage in stages}
    tensor = _inner(timing, layout, volume)  # seconds of tensor, context and expert communication of a forward pass
    reference = _pipeline(forward, tensor, layout, m) if timing.reference in COMPUTED else 0.0
    neighbours = timing.cluster.neighbour_bandwidth(size=layout.pipeline, stride=layout.world // layout.pipeline)
    passes = 2 + (timing.reference in COMPUTED)
    slowest = max(whole.values())
    inner = volume.backward_share * tensor
    phases = {
        "policy": m * slowest,
        "reference": reference + _offload(timing, layout),
        "tensor": m * inner,
        "bubble": _pipeline(whole, inner, layout, m) - m * (slowest + inner),
        "pipeline": (m + (layout.pipeline - 1) / layout.virtual) * passes * volume.neighbour / neighbours,
        "data": _data(timing, layout, volume, forward[0], whole[0] - forward[0]),
        "optimizer": _optimizer(timing, layout),
    }
    work, groups = timing.work, timing.groups_per_step
    flops = forward_flops(timing.model, tokens=work.tokens, pairs=work.pairs, scored=work.scored)
    adapter = timing.model.adapter is not None
    total = groups * model_flops(flops, reference=timing.reference, adapter=adapter)
    return StepTime(phases=phases, model_flops=total, volume=volume.of_step(m, passes), share=share)


def _pipeline(seconds: dict[int, float], inner: float, layout: Layout, m: int) -> float:
    """Of m micro-batches: m max c_i, and the others to fill the pipeline. `seconds` has the first stage, one between,
    and the last."""
    stages, ends, slowest = sorted(seconds), {0, layout.pipeline - 1}, max(seconds.values())
    between = (layout.pipeline - len(ends)) * seconds[stages[len(stages) // 2]]
    fill = sum(seconds[i] for i in ends) + between - slowest + (layout.pipeline - 1) * inner
    return m * (slowest + inner) + fill / layout.virtual


def _forward(timing: Timing, layout: Layout, share: Share, stage: int) -> float:
    """Seconds of a row's forward pass through a stage on one GPU, communication aside."""
    return _seconds(timing, layout, share, stage, layers=1.0, attention=1.0, head=1.0, traffic=1.0)


def _forward_backward(timing: Timing, layout: Layout, share: Share, stage: int) -> float:
    again = 1.0 if layout.recompute == "full" else 0.0
    # Weights are read for the result, its gradient and again where recomputed; their own gradients are written in
    # their precision, read, and added to the fp32 buffer: 2 w + 8 bytes for each number of w.
    width, frozen = WIDTH[timing.precision], timing.model.adapter is not None
    traffic = 2 + again + (0.0 if frozen else (2 * width + 8) / width)
    return _seconds(
        timing,
        layout,
        share,
        stage,
        layers=3 - frozen + (_feed_forward_share(timing.model) if layout.recompute == "mlp" else again),
        attention=1 + ATTENTION_BACKWARD + again,
        head=4.0 - frozen,
        traffic=traffic,
    )


def _seconds(
    timing: Timing,
    layout: Layout,
    share: Share,
    stage: int,
    *,
    layers: float,
    attention: float,
    head: float,
    traffic: float,
) -> float:
    """FLOPs of a row by the passes of each kind, and the weights' way through memory."""
    row, model, gpu = share.row, timing.model, timing.cluster.gpu
    flops = forward_flops(model, tokens=row.tokens, pairs=share.pairs, scored=row.scored)
    part = layers_of(model, layout.pipeline, stage, layout.virtual).total / model.shape.num_layers
    peak = gpu.fp32_flops if timing.precision == "fp32" else gpu.bf16_flops
    faster = FP8_GAIN if timing.fp8 else 1.0
    executed = part * (layers * flops.layers / faster + attention * flops.attention)
    if stage == layout.pipeline - 1:
        executed += head * flops.head
    narrow = TENSOR_EFFICIENCY ** math.log2(layout.tensor)
    weights = rank_numbers(model, layout, stage).total * WIDTH[timing.precision]
    compute = executed / (layout.tensor * layout.context) / (peak * timing.efficiency * narrow)
    return compute + traffic * weights / gpu.hbm_bandwidth


def _feed_forward_share(model: Model) -> float:
    """Of a layer's matrices."""
    layers, parts = layers_of(model, 1, 0), layer_parts(model)
    inside = layers.dense * parts.dense + layers.expert * active_matrices(model)
    return inside / (inside + layers.total * attention_matrices(model))


def _inner(timing: Timing, layout: Layout, volume: Volume) -> float:
    """Seconds that a row's forward pass through a stage waits for tensor, context and expert ranks."""
    cluster = timing.cluster
    tensor = volume.tensor / cluster.collective_bandwidth(size=layout.tensor, stride=1)
    context = volume.context / cluster.collective_bandwidth(size=layout.context, stride=layout.tensor)
    outside = max(0.0, 1 - cluster.per_node / layout.expert) if layout.expert > cluster.per_node else 1.0
    expert = outside * volume.expert / cluster.neighbour_bandwidth(size=layout.expert, stride=1)
    return tensor + context + expert


def _data(timing: Timing, layout: Layout, volume: Volume, forward: float, backward: float) -> float:
    """Reduce-scatter of gradients, all-gather of weights; with overlap what sticks out of the last micro-batch's
    backward and the next step's first forward."""
    bandwidth = timing.cluster.collective_bandwidth(size=layout.shards, stride=layout.tensor)
    reduce, gather = volume.gradients / bandwidth, volume.weights / bandwidth
    if not timing.overlap:
        return reduce + gather
    return max(0.0, reduce - backward) + max(0.0, gather - forward)


def _optimizer(timing: Timing, layout: Layout) -> float:
    """Adam reads gradient, master weight and moments and writes the last three and the weight: memory's speed. Moments
    in host memory come and go first, one way after the other."""
    numbers = trained_numbers(timing.model, layout, 0)
    shard = numbers.dense / layout.shards + numbers.expert / layout.expert_shards
    copies = shard * (8 + 8) / timing.cluster.gpu.pcie_bandwidth if timing.offloaded_moments else 0.0
    return shard * (4 + 12 + 12 + WIDTH[timing.precision]) / timing.cluster.gpu.hbm_bandwidth + copies


def _offload(timing: Timing, layout: Layout) -> float:
    """The reference's weights on their way from the host."""
    if timing.reference != "offloaded":
        return 0.0
    weights = rank_numbers(timing.model, layout, 0).total * WIDTH[timing.precision]
    return weights / timing.cluster.gpu.pcie_bandwidth
