"""Process groups and the few collectives that are ours. The only place that touches megatron's parallel_state.

Ranks are laid out as megatron does: tensor innermost, then context, then data, then pipeline.
"""

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rpo_megatron import cpu
from rpo_megatron.config import ParallelConfig
from rpo_megatron.errors import UserError
from rpo_megatron.processes import check_world

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of the layout: this process's place on it."""

    rank: int
    size: int
    group: Any

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Where this process stands."""

    rank: int
    world: int
    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    ep: Axis
    """The processes that share out the experts of a layer: some of a pipeline stage's."""
    etp: Axis
    """The processes over which each expert's weights are split."""
    replicas: Axis
    """The processes that hold the same weights (other than of experts): data x context."""
    virtual: int = 1
    """Chunks of layers that each process holds."""
    device: torch.device

    @property
    def leads(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    @property
    def speaks_for_data(self) -> bool:
        """True on the one process per data-parallel rank whose results are counted: last stage, first tensor and
        context rank."""
        return self.pp.last and self.tp.first and self.cp.first


def environment() -> tuple[int, int]:
    """(rank, world size) as torchrun set them; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start(parallel: ParallelConfig) -> Groups:
    """Join the process group and split it into the axes of `parallel`; data parallelism takes what is left.

    Raises UserError when the number of processes does not fit.
    """
    rank, world = environment()
    check_world(parallel, world)
    cpu.enable()
    device = _pick_device()
    if not dist.is_initialized():
        _join(rank, world, device, timeout=datetime.timedelta(minutes=parallel.timeout_minutes))
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized() and world > 1:
        _leave_axes()
    if not parallel_state.model_parallel_is_initialized():  # else a single process's, of which there is one kind
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            virtual_pipeline_model_parallel_size=_virtual(parallel) if _virtual(parallel) > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            # Where experts are shared out at all they stay whole: splitting them as well only makes small matrices
            # smaller.
            expert_tensor_parallel_size=parallel.tensor if parallel.expert == 1 else 1,
        )
    # Nothing in a step draws random numbers (no dropout); megatron's layers still ask for the tracker to exist.
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    return Groups(
        rank=rank,
        world=world,
        device=device,
        virtual=_virtual(parallel),
        tp=_axis(parallel_state.get_tensor_model_parallel_group()),
        pp=_axis(parallel_state.get_pipeline_model_parallel_group()),
        cp=_axis(parallel_state.get_context_parallel_group()),
        ep=_axis(parallel_state.get_expert_model_parallel_group()),
        etp=_axis(parallel_state.get_expert_tensor_parallel_group()),
        dp=_axis(parallel_state.get_data_parallel_group()),
        replicas=_axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
    )


def _leave_axes() -> None:
    """Leave the groups of the axes, but not that of all processes. Each has threads that wake up a hundred times a
    second, also when nobody knows the group any more."""
    from megatron.core import parallel_state

    dist.barrier()  # the others may still be at a group's last message
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in groups:  # in the order in which they were made, which is the same everywhere
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def schedule_groups() -> Any:
    """The groups that megatron's pipeline schedules take for themselves where they are given none."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    names = ["tp", "pp", "cp", "embd", "pos_embd", "dp", "dp_cp", "tp_dp_cp"]
    return ProcessGroupCollection.use_mpu_process_groups(names)


def _virtual(parallel: ParallelConfig) -> int:
    """Without a pipeline there is nothing to interleave; resolve.py refuses the wish."""
    return parallel.virtual if parallel.pipeline > 1 else 1


def stop() -> None:
    """Leave the process group; every rank must get here."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def sum_over_world(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce (sum) over every process, in place. No gradient."""
    dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    dist.barrier()


def gather_objects(value: T) -> list[T]:
    """The small Python objects of all ranks, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_leader(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only and give its result to all.

    If it fails, every rank raises, so that none waits in a collective for a rank that gave up over a file: UserError
    with the same text if it is the user's or the file system's doing; else the leader its own error, for the traceback.
    """
    box: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except Exception as caught:
            error = caught
            box[1] = str(caught)
    dist.broadcast_object_list(box, src=0)
    if error is not None and not isinstance(error, UserError | OSError):
        raise error
    if box[1] is not None:
        raise UserError(box[1]) from error
    return box[0]


def first_to_fail() -> bool:
    """True on the one process that should print an error: the first that asks, or without a process group yet, the
    first process of each host."""
    if dist.is_initialized():
        try:
            store = dist.distributed_c10d._get_default_store()
            return store.add("rpo_megatron/failed", 1) == 1
        except Exception:  # the store went down with another rank: that one has spoken
            return environment()[0] == 0
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _join(rank: int, world: int, device: torch.device, *, timeout: datetime.timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} on {socket.gethostname()} could not join the other processes "
            f"(MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}): {error}; "
            f"launch with torchrun, and check that the address is reachable from every node"
        ) from error


def _pick_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
            f"launch at most that many processes per node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _axis(group: Any) -> Axis:
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)
