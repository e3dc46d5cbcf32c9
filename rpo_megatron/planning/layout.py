"""A layout, and the part of a model that one rank of it holds.

Megatron's order of ranks: tensor innermost, then context, data, pipeline. Weights that are split over the tensor ranks
and weights that every one of them holds (norms) are counted apart. The counts come from model/shape.num_parameters, the
function that the program itself counts with; test_layout.py compares them with megatron's own buffers.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

from rpo_megatron.model.adapter import adapted_matrices, adapter_entries
from rpo_megatron.model.layout import chunk_layers
from rpo_megatron.model.shape import ModelShape, num_parameters, padded_vocab
from rpo_megatron.planning.models import Model

Recompute = Literal["none", "mlp", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is split, and how it is run."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Chunks of layers on each rank of the pipeline; as ParallelConfig.virtual."""
    context: int = 1
    data: int = 1
    expert: int = 1
    """Expert parallel size: this many of a stage's tensor x context x data ranks share out the experts of a layer, each
    of them whole. With 1 every rank has its tensor share of all experts."""
    sequence: bool = False
    recompute: Recompute = "none"
    """As RunConfig.recompute."""
    tokens_per_microbatch: int = 4096

    @property
    def world(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def shards(self) -> int:
        """Ranks over which gradients are reduced and optimizer states split."""
        return self.data * self.context

    @property
    def expert_shards(self) -> int:
        """The same for the weights of experts."""
        return self.tensor * self.shards // self.expert_parts

    @property
    def expert_parts(self) -> int:
        """Ranks over which the experts of a layer are split."""
        return self.tensor if self.expert == 1 else self.expert


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers that one rank holds."""

    dense: float
    expert: float
    """Of experts, whose gradients are reduced over fewer ranks."""
    matrices: float
    """Of both, those of the layers' matrices, which FP8 concerns."""

    @property
    def total(self) -> float:
        return self.dense + self.expert


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Of a pipeline stage."""

    dense: int
    expert: int
    """Those with a mixture of experts."""

    @property
    def total(self) -> int:
        return self.dense + self.expert


@functools.cache
def layers_of(model: Model, pipeline: int, stage: int, virtual: int = 1) -> Layers:
    counts = chunk_layers(model.shape, pipeline, virtual)
    mine = range(stage, len(counts), pipeline)
    layers = [layer for i in mine for layer in range(sum(counts[:i]), sum(counts[: i + 1]))]
    experts = sum(map(model.shape.has_experts, layers))
    return Layers(dense=len(layers) - experts, expert=experts)


@functools.cache
def rank_numbers(model: Model, layout: Layout, stage: int) -> Numbers:
    """Of a rank of pipeline stage `stage` (counted from 0), padding of the vocabulary included; megatron's buffers pad
    each tensor further, by less than 64 numbers."""
    shape, parts, layers = model.shape, layer_parts(model), layers_of(model, layout.pipeline, stage, layout.virtual)
    embedding = padded_vocab(shape) * shape.hidden_size / layout.tensor
    split = layers.total * parts.attention + layers.dense * parts.dense + layers.expert * parts.shared
    dense = split / layout.tensor + layers.total * parts.norms + layers.expert * parts.router
    if stage == 0:
        dense += embedding
    if stage == layout.pipeline - 1:
        tied_here = shape.tied_embeddings and layout.pipeline == 1
        dense += parts.norms_of_model
        dense += shape.hidden_size if shape.head == "value" else 0.0 if tied_here else embedding
    expert = layers.expert * parts.experts / layout.expert_parts
    biases = layers.expert * parts.expert_biases / layout.expert
    return Numbers(dense=dense, expert=expert + biases, matrices=split / layout.tensor + expert)


@functools.cache
def trained_numbers(model: Model, layout: Layout, stage: int) -> Numbers:
    """Those that have gradients and optimizer states. All layers have the same adapters."""
    if model.adapter is None:
        return rank_numbers(model, layout, stage)
    layers, widths = layers_of(model, layout.pipeline, stage, layout.virtual).total, adapter_widths(model)
    dense = layers * (widths.whole + widths.split / layout.tensor)
    if model.shape.head == "value" and stage == layout.pipeline - 1:
        dense += model.shape.hidden_size
    return Numbers(dense=dense, expert=0.0, matrices=0.0)


@dataclass(frozen=True, kw_only=True)
class AdapterWidths:
    """Numbers of a layer's adapters."""

    whole: float = 0.0
    """Trained, on every tensor rank,"""
    split: float = 0.0
    """and split over them."""
    narrow: float = 0.0
    """Between A and B, of a token."""
    spread: float = 0.0
    """B spread out where megatron joins matrices (LoraLayer.wide); split over the tensor ranks."""


@functools.cache
def adapter_widths(model: Model) -> AdapterWidths:
    shape, adapter = model.shape, model.adapter
    if adapter is None:
        return AdapterWidths()
    shape = replace(shape, num_layers=1)
    sizes = {"whole": 0.0, "split": 0.0}
    for entry in adapter_entries(shape, adapter):
        kind = "whole" if entry.split == "replicated" else "split"
        sizes[kind] += sum(math.prod(size) for size in entry.tensors.values())
    stacked = {matrix: len(matrix.tensors) * adapter.rank for matrix in adapted_matrices(shape, adapter)}
    joined = [matrix for matrix in stacked if len(matrix.base.parts) > 1]
    rows = {matrix: sum(part.shape[0] for part in matrix.base.parts) for matrix in joined}
    spread = sum(stacked[matrix] * rows[matrix] for matrix in joined)
    return AdapterWidths(**sizes, narrow=sum(stacked.values()), spread=spread)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Numbers of a layer."""

    attention: int
    """Matrices and biases, split over the tensor ranks."""
    dense: int
    """Feed-forward of a layer without experts, split likewise."""
    experts: int
    """Of all experts of a layer, split over tensor and expert ranks."""
    expert_biases: int
    """Of their results: split over expert ranks alone."""
    shared: int
    """Of the expert that computes every token, split over the tensor ranks."""
    router: int
    """With its bias, and the shared expert's gate: whole on every rank."""
    norms: int
    """And the matrices that latent attention has whole on every tensor rank."""
    norms_of_model: int
    """After the last layer; not of a layer."""


@functools.cache
def layer_parts(model: Model) -> Parts:
    """By taking parts away from the shape and counting again."""
    shape, experts = replace(model.shape, experts=None), model.shape.experts
    norms = _layer(replace(shape, ffn_size=0, num_heads=0, num_kv_heads=0))
    attention = _layer(replace(shape, ffn_size=0))
    nothing = replace(shape, num_layers=0, vocab_size=0, head="lm")
    every = experts.count * experts.ffn_size if experts else 0
    shared = experts.shared_ffn_size if experts else 0
    return Parts(
        attention=attention - norms,
        dense=_layer(shape) - attention,
        experts=_layer(replace(shape, ffn_size=every)) - attention,
        shared=_layer(replace(shape, ffn_size=shared)) - attention,
        expert_biases=experts.count * shape.hidden_size * shape.biases if experts else 0,
        router=_router(model.shape),
        norms=norms,
        norms_of_model=num_parameters(nothing),
    )


def _router(shape: ModelShape) -> int:
    experts = shape.experts
    if experts is None:
        return 0
    return (experts.count + experts.shared_gate) * shape.hidden_size + experts.count * shape.biases


def _layer(shape: ModelShape) -> int:
    return num_parameters(replace(shape, num_layers=1)) - num_parameters(replace(shape, num_layers=0))
