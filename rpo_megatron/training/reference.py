"""The frozen reference, as a function that completes a list of batches with what the objective reads of it.

A method that reads no reference gets the identity and loads nothing; stored log-probs are already in the batches; a
resident one is a second model that runs one forward-only pass over the step's batches, for its log-probs and, where
the objective compares whole distributions (`token_kl`), its hidden states as well.

An offloaded one is on the device for that pass only. Its weights never change, so "back to the host" moves nothing: the
pinned copy there is the original, and the device's copy is dropped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rpo_megatron.distributed import Groups
from rpo_megatron.model.build import Model, build
from rpo_megatron.model.lora import adapter_of, adapters_off
from rpo_megatron.model.precision import frozen
from rpo_megatron.training.checkpoint import load_weights
from rpo_megatron.training.forward import Batch, with_reference_logps, with_reference_tokens
from rpo_megatron.training.resolve import Plan

Fill = Callable[[list[Batch]], list[Batch]]


def build_reference(plan: Plan, groups: Groups, *, policy: Any = None) -> Fill:
    """Without a `reference.path`, a `policy` with an adapter is its own reference. Raises UserError when the
    reference's weights cannot be loaded."""
    if plan.reference != "resident":
        return without_reference
    compares = "token_kl" in plan.reads
    complete = with_reference_tokens if compares else with_reference_logps
    if plan.reference_is_base and policy is not None and adapter_of(policy) is not None:
        return partial(_without_adapter, policy, complete)
    model = load_reference(plan, groups)
    fill = partial(complete, model)
    if not plan.config.reference.offload:
        return fill
    # The policy's pass compares its distributions with those of the reference's output layer: that one stays.
    stays = {model.vocab_shard.weight_VH} if compares and groups.pp.last else set()
    return offloaded(fill, [weight for weight in model.parameters() if weight not in stays], groups.device)


def load_reference(plan: Plan, groups: Groups) -> Model:
    """The reference's weights in a model without gradient buffers, optimizer state or data parallelism.

    It only ever runs under no_grad. Its parameters have requires_grad all the same, unless the policy's are frozen as
    well: torch.matmul folds its inputs by that flag, and another order of additions would give the reference other
    numbers than an equal policy.
    """
    config = plan.config
    model = build(
        plan.reference_shape,
        precision=config.precision,
        sequence_parallel=config.parallel.sequence,
        groups=groups,
        kernels=config.kernels,
        fp8=frozen(config.fp8),
        fp8_weights=config.fp8.reference_weights,
    )
    load_weights(model, plan.reference_source, groups)
    model.requires_grad_(plan.adapter is None)
    return model


def _without_adapter(
    policy: Any, complete: Callable[[Any, list[Batch]], list[Batch]], rows: list[Batch]
) -> list[Batch]:
    with adapters_off(policy):
        return complete(policy, rows)


def offloaded(fill: Fill, weights: list[torch.nn.Parameter], device: torch.device) -> Fill:
    """`fill` with these weights on the device while it runs and in host memory otherwise; pinned where that lets the
    copy run beside the host."""
    originals = [weight.data.cpu() for weight in weights]
    if device.type == "cuda":
        originals = [original.pin_memory() for original in originals]

    def put(tensors: list[torch.Tensor]) -> None:
        for weight, tensor in zip(weights, tensors, strict=True):
            weight.data = tensor

    def fill_and_leave(batches: list[Batch]) -> list[Batch]:
        put([original.to(device, non_blocking=True, copy=True) for original in originals])
        completed = fill(batches)
        put(originals)
        return completed

    put(originals)
    return fill_and_leave


def without_reference(batches: list[Batch]) -> list[Batch]:
    """Nothing to complete."""
    return batches
