"""How many processes a layout can have; said before any of them starts, and by `rpo plan`. No torch."""

from rpo_megatron.config import ParallelConfig
from rpo_megatron.errors import UserError


def check_world(parallel: ParallelConfig, world: int) -> None:
    """Raises UserError when `world` processes cannot be laid out as `parallel` asks."""
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world % model_ranks:
        context = f" x parallel.context={parallel.context}" * (parallel.context > 1)
        raise UserError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}{context} needs a multiple of "
            f"{model_ranks} processes, got {world}; launch with torchrun --nproc-per-node {model_ranks} "
            f"(or another multiple), or change the layout"
        )
    stage = world // parallel.pipeline
    if stage % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide the {stage} processes of a pipeline stage (tensor x "
            f"context x data); change the layout, or the number of processes"
        )
