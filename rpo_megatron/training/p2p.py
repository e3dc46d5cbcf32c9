"""Messages between pipeline stages, without asking how long they are.

Rows differ in length. Megatron then sends three numbers ahead of every tensor, and the host of the receiver waits for
them: twice the messages, and a device that runs dry before each. But all stages of a data-parallel rank read the same
rows, and 1F1B takes them in order: the k-th activation that arrives is that of the k-th row, the k-th gradient as well.
Where stages have several chunks of layers, these take turns, as megatron's table says, forwards and backwards alike.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from rpo_megatron.distributed import schedule_groups

Shape = list[int]
NOTHING: Shape = [0, 0, 0]


def planned_messages(config: TransformerConfig, lengths: Sequence[int]) -> dict[str, Any]:
    """What megatron's schedule has to be given for one pass over rows of so many tokens; nothing where a single stage
    sends no messages. With several chunks, `config` must say already how long their turns are (chunks.in_turns)."""
    if config.pipeline_model_parallel_size == 1:
        return {}
    groups = schedule_groups()
    return {"p2p_communicator": PlannedCommunicator(config, groups, lengths), "pg_collection": groups}


class PlannedCommunicator(P2PCommunicator):
    """megatron's, for one pass over rows of `lengths` tokens each.

    Shapes of messages: [t, 1, hidden], t being this rank's share of a row's tokens under context and sequence
    parallelism.
    """

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection, lengths: Sequence[int]) -> None:
        super().__init__(pp_group=groups.pp, config=config)
        shares = config.context_parallel_size
        if config.sequence_parallel:
            shares *= config.tensor_model_parallel_size
        assert not any(length % shares for length in lengths), "rows are padded to a multiple of their shares"
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        turns = get_schedule_table(len(lengths), num_chunks, config.microbatch_group_size_per_vp_stage)
        shapes = [[length // shares, 1, config.hidden_size] for length in lengths]
        every = [shapes[row] for row, _ in turns]
        # Between the last stage and the first go a row's activations from one chunk to the next, and their gradients.
        around = [shapes[row] for row, chunk in turns if chunk < num_chunks - 1]
        before = around if groups.pp.rank() == 0 else every
        behind = around if groups.pp.rank() == groups.pp.size() - 1 else every
        self._from_previous, self._to_previous = iter(before), iter(before)
        self._from_next, self._to_next = iter(behind), iter(behind)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape, Shape]:
        """Called by megatron before each of its messages: (shape from the previous stage, from the next)."""
        _check(tensor_send_next, self._to_next)
        _check(tensor_send_prev, self._to_previous)
        return (
            next(self._from_previous) if recv_prev else NOTHING,
            next(self._from_next) if recv_next else NOTHING,
        )


def _check(tensor: torch.Tensor | None, planned: Iterator[Shape]) -> None:
    """What leaves a stage is what the other one expects; it expects it for the same reasons."""
    if tensor is not None:
        shape = next(planned)
        assert list(tensor.shape) == shape, f"a message of shape {list(tensor.shape)} where {shape} was planned"
