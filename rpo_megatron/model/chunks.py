"""Several chunks of layers on each rank of a pipeline (megatron's virtual pipeline stages), which behave as one model.

With parallel.virtual=v the layers are cut into pipeline x v chunks, and rank r holds those numbered r, r + pipeline,
r + 2 pipeline, ...: a row passes v times through all ranks, and the pipeline fills and drains v times as fast
(interleaved 1F1B, Narayanan et al., arXiv 2104.04473, section 2.2). Megatron's schedule, its optimizer and whoever
reads weights by their names ask for the chunks (`chunks_of`); everybody else has one model, of one chunk or of several.
"""

from typing import Any

import torch
from megatron.core.utils import get_model_config

from rpo_megatron.model.interleaving import rows_in_turn


def chunks_of(model: Any) -> list[Any]:
    """The chunks of a model, or of a model in megatron's data parallelism, from the first layers to the last."""
    return list(model) if isinstance(model, Chunks) else getattr(model, "chunks", [model])


class Chunks(torch.nn.ModuleList):
    """What a rank with several chunks holds: its ScoringModels. In a state dict the chunk's number comes before the
    name."""

    @property
    def config(self) -> Any:
        """Megatron's, the same object in all chunks."""
        return self[0].config

    @property
    def shape(self) -> Any:
        return self[0].shape

    @property
    def vocab_shard(self) -> Any:
        """Of the last chunk, on the last stage."""
        return self[-1].vocab_shard

    def sharded_state_dict(self, *, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """The keys inside, under which a checkpoint keeps the tensors, know no chunks."""
        parts = (chunk.sharded_state_dict(metadata=metadata) for chunk in self)
        return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}


class DataParallelChunks:
    """Chunks in megatron's data parallelism, each by itself."""

    def __init__(self, module: Chunks, chunks: list[Any]) -> None:
        self.module = module
        self.chunks = chunks

    @property
    def ddp_config(self) -> Any:
        return self.chunks[0].ddp_config

    @property
    def bucket_groups(self) -> list[Any]:
        return [group for chunk in self.chunks for group in chunk.bucket_groups]

    def zero_grad_buffer(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def start_param_sync(self, **options: bool) -> None:
        for chunk in self.chunks:
            chunk.start_param_sync(**options)


def in_turns(model: Any, *, num_rows: int) -> list[Any]:
    """The chunks, set to take turns over so many rows; there are at least as many as pipeline ranks (packing.pack)."""
    chunks = chunks_of(model)
    if len(chunks) > 1:
        config = get_model_config(chunks[0])
        config.microbatch_group_size_per_vp_stage = rows_in_turn(num_rows, config.pipeline_model_parallel_size)
    return chunks
