"""What a LoRA adapter of a model consists of: its weights, from the table of the model's own. No torch.

LoRA (arXiv 2106.09685) leaves a matrix W as it is and trains a product of two narrow ones beside it:

    y = x W^T + scale (x A^T) B^T        A [r, in], B [out, r], scale = alpha / r    (rsLoRA: alpha / sqrt(r))

Every matrix of the Hugging Face files has an A and a B of its own, as in PEFT. Where megatron joins matrices (query,
key and value; gate and up), their A are stacked, [n r, in], and the rows of their B lie as those of W do, [out, r]: a
row belongs to one of the n. So an adapter has a table like the model's, and is split, read and gathered by it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rpo_megatron.errors import UserError, nearest
from rpo_megatron.model.shape import ModelShape
from rpo_megatron.model.table import Entry, Part, entries

LORA_A, LORA_B = "lora_A", "lora_B"
"""PEFT's names of the two."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Structure of an adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Last words of the adapted matrices' Hugging Face names, sorted."""
    rank_stabilised: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Adapter":
        """From a checkpoint's state.json."""
        return cls(**{**record, "targets": tuple(record["targets"])})

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True, kw_only=True)
class AdaptedMatrix:
    """One of megatron's matrices, and the rows of the table that its adapter adds."""

    base: Entry
    module: str
    """megatron's name of the layer that it belongs to."""
    chosen: tuple[Part, ...]
    """The parts of `base` that are adapted."""
    a: Entry
    b: Entry

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the chosen Hugging Face matrices, in the order in which their A are stacked."""
        return tuple(dict.fromkeys(part.tensor for part in self.chosen))


def possible_targets(shape: ModelShape) -> tuple[str, ...]:
    """Those that a model has, sorted. Of a model with experts, its attention alone: an adapter for every expert would
    be as large as a model, and one for all of them is none that PEFT knows."""
    return tuple(sorted({_target(part.tensor) for entry in _adaptable(shape) for part in entry.parts}))


def choose_targets(shape: ModelShape, wish: Sequence[str], *, key: str) -> tuple[str, ...]:
    """`wish`, or all that are possible. Raises UserError for one that the model has not."""
    possible = possible_targets(shape)
    for name in wish:
        if name not in possible:
            why = " (of a model with experts, its attention alone)" if shape.experts else ""
            raise UserError(
                f"{key}: '{name}' is no matrix of a {shape.family} model that can have an adapter"
                f"{nearest(name, possible)}; possible are {', '.join(possible)}{why}"
            )
    return tuple(sorted(set(wish))) or possible


def adapted_matrices(shape: ModelShape, adapter: Adapter) -> list[AdaptedMatrix]:
    """In the order of the forward pass."""
    found = []
    for base in _adaptable(shape):
        chosen = tuple(part for part in base.parts if _target(part.tensor) in adapter.targets)
        if chosen:
            found.append(_adapted(base, chosen, adapter.rank))
    return found


def adapter_entries(shape: ModelShape, adapter: Adapter) -> list[Entry]:
    """Every weight of the adapter, once, as in table.py. Names are PEFT's, without what it puts before them."""
    return [entry for matrix in adapted_matrices(shape, adapter) for entry in (matrix.a, matrix.b)]


def num_adapter_parameters(shape: ModelShape, adapter: Adapter) -> int:
    return sum(math.prod(size) for entry in adapter_entries(shape, adapter) for size in entry.tensors.values())


def _adapted(base: Entry, chosen: tuple[Part, ...], rank: int) -> AdaptedMatrix:
    module, width = base.name.removesuffix(".weight"), chosen[0].shape[1]
    names = dict.fromkeys(part.tensor.removesuffix(".weight") for part in chosen)
    a = tuple(Part(tensor=f"{name}.{LORA_A}.weight", shape=(rank, width)) for name in names)
    b = tuple(
        replace(part, tensor=part.tensor.removesuffix("weight") + f"{LORA_B}.weight", shape=(part.shape[0], rank))
        for part in chosen
    )
    by_input = base.split == "input"
    return AdaptedMatrix(
        base=base,
        module=module,
        chosen=chosen,
        a=Entry(name=f"{module}.{LORA_A}", parts=a, split="input" if by_input else "replicated"),
        b=Entry(name=f"{module}.{LORA_B}", parts=b, split="replicated" if by_input else base.split),
    )


def _adaptable(shape: ModelShape) -> list[Entry]:
    """Matrices of the layers that tensor ranks share; not norms, routers, embeddings and heads."""
    attention_only = shape.experts is not None
    return [
        entry
        for entry in entries(shape)
        if entry.name.startswith("decoder.layers.")
        and entry.name.endswith(".weight")
        and entry.split != "replicated"
        and not (attention_only and ".mlp." in entry.name)
    ]


def _target(tensor: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> q_proj"""
    return tensor.split(".")[-2]
