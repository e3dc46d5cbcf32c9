"""From a PlanConfig, and the run that it may name, to the question that layouts.py answers. Reads config.json and the
store's manifest, nothing else."""

from dataclasses import dataclass, replace
from pathlib import Path

from rpo_megatron import config_io
from rpo_megatron.config import RunConfig
from rpo_megatron.config_verbs import PlanConfig
from rpo_megatron.data.manifest import Manifest, read_record
from rpo_megatron.errors import UserError
from rpo_megatron.model.adapter import Adapter, possible_targets
from rpo_megatron.model.layout import check_engine_knows
from rpo_megatron.planning.hardware import GPUS, Cluster
from rpo_megatron.planning.layout import Layout, Recompute
from rpo_megatron.planning.layouts import BUDGETS, Question
from rpo_megatron.planning.memory import GPU, Kernels, Reference
from rpo_megatron.planning.models import Model, find_model
from rpo_megatron.planning.time import Timing
from rpo_megatron.planning.workload import Workload, given_lengths, manifest_lengths
from rpo_megatron.processes import check_world
from rpo_megatron.training.checks import check_config
from rpo_megatron.training.resolve import Plan

A_ROW_PER_GROUP = 1
"""As tokens in a row: no two groups fit."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "mlp", "full")
COUNTS = ("gpus", "gpus_per_node", "prompt", "response", "responses", "groups_per_step", "tokens_per_microbatch", "top")
"""Knobs that count something of which there is at least one."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    question: Question
    own: Layout | None
    """That of the run, if there is one."""


def ask(config: PlanConfig) -> Asked:
    """Raises UserError for what is missing, contradicts itself or cannot be read."""
    if config.lora_rank is not None and config.lora_rank < 0:
        raise UserError(f"lora_rank must not be negative, found {config.lora_rank}")
    for key in COUNTS:
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"{key} must be at least 1, found {value}")
    if config.efficiency is not None and not 0 < config.efficiency <= 1:
        raise UserError(f"efficiency must be in (0, 1], found {config.efficiency}")
    run = None if config.run is None else _read_run(config.run)
    gpu, model = GPUS[config.gpu], _model(config, run)
    if config.reference == "base" and model.adapter is None:
        raise UserError("reference=base is a policy without its adapter: give lora_rank as well")
    timing = Timing(
        model=model,
        work=_workload(config, run),
        cluster=Cluster(gpu=gpu, gpus=config.gpus, per_node=config.gpus_per_node),
        precision=config.precision or (run.config.precision if run else "bf16"),
        reference=config.reference or _reference(run, adapted=model.adapter is not None),
        groups_per_step=config.groups_per_step or (run.config.train.groups_per_step if run else 64),
        efficiency=config.efficiency or gpu.efficiency,
        overlap=run is None or run.config.parallel.overlap is not False,
        fp8=_fp8(config, run, model),
        offloaded_moments=run is not None and run.config.optimizer.offload,
    )
    recompute = RECOMPUTE if config.recompute is None else (config.recompute,)
    question = Question(
        timing=timing, kernels=_kernels(timing, run), budgets=_budgets(config, run), recompute=recompute
    )
    return Asked(question=question, own=_own_layout(config, run, model) if run else None)


def _read_run(path: str) -> Plan:
    run: RunConfig = config_io.load(RunConfig, path, [])
    check_config(run)
    return Plan(config=run)


def _model(config: PlanConfig, run: Plan | None) -> Model:
    if config.model is None:
        if run is None:
            raise UserError("give a run (rpo plan run.yaml ...) or a model: model=DIR, or a name, e.g. llama-3.1-8b")
        model = Model(name=run.config.model.path, shape=run.shape)
    else:
        model = find_model(config.model)
        if run is not None and "value" in run.reads:
            model = replace(model, shape=replace(model.shape, head="value"))
    return replace(model, adapter=_adapter(config, run, model))


def _adapter(config: PlanConfig, run: Plan | None, model: Model) -> Adapter | None:
    """The run's, of another model's matrices that have the same names; or one on all matrices."""
    if config.lora_rank is None:
        return None if run is None else run.adapter
    if config.lora_rank == 0:
        return None
    return Adapter(rank=config.lora_rank, alpha=config.lora_rank, targets=possible_targets(model.shape))


def _workload(config: PlanConfig, run: Plan | None) -> Workload:
    share_prompt = run is None or run.config.data.share_prompt
    prefix, named = config.store, config.store is not None
    if prefix is None and run is not None:
        prefix = run.config.data.train
    if prefix is not None and (named or Path(f"{prefix}.json").is_file()):
        return manifest_lengths(_manifest(prefix), prefix=prefix, share_prompt=share_prompt)
    lengths = given_lengths(
        prompt=config.prompt, response=config.response, responses=config.responses, share_prompt=share_prompt
    )
    absent = f" (given: the run's store '{prefix}' is not here)" if prefix else " (given)"
    return replace(lengths, source=lengths.source + absent)


def _manifest(prefix: str) -> Manifest:
    path = Path(f"{prefix}.json")
    if not path.is_file():
        raise UserError(
            f"there is no store at '{prefix}' ({path} does not exist): write one with `rpo prepare`, or give "
            f"prompt=, response= and responses= instead"
        )
    return read_record(Manifest, path)


def _reference(run: Plan | None, *, adapted: bool) -> Reference:
    if run is None:
        return "base" if adapted else "resident"
    if run.reference != "resident":
        return run.reference
    if adapted and run.config.reference.path is None:
        return "base"
    if run.config.reference.offload:
        return "offloaded"
    return "resident_fp8" if run.config.fp8.reference_weights else "resident"


def _kernels(timing: Timing, run: Plan | None) -> Kernels:
    """Those that a run names, or that it gets."""
    attention = "auto" if run is None else run.config.kernels.attention
    joined = GPU.joined_keys if attention == "auto" else attention == "sdpa"
    kept = GPU.kept_logits if run is None else _kept_logits(run)
    engine = timing.fp8 or (run is not None and run.config.kernels.layers == "transformer_engine")
    return replace(GPU, fp8=timing.fp8, joined_keys=joined, forgets=not engine, kept_logits=kept)


def _kept_logits(run: Plan) -> float:
    kernels = run.config.kernels
    if kernels.logprobs == "triton":
        return 0.0
    return GPU.kept_logits if kernels.keep_logits_mib is None else kernels.keep_logits_mib * 2**20


def _fp8(config: PlanConfig, run: Plan | None, model: Model) -> bool:
    fp8 = run is not None and run.config.fp8.recipe != "none" if config.fp8 is None else config.fp8
    if fp8 and GPUS[config.gpu].fp8_flops is None:
        raise UserError(f"an {config.gpu} has no FP8: plan with fp8=false, or another GPU")
    if fp8:
        check_engine_knows(model.shape)
    if config.reference == "resident_fp8" and not fp8:
        raise UserError("reference=resident_fp8 computes in FP8, as its policy has to: plan with fp8=true")
    return fp8


def _budgets(config: PlanConfig, run: Plan | None) -> tuple[int, ...]:
    if run is not None and not run.config.data.packing:
        return (A_ROW_PER_GROUP,)
    if config.tokens_per_microbatch is not None:
        return (config.tokens_per_microbatch,)
    return BUDGETS if run is None else tuple(sorted({*BUDGETS, run.config.data.tokens_per_microbatch}))


def _own_layout(config: PlanConfig, run: Plan, model: Model) -> Layout:
    """Raises UserError for one that `rpo train` would refuse."""
    parallel = run.config.parallel
    run.check_shape(model.shape)
    try:
        check_world(parallel, config.gpus)
    except UserError as error:
        raise UserError(f"gpus={config.gpus}: {error}") from None
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    budget = config.tokens_per_microbatch or run.config.data.tokens_per_microbatch
    if not run.config.data.packing:
        budget = A_ROW_PER_GROUP
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual,
        context=parallel.context,
        data=config.gpus // ranks,
        expert=parallel.expert,
        sequence=parallel.sequence,
        recompute=run.config.recompute,
        tokens_per_microbatch=budget,
    )
