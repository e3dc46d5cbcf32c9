"""Every workaround for megatron-core, each with its reason and the condition for its removal. Empty is the goal."""

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes


def use_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    """Make megatron build `optimizer` where it would build FusedAdam.

    Why: without Transformer Engine and apex, megatron-core (0.16.1 to 0.19.2) falls back to torch.optim.AdamW, and its
    DistributedOptimizer then resumes silently wrong: one `step` tensor, loaded as 0, shared by all parameters
    (distrib_optimizer.py, load_parameter_state and _init_optimizer_states_with_dummy_values assume FusedAdam's layout,
    `step` in the parameter group).
    Remove when: DistributedOptimizer's checkpoints support torch.optim.AdamW.
    """
    from megatron.core import optimizer as package
    from megatron.core.optimizer import distrib_optimizer

    modules: list[Any] = [package, distrib_optimizer]
    for module in modules:
        module.Adam = optimizer
    modules[0].USING_PYTORCH_OPTIMIZER = False
    modules[1].HAVE_APEX_OR_TE = modules[1].USING_APEX_OPTIMIZER = True


def has_fused_adam() -> bool:
    """True where megatron found FusedAdam in Transformer Engine or apex."""
    from megatron.core import optimizer as package

    return not getattr(package, "USING_PYTORCH_OPTIMIZER", True)


def mark_sharded_weights(model: torch.nn.Module) -> None:
    """Tell megatron which weights are split over the tensor ranks.

    Why: megatron-core (0.16.1 to 0.19.2) sets these marks only while it draws initial weights (layers.py,
    _initialize_affine_weight_cpu/_gpu), which we switch off because the weights are read. Without them every shard but
    the first rank's counts as a copy: the gradient norm comes out too small and clipping differs between layouts.
    Remove when: megatron-core sets them with perform_initialization=False.
    """
    split_dim = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) in split_dim and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, split_dim[type(module)], 1)


def route_without_te() -> None:
    """Let megatron's router run where there is no Transformer Engine.

    Why: megatron-core 0.16 asks whether `te_general_gemm` is None (moe_utils.py, RouterGatingLinearFunction), but
    leaves the name undefined where Transformer Engine cannot be imported.
    Remove when: megatron-core 0.16 is no longer supported.
    """
    from megatron.core.transformer.moe import moe_utils

    module: Any = moe_utils
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None


def split_sizes_for_gloo() -> None:
    """Let megatron's token dispatcher send tokens to experts on other ranks without a GPU.

    Why: megatron-core (0.16.1 to 0.19.2) turns the split sizes of its all-to-all into numbers only where they are on a
    GPU (moe_utils.py, maybe_move_tensor_to_cpu); gloo refuses tensors in their place.
    Remove when: it does so for any tensor that is asked for `as_numpy`.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    move: Any = moe_utils.maybe_move_tensor_to_cpu

    def move_or_convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    module: Any = token_dispatcher
    module.maybe_move_tensor_to_cpu = move_or_convert


def save_strategy() -> Any:
    """The torch_dist checkpoint writer, writing from threads of this process.

    Why: megatron-core 0.16 forks writer processes (filesystem_async.py, write_preloaded_data_multiproc) and waits for
    good when one of them dies before it reports, as happens without psutil. Both 0.16 and 0.19 spawn a Manager process
    for a queue that need not leave this one, seconds for each save. And 0.19 dropped the arguments of
    get_default_save_sharded_strategy.
    Remove when: megatron-core 0.16 is no longer supported (forks, arguments) and 0.19's queue is an in-process one.
    """
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    module: Any = filesystem_async
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(module, name):
            setattr(module, name, lambda *_: queue.Queue())
    if hasattr(module.FileSystemWriterAsync, "write_preloaded_data_multiproc"):
        module.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_threads)
    try:
        return get_default_save_sharded_strategy("torch_dist", 1)
    except TypeError:
        return get_default_save_sharded_strategy()


def _write_in_threads(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: "queue.Queue[Any]"
) -> None:
    """What write_preloaded_data_multiproc does, one thread per bucket: puts {bucket: results}, or the exception."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    done: queue.Queue[Any] = queue.Queue()
    counter: queue.Queue[int] = queue.Queue()

    def write(i: int, bucket: Any) -> None:
        counter.put(i)
        options = {"local_proc_idx": i, "write_bucket": bucket, "use_fsync": True, "use_msc": use_msc}
        FileSystemWriterAsync.write_preloaded_data(transforms, results_queue=done, count_queue=counter, **options)

    with ThreadPoolExecutor(max_workers=max(1, len(buckets))) as pool:
        for future in [pool.submit(write, i, bucket) for i, bucket in enumerate(buckets)]:
            future.result()
    written = dict(done.get_nowait() for _ in buckets)
    failures = [result for result in written.values() if isinstance(result, Exception)]
    results.put(failures[0] if failures else written)
