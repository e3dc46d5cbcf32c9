"""From the operations of a traced step to a few rows: what share of its time went where.

An operation counts where it runs, by its innermost named scope: phases of the step, and within the policy its layers
and their attention; what the policy does outside of its layers is its output head. A backward operation counts where
the forward operation ran that it belongs to: autograd gives both one sequence number. Times are those of the operation
itself without those inside it: on the GPU where there is one, else on the CPU.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from rpo_megatron.model.chunks import chunks_of

PREFIX = "rpo: "
"""Of the names of our scopes in a trace."""
ENGINE = "autograd::engine::evaluate_function"
MATMULS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_mm",
    "mkldnn::_linear_pointwise",  # model/products.py
)
COMMUNICATION = ("c10d::", "gloo:", "nccl:")
ROWS = {
    "attention": "attention",
    "policy": "output head",
    "embedding": "embedding",
    "reference": "reference pass",
    "optimizer": "optimizer",
    "data": "data",
    "logging": "logging",
}
"""Innermost scope -> row, but for the layers, which have two."""


@contextlib.contextmanager
def named_scopes(policy: torch.nn.Module) -> Iterator[None]:
    """Scopes `policy`, `embedding`, `layers` and `attention` in the trace of what this model does."""
    modules = {"": "policy", "embedding": "embedding", "rotary": "layers", "decoder": "layers"}
    handles = []
    for chunk in chunks_of(policy):
        for path, module in chunk.named_modules():
            name = "attention" if path.endswith(".core_attention") else modules.get(path)
            if name is not None:
                handles += _scope(module, PREFIX + name)
    yield
    for handle in handles:
        handle.remove()


def _scope(module: torch.nn.Module, name: str) -> list[Any]:
    entered: list[record_function] = []

    def enter(*_: Any) -> None:
        entered.append(record_function(name))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def shares(events: Iterable[Any], *, device: torch.device) -> dict[str, float]:
    """Row -> share of the step, of torch.profiler's events; the shares add up to 1."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    forward_scope = {
        event.sequence_nr: scope
        for event in on_host
        if event.sequence_nr >= 0 and not _is_backward(event) and (scope := _scope_of(event, {})) is not None
    }
    seconds: dict[str, float] = {}
    for event in on_host:
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        row = _row(event, _scope_of(event, forward_scope))
        if row is not None and spent > 0:
            seconds[row] = seconds.get(row, 0.0) + spent
    total = sum(seconds.values())
    return {row: spent / total for row, spent in seconds.items()}


def _row(event: Any, scope: str | None) -> str | None:
    """None for what is outside of the step."""
    if event.name.startswith(COMMUNICATION):
        return "communication"
    if scope is None:
        return None
    if event.name.startswith((PREFIX, ENGINE)):
        return "between operations"  # Python, megatron's and autograd's machinery, waiting
    if scope == "layers":
        return "other matmuls" if event.name in MATMULS else "norms and elementwise"
    return ROWS.get(scope, "objective and the rest")


def _scope_of(event: Any, forward_scope: dict[int, str]) -> str | None:
    """The innermost scope, through the forward operation where the event belongs to a backward one."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(ENGINE) and event.sequence_nr in forward_scope:
            return forward_scope[event.sequence_nr]
        event = event.cpu_parent
    return None


def _is_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(ENGINE):
            return True
        event = event.cpu_parent
    return False
