"""LoRA adapters beside megatron's linear layers, whatever they are made of: forward hooks add what adapter.py says.

    layer            x                       A                x A^T [T, n r]                          B
    column           whole, or its rows (SP) whole            gathered over TP (SP)                   its rows
    row              its columns             its columns      summed over TP, or summed and split     whole

Only n r numbers per token travel. Gradients: what is whole sees all tokens on every rank, and its gradient comes out
whole, since what travelled was reduced on its way back (column) or there (row); except under sequence parallelism,
where it sees its rank's tokens, and megatron sums over the tensor ranks because it is marked `sequence_parallel`.

B starts as 0, so that the policy adds exact zeros to its reference: the same model with its adapters off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from rpo_megatron.distributed import Axis
from rpo_megatron.model.adapter import LORA_A, LORA_B, AdaptedMatrix, Adapter, adapted_matrices
from rpo_megatron.model.chunks import chunks_of
from rpo_megatron.model.hf import shard
from rpo_megatron.model.shape import ModelShape
from rpo_megatron.model.table import SCORE


class LoraLayer(torch.nn.Module):
    """The adapter of one matrix: forward(x, y) is y + scale (x A^T) B^T."""

    def __init__(self, matrix: AdaptedMatrix, adapter: Adapter, base: Any, *, shape: ModelShape, tp: Axis) -> None:
        super().__init__()
        self.scale = adapter.scale
        self.by_input = matrix.base.split == "input"
        self.tp = tp
        self.sequence_parallel: bool = base.config.sequence_parallel
        owner_O, row_O = _rows(matrix, shape, tp)
        count = len(matrix.tensors)
        options = {"dtype": base.config.params_dtype, "device": base.weight.device}
        self.a = torch.nn.Parameter(torch.zeros(count * adapter.rank, base.weight.shape[1], **options))
        b = torch.zeros(len(owner_O), adapter.rank, **options)
        # Gate and up are two blocks of rows on every rank: two slices, each cut over the ranks along one dimension.
        self.b = torch.nn.Parameter(b.unflatten(0, (len(matrix.chosen), -1)) if matrix.base.split == "gated" else b)
        self._mark()
        share_ON = F.one_hot(owner_O, count).to(**options) if count > 1 else None
        self.register_buffer("share_ON", share_ON, persistent=False)
        complete = len(row_O) == base.weight.shape[0]
        self.register_buffer("row_O", None if complete else row_O.to(base.weight.device), persistent=False)
        self.num_rows: int = base.weight.shape[0]

    def _mark(self) -> None:
        """Tell megatron which is split, and which is whole but sees only its rank's tokens."""
        split, whole = (self.a, self.b) if self.by_input else (self.b, self.a)
        set_tensor_model_parallel_attributes(split, True, 1 if self.by_input else self.b.dim() - 2, 1)
        setattr(whole, "sequence_parallel", self.sequence_parallel)  # noqa: B010 (an attribute of megatron's)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x, y [T(/tp under SP), 1, *]: what goes into the layer of megatron's, and what comes out of it."""
        narrow = self._across_ranks(x.flatten(0, -2) @ self.a.T) * self.scale
        # Two dimensions also for the layer's backward: torch.matmul is slow on the strides of some [T, 1, H] gradients.
        return torch.addmm(y.flatten(0, -2), narrow, self.wide().T).view_as(y)

    def wide(self) -> torch.Tensor:
        """B as one matrix over the stacked A, [out, n r]: a row's r numbers stand where its A is, zeros elsewhere."""
        rows_OR = self.b.flatten(0, -2)
        if self.share_ON is not None:
            rows_OR = (rows_OR[:, None, :] * self.share_ON[:, :, None]).flatten(1)
        if self.row_O is None:
            return rows_OR
        return rows_OR.new_zeros(self.num_rows, rows_OR.shape[1]).index_copy(0, self.row_O, rows_OR)

    def delta(self) -> torch.Tensor:
        """What this rank's part of the matrix would have to change by, fp32; no communication."""
        return self.scale * (self.wide().float() @ self.a.float())

    def _across_ranks(self, narrow: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return narrow
        group = self.tp.group
        if self.by_input and self.sequence_parallel:  # reduce-scatter; all-gather backward
            return reduce_scatter_to_sequence_parallel_region(narrow, group=group)
        if self.by_input:  # all-reduce; identity backward
            return reduce_from_tensor_model_parallel_region(narrow, group=group)
        if self.sequence_parallel:  # all-gather; reduce-scatter backward
            return gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(narrow, group=group)  # identity; all-reduce backward


class Adapters(torch.nn.ModuleDict):
    """All of a model's (pipeline stage's) LoraLayers, by the names of megatron's layers with / for the dots."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter
        self.enabled = True
        self.hooks: list[Any] = []
        self.frozen: list[torch.nn.Parameter] = []
        """What was trained without them."""


def attach(model: Any, adapter: Adapter) -> None:
    """Give a model adapters, all zeros, and freeze everything else but a value head. Before DDP wraps it."""
    for chunk in chunks_of(model):
        adapters = Adapters(adapter)
        for matrix in adapted_matrices(chunk.shape, adapter):
            base = _layer(chunk, matrix.module)
            if base is not None:
                name = matrix.module.replace(".", "/")
                adapters[name] = LoraLayer(matrix, adapter, base, shape=chunk.shape, tp=chunk.tp)
                adapters.hooks.append(base.register_forward_hook(_adder(adapters, name)))
        if chunk.pre_process:
            adapters.hooks.append(chunk.embedding.register_forward_hook(_begin_backward_here))
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and name != SCORE:
                adapters.frozen.append(parameter.requires_grad_(False))
        chunk.adapters = adapters


def adapter_of(model: Any) -> Adapter | None:
    """None for a model without one."""
    adapters: Adapters | None = getattr(chunks_of(model)[0], "adapters", None)
    return None if adapters is None else adapters.adapter


def adapter_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """This rank's part of the adapter by the names of adapter_entries; of a reward model also its value head."""
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks_of(model):
        for name, lora in chunk.adapters.items():
            module = name.replace("/", ".")
            named |= {f"{module}.{LORA_A}": lora.a, f"{module}.{LORA_B}": lora.b}
        named |= {name: parameter for name, parameter in chunk.named_parameters() if name == SCORE}
    return named


def merge(model: Any) -> None:
    """Fold the adapters into the weights, rounded once, and take them off."""
    for chunk in chunks_of(model):
        with torch.no_grad():
            for name, lora in chunk.adapters.items():
                weight = _layer(chunk, name.replace("/", ".")).weight
                weight.copy_(weight.float() + lora.delta())
        for hook in chunk.adapters.hooks:
            hook.remove()
        for parameter in chunk.adapters.frozen:
            parameter.requires_grad_(True)
        del chunk.adapters


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """While it lasts, the model is its base."""
    every = [chunk.adapters for chunk in chunks_of(model)]
    try:
        for adapters in every:
            adapters.enabled = False
        yield
    finally:
        for adapters in every:
            adapters.enabled = True


def _layer(chunk: Any, module: str) -> Any:
    """The layer of megatron's with this name, None where it is in another chunk."""
    number, _, inside = module.removeprefix("decoder.layers.").partition(".")
    here = [layer for layer in chunk.decoder.layers if layer.layer_number - 1 == int(number)]
    return here[0].get_submodule(inside) if here else None


def _adder(adapters: Adapters, name: str) -> Any:
    """Hook of a layer. megatron's layers give (result, bias that somebody else adds)."""

    def add(base: Any, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor | None]) -> Any:
        if not adapters.enabled:
            return None
        y, bias = output
        return adapters[name](_normed(base, args[0]), y), bias

    return add


def _normed(base: Any, x: torch.Tensor) -> torch.Tensor:
    """What the layer multiplies: Transformer Engine's layers norm their input first, with weights of their own."""
    weight = getattr(base, "layer_norm_weight", None)
    if weight is None:
        return x
    eps, sizes = base.config.layernorm_epsilon, (x.shape[-1],)
    full = weight.float() + base.config.layernorm_zero_centered_gamma
    bias = getattr(base, "layer_norm_bias", None)
    if bias is None:
        return F.rms_norm(x.float(), sizes, full, eps).type_as(x)
    return F.layer_norm(x.float(), sizes, full, bias.float(), eps).type_as(x)


def _begin_backward_here(module: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor | None:
    """The embedding is frozen, but a layer that backward computes again must see an input that has a gradient: without
    one, autograd takes its result for a constant and its adapters get none."""
    return hidden.detach().requires_grad_() if torch.is_grad_enabled() else None


def _rows(matrix: AdaptedMatrix, shape: ModelShape, tp: Axis) -> tuple[torch.Tensor, torch.Tensor]:
    """Of this rank's rows of B: which of the stacked A each belongs to, and which row of the base it is."""
    number = {tensor: i for i, tensor in enumerate(matrix.tensors)}
    sizes = matrix.base.tensors

    def marked(tensor: str) -> torch.Tensor:
        return torch.full((sizes[tensor][0], 1), number.get(tensor, -1))

    if matrix.base.split == "input":
        rows = sizes[matrix.tensors[0]][0]
        return torch.zeros(rows, dtype=torch.long), torch.arange(rows)
    owner = shard(matrix.base, marked, shape, tp_rank=tp.rank, tp_size=tp.size)[:, 0]
    row_O = (owner >= 0).nonzero()[:, 0]
    return owner[row_O], row_O
