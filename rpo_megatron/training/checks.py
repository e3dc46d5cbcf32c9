"""What can be told from a RunConfig alone, before any file is opened: knobs out of range, knobs that contradict each
other, knobs that nobody would read. No torch."""

import math

from rpo_megatron.config import Fp8Config, ObjectiveConfig, RewardsConfig, RunConfig
from rpo_megatron.errors import UserError
from rpo_megatron.objectives import catalogue
from rpo_megatron.training import adapters

READS_REFERENCE = frozenset({"ref_logp", "token_kl"})
READS_REWARD = frozenset({"reward", "rewards"})


def columns_read(objective: ObjectiveConfig) -> frozenset[str]:
    """What the objective reads; see Method.reads."""
    return catalogue.columns_read(catalogue.find(objective.method), knobs=catalogue.resolve_knobs(objective))


def check_config(config: RunConfig) -> None:
    """Raises UserError with the key and what to do."""
    train, optimizer = config.train, config.optimizer
    given = [name for name, value in (("steps", train.steps), ("epochs", train.epochs)) if value is not None]
    if len(given) != 1:
        raise UserError(f"give one of train.steps and train.epochs, found {' and '.join(given) or 'neither'}")
    _check_numbers(config)
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise UserError("parallel.sequence splits over the tensor ranks: it needs parallel.tensor > 1")
    if config.parallel.virtual > 1 and config.parallel.pipeline == 1:
        raise UserError("parallel.virtual cuts up the stages of a pipeline: it needs parallel.pipeline > 1")
    if optimizer.schedule == "constant" and optimizer.min_lr:
        raise UserError("optimizer.min_lr is not used by optimizer.schedule=constant; remove it, or use cosine")
    if config.evaluation.every and config.data.valid is None:
        raise UserError("evaluation.every needs a held-out store: give data.valid, or set evaluation.every=0")
    if config.parallel.bucket_size is not None and config.parallel.overlap is False:
        raise UserError("parallel.bucket_size is not used by parallel.overlap=false; remove one of them")
    if config.kernels.keep_logits_mib is not None and config.kernels.logprobs == "triton":
        raise UserError("kernels.keep_logits_mib is not used by kernels.logprobs=triton; remove it, or use tiles")
    if config.kernels.attention == "te" and config.data.share_prompt:
        raise UserError(
            "kernels.attention=te knows no shared prompts: set data.share_prompt=false, or kernels.attention=merged"
        )
    _check_fp8(config)
    adapters.check_lora(config)
    _check_columns(config, reads=columns_read(config.objective))


def _check_fp8(config: RunConfig) -> None:
    fp8 = config.fp8
    if fp8.recipe == "none":
        if fp8 != Fp8Config():
            raise UserError("the section `fp8` is not used by fp8.recipe=none; remove it, or choose a recipe")
        return
    if config.precision != "bf16":
        raise UserError(f"fp8.recipe={fp8.recipe} goes on top of precision=bf16, found precision={config.precision}")
    if config.kernels.layers == "megatron":
        raise UserError(f"fp8.recipe={fp8.recipe} needs kernels.layers=transformer_engine (or auto)")
    if fp8.recipe == "delayed" and fp8.bf16_layers:
        raise UserError("fp8.bf16_layers is not possible with fp8.recipe=delayed, whose scales all layers share")
    if fp8.reference_weights and config.reference.mode != "resident":
        raise UserError("fp8.reference_weights is not used by reference.mode=stored; remove it")
    if fp8.reference_weights and config.reference.offload:
        raise UserError(
            "fp8.reference_weights and reference.offload: FP8 weights stay on the device; choose one of the two"
        )


def _check_columns(config: RunConfig, *, reads: frozenset[str]) -> None:
    """What the objective reads is given, and what is given is read."""
    method = f"objective.method={config.objective.method}"
    if config.reference.path is not None and not reads & READS_REFERENCE:
        raise UserError(f"reference.path is not used: {method} reads no reference")
    if config.reference.mode == "stored" and not reads & READS_REFERENCE:
        raise UserError(f"reference.mode is not used: {method} reads no reference")
    if config.reference.offload and (config.reference.mode == "stored" or not reads & READS_REFERENCE):
        why = (
            "reference.mode=stored keeps none in memory" if reads & READS_REFERENCE else f"{method} reads no reference"
        )
        raise UserError(f"reference.offload is not used: {why}; remove it")
    if config.reference.mode == "stored" and "token_kl" in reads:
        raise UserError(
            f"{method} with objective.kl_estimator=token compares whole distributions, which no store holds: set "
            f"reference.mode=resident, or objective.kl_estimator=sample"
        )
    if "source" in reads and config.data.source_column is None:
        raise UserError(
            f"{method} must know which responses come from other models: name the column of the store that says so "
            f"with data.source_column"
        )
    if config.data.source_column is not None and "source" not in reads:
        raise UserError(f"data.source_column is not used: {method} does not ask where responses come from; remove it")
    if config.rewards != RewardsConfig() and not reads & READS_REWARD:
        raise UserError(f"the section `rewards` is not used: {method} reads no rewards; remove it")
    named = [*config.rewards.columns, config.data.source_column]
    if twice := {name for name in named if named.count(name) > 1}:
        raise UserError(f"rewards.columns, data.source_column: name each column once; found {twice.pop()} twice")


def _check_numbers(config: RunConfig) -> None:
    at_least_one = {
        "parallel.tensor": config.parallel.tensor,
        "parallel.pipeline": config.parallel.pipeline,
        "parallel.virtual": config.parallel.virtual,
        "parallel.context": config.parallel.context,
        "parallel.expert": config.parallel.expert,
        "parallel.bucket_size": config.parallel.bucket_size,
        "parallel.timeout_minutes": config.parallel.timeout_minutes,
        "optimizer.eps": config.optimizer.eps,
        "train.steps": config.train.steps,
        "train.epochs": config.train.epochs,
        "train.stop_at": config.train.stop_at,
        "train.groups_per_step": config.train.groups_per_step,
        "data.tokens_per_microbatch": config.data.tokens_per_microbatch,
        "rewards.clip": config.rewards.clip,
        "checkpoint.keep": config.checkpoint.keep,
        "logging.every": config.logging.every,
        "evaluation.groups": config.evaluation.groups,
    }
    for key, value in at_least_one.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key} must be positive, found {value}")
    for key, beta in (("optimizer.beta1", config.optimizer.beta1), ("optimizer.beta2", config.optimizer.beta2)):
        if not 0 <= beta < 1:
            raise UserError(f"{key} must be in [0, 1), found {beta}")
    not_negative = {
        "kernels.keep_logits_mib": config.kernels.keep_logits_mib or 0,
        "fp8.bf16_layers": config.fp8.bf16_layers,
        "moe.aux_loss": config.moe.aux_loss,
        "moe.z_loss": config.moe.z_loss,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.min_lr": config.optimizer.min_lr,
        "optimizer.warmup_steps": config.optimizer.warmup_steps,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.clip_norm": config.optimizer.clip_norm,
        "evaluation.every": config.evaluation.every,
        "checkpoint.every": config.checkpoint.every,
        "profile.steps": config.profile.steps,
        "profile.skip": config.profile.skip,
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{key} must be a number that is not negative, found {value}")
