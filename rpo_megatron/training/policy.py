"""The model that a run trains, evaluates or scores with, and where its weights come from. "Policy" includes a reward
model: what is said here holds for both heads."""

from dataclasses import dataclass

from rpo_megatron.distributed import Groups
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import Model, build
from rpo_megatron.model.lora import attach
from rpo_megatron.model.lora_io import draw, load_peft
from rpo_megatron.model.peft_format import is_peft
from rpo_megatron.model.shape import ModelShape
from rpo_megatron.model.source import Source, find, newest_checkpoint, read_state
from rpo_megatron.model.weights import load_random
from rpo_megatron.training import adapters
from rpo_megatron.training.checkpoint import load_adapted, load_adapter, load_weights
from rpo_megatron.training.resolve import Plan


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Chosen weights."""

    source: Source
    starting: bool
    """They are those that training starts from: `source` is that of model.path, but they may be drawn."""


def build_policy(plan: Plan, groups: Groups, *, shape: ModelShape) -> Model:
    """The model with its weights not yet set."""
    config = plan.config
    return build(
        shape,
        precision=config.precision,
        sequence_parallel=config.parallel.sequence,
        groups=groups,
        recompute=config.recompute,
        kernels=config.kernels,
        fp8=config.fp8,
        moe=config.moe,
    )


def load_start(model: Model, plan: Plan, groups: Groups) -> None:
    """The weights that training starts from: drawn, or read, with a value head drawn where model.path has none."""
    if plan.config.model.init == "random":
        load_random(model, plan.config.seed, groups)
    else:
        load_weights(model, plan.source, groups, seed=plan.config.seed)
    if plan.adapter is not None:
        attach(model, plan.adapter)
        _start_adapter(model, plan, groups)


def _start_adapter(model: Model, plan: Plan, groups: Groups) -> None:
    path = plan.config.lora.start
    if path is None:
        draw(model, plan.config.seed, groups)
    elif is_peft(path):
        load_peft(model, path, groups)
    else:
        load_adapter(model, adapters.start(path), groups)


def choose_weights(plan: Plan, *, key: str, wish: str | None) -> Weights:
    """What the knob `key` asks for: `start` for what training starts from, a path, or None for the newest checkpoint
    of run_dir.

    Raises UserError when it is not there, or is a model that cannot read the data.
    """
    if wish == "start":
        return Weights(source=plan.source, starting=True)
    if wish is not None:
        source = _find(key, wish)
    else:
        newest = newest_checkpoint(plan.config.run_dir)
        if newest is None:
            raise UserError(
                f"run_dir '{plan.config.run_dir}' has no checkpoint yet; train first, or take the starting weights "
                f"with {key}=start"
            )
        source = Source(path=newest, kind="checkpoint")
    plan.check_model(source)
    return Weights(source=source, starting=False)


def load_policy(plan: Plan, weights: Weights, groups: Groups) -> Model:
    """A model with chosen weights.

    Raises UserError when a reward model is wanted and the weights, other than starting ones, have no value head.
    """
    model = build_policy(plan, groups, shape=plan.shape_of(weights.source))
    if weights.starting:
        load_start(model, plan, groups)
    elif plan.base is not None and weights.source.base_weights == plan.base["weights"]:
        load_adapted(model, weights.source, plan.source, groups)
    else:
        load_weights(model, weights.source, groups)
    return model


def progress(plan: Plan, weights: Weights) -> float:
    """Share of the run's steps after which these weights were saved, for knobs with a schedule: 0 for the starting
    weights, 1 for weights that no run of ours has left at some step."""
    if weights.starting:
        return 0.0
    step = read_state(weights.source.path)["step"] if weights.source.kind == "checkpoint" else 0
    return min(1.0, step / plan.num_steps) if step else 1.0


def _find(key: str, path: str) -> Source:
    try:
        return find(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
