"""megatron-core on a machine without CUDA: the CPU stands in for "the current device". One call, `enable()`.

megatron-core writes "cuda" where it means "the device of this rank". Only the names below are reached by a training
run (traced over TP, PP, SP, DP, the distributed optimizer, bf16 and recomputation, with megatron-core 0.16.1 and
0.19.2); each is redirected by hand, and every other torch.cuda call still fails loudly, so that an unexpected
dependency on CUDA is seen. A TorchFunctionMode would tax every torch call and still not reach torch.cuda's plain
functions.

Call it once, before the first `import megatron.core`. Where CUDA exists it does nothing.

| redirect                                         | reached from (megatron.core)                               |
|--------------------------------------------------|------------------------------------------------------------|
| cuda.current_device                              | param_and_grad_buffer, p2p_communication, tensor_parallel  |
| cuda.synchronize                                 | p2p_communication                                          |
| cuda.Stream, Event, stream, current_stream       | param_and_grad_buffer, moe.token_dispatcher                |
| cuda.{get_rng_state, manual_seed, ...}           | tensor_parallel.random                                     |
| torch.zeros / torch.tensor (device="cuda")       | schedules, clip_grads, optimizer, utils                    |
| Tensor.cuda                                      | language_module (tied embeddings), rope_utils              |
| Tensor.type                                      | optimizer (sorts parameters by "torch.cuda.FloatTensor")   |
| sys.modules["transformer_engine"] = None         | importable without a driver, but every kernel of it fails  |
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_MARK = "_rpo_megatron_cpu"


def enable() -> None:
    """Redirect megatron-core's device to the CPU. A no-op where CUDA is available or when called again.

    Raises RuntimeError when megatron.core or Transformer Engine was imported too early (a bug of the caller).
    """
    if torch.cuda.is_available() or hasattr(torch.cuda, _MARK):
        return
    for module in ("megatron.core", "transformer_engine"):
        if sys.modules.get(module) is not None:
            raise RuntimeError(f"cpu.enable() must run before '{module}' is imported")
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    _redirect_device()
    _redirect_random_state()
    _redirect_tensors()
    setattr(torch.cuda, _MARK, True)


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """CPU work is done when a call returns, so there is nothing to wait for."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return _Event()


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _redirect_device() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU  # used as `device=` and in `.to()`
    cuda.synchronize = lambda device=None: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()


def _redirect_random_state() -> None:
    cuda: Any = torch.cuda
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.default_generators = _Generators()
    lazy_call = cuda._lazy_call

    def call_now(callback: Callable[[], None], **kwargs: Any) -> None:
        if callback.__module__.startswith("megatron."):
            callback()
        else:
            lazy_call(callback, **kwargs)

    cuda._lazy_call = call_now


def _redirect_tensors() -> None:
    # `with torch.device(...)` knows the factories by identity and lists them on first use. Had it listed our wrappers,
    # it would ignore the calls that they forward, and transformers, which loads models under it, would silently leave
    # buffers uninitialised.
    _device_constructors()
    namespace: Any = torch
    namespace.zeros, namespace.tensor = _on_cpu(torch.zeros), _on_cpu(torch.tensor)
    tensor_class: Any = torch.Tensor
    tensor_class.cuda = lambda self, *args, **kwargs: self
    real_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return real_type(self, dtype, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        name = real_type(self)
        return name.replace("torch.", "torch.cuda.") if caller.startswith("megatron.core.optimizer") else name

    tensor_class.type = type_name


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapped(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device=_CPU if device == "cuda" else device, **kwargs)

    wrapped.__wrapped__ = factory  # type: ignore[attr-defined]
    return wrapped
