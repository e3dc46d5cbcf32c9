"""The frozen reference, as a function that completes a list of batches with what the objective reads of it.

A method that reads no reference gets the identity and loads nothing; stored log-probs are already in the batches; a
resident one is a second model that runs one forward-only pass over the step's batches, for its log-probs and, where
the objective compares whole distributions (`token_kl`), its hidden states as well.
"""

from collections.abc import Callable
from functools import partial

from rpo_megatron.distributed import Groups
from rpo_megatron.model.build import ScoringModel, build
from rpo_megatron.training.checkpoint import load_weights
from rpo_megatron.training.forward import Batch, with_reference_logps, with_reference_tokens
from rpo_megatron.training.resolve import Plan

Fill = Callable[[list[Batch]], list[Batch]]


def build_reference(plan: Plan, groups: Groups) -> Fill:
    """Raises UserError when the reference's weights cannot be loaded."""
    if plan.reference != "resident":
        return without_reference
    complete = with_reference_tokens if "token_kl" in plan.reads else with_reference_logps
    return partial(complete, load_reference(plan, groups))


def load_reference(plan: Plan, groups: Groups) -> ScoringModel:
    """The reference's weights in a model without gradient buffers, optimizer state or data parallelism.

    It only ever runs under no_grad. Its parameters keep requires_grad all the same: torch.matmul folds its inputs by
    that flag, and another order of additions would give the reference other numbers than an equal policy.
    """
    config = plan.config
    model = build(
        plan.reference_shape,
        precision=config.precision,
        sequence_parallel=config.parallel.sequence,
        groups=groups,
        kernels=config.kernels,
        fp8=config.fp8,
        fp8_weights=config.fp8.reference_weights,
    )
    load_weights(model, plan.reference_source, groups)
    return model


def without_reference(batches: list[Batch]) -> list[Batch]:
    """Nothing to complete."""
    return batches
