"""Every workaround for megatron-core, each with its reason and the condition for its removal. Empty is the goal."""

import functools
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
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

    fused_adam()  # looked for once, while it is to be seen
    modules: list[Any] = [package, distrib_optimizer]
    for module in modules:
        module.Adam = optimizer
    modules[0].USING_PYTORCH_OPTIMIZER = False
    modules[1].HAVE_APEX_OR_TE = modules[1].USING_APEX_OPTIMIZER = True


@functools.cache
def fused_adam() -> type[torch.optim.Optimizer] | None:
    """The FusedAdam that megatron found in Transformer Engine or apex, if any; before `use_optimizer` hides it."""
    from megatron.core import optimizer as package

    module: Any = package
    return None if module.USING_PYTORCH_OPTIMIZER else module.Adam


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


@contextmanager
def pickled_scales() -> Iterator[None]:
    """Let Transformer Engine read the scales of delayed scaling from a checkpoint, while it lasts.

    Why: it keeps them as a pickle, and from 2.20 on (pytorch/_extra_state.py) refuses to read it back unless this
    variable says that the checkpoint is trusted. Ours has passed its checksums by then, and is a pickle in other parts
    as well, which is documented.
    Remove when: Transformer Engine keeps these scales as tensors.
    """
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


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


def skip_collectives_of_one() -> None:
    """Leave out the reduction of gradients and the gathering of weights where one rank has all of them.

    Why: megatron-core (0.16.1 to 0.19.2) reduces its gradient buffer into itself, and gathers the weights into
    themselves, on a single data-parallel rank too (param_and_grad_buffer.py). NCCL does nothing then; gloo copies the
    buffer to a second one and back.
    Remove when: megatron-core asks for the size of the group first.
    """
    from megatron.core.distributed import param_and_grad_buffer

    module: Any = param_and_grad_buffer
    module.dist_reduce_scatter_func = _unless_alone(dist.reduce_scatter_tensor)
    module.dist_all_gather_func = _unless_alone(dist.all_gather_into_tensor)


def save_buckets_in_place() -> None:
    """Let the optimizer's part of a checkpoint give every parameter its own numbers, however many buckets there are.

    Why: megatron-core (0.16.1 to 0.19.2) joins a buffer's buckets without the padding between them, but cuts parameters
    out of the result by their places in the buffer, padding included (distrib_optimizer.py,
    get_parameter_state_dp_zero and sharded_param_state_fully_reshardable). Whatever follows a padded bucket is then
    saved shifted: masters and moments of other parameters. Buckets are padded to the least common multiple of 128 and
    the data-parallel ranks.
    Remove when: the two agree on the places.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    owner: Any = DistributedOptimizer
    gather = owner.get_parameter_state_dp_zero
    if hasattr(gather, "__wrapped__"):
        return

    @functools.wraps(gather)
    def gather_in_place(self: Any, *args: Any, **options: Any) -> Any:
        state = gather(self, *args, **options)
        for i, buffer in enumerate(self.buffers if state is not None else []):
            for tensors in state[i].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[name] = _with_padding(tensors[name], buffer.buckets)
        return state

    owner.get_parameter_state_dp_zero = gather_in_place


def _with_padding(joined: torch.Tensor, buckets: list[Any]) -> torch.Tensor:
    """The numbers of all buckets, each at its place in the buffer."""
    if all(bucket.numel_unpadded == bucket.grad_data.numel() for bucket in buckets[:-1]):
        return joined
    whole = joined.new_zeros(sum(bucket.grad_data.numel() for bucket in buckets))
    parts = joined.split([bucket.numel_unpadded for bucket in buckets])
    for bucket, part in zip(buckets, parts, strict=True):
        whole[bucket.offset : bucket.offset + part.numel()] = part
    return whole


def clip_in_place() -> None:
    """Scale gradients where they are.

    Why: without Transformer Engine and apex, megatron-core (0.16.1 to 0.19.2) makes a second tensor of each gradient's
    size to clip it and copies it back (utils.py, local_multi_tensor_scale).
    Remove when: it scales in place.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    def scale_in_place(_: Any, __: Any, tensors: list[list[torch.Tensor]], scale: float) -> None:
        for source, target in zip(*tensors, strict=True):
            torch.mul(source, scale, out=target)

    module: Any = clip_grads
    if module.multi_tensor_scale_impl is local_multi_tensor_scale:
        module.multi_tensor_scale_impl = scale_in_place


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """For collectives from a tensor to itself."""

    def run(output: torch.Tensor, given: torch.Tensor, *, group: Any, **options: Any) -> Any:
        if group.size() > 1:
            return collective(output, given, group=group, **options)
        assert output.data_ptr() == given.data_ptr()
        return None

    return run


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
