"""The first lines of a run: what is trained, on what, against what, and how. Enough to tell two runs apart."""

from pathlib import Path

import torch
from megatron.core import __version__ as megatron_version

from rpo_megatron import __version__
from rpo_megatron.distributed import Groups
from rpo_megatron.model.attention import choose_attention
from rpo_megatron.model.build import choose_layers
from rpo_megatron.model.logprobs import choose_kept, choose_logprobs
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.source import read_state
from rpo_megatron.training import describe, resume
from rpo_megatron.training.optimizer import describe_optimizer
from rpo_megatron.training.resolve import Plan
from rpo_megatron.training.step import overlaps


def show(plan: Plan, groups: Groups, *, resume_from: Path | None) -> None:
    """Print the header on rank 0."""
    if groups.leads:
        print(text(plan, groups, resume_from=resume_from), flush=True)


def text(plan: Plan, groups: Groups, *, resume_from: Path | None) -> str:
    config = plan.config
    rows = {
        "rpo_megatron": f"{__version__}, torch {torch.__version__}, megatron-core {megatron_version}",
        "model": describe.model(plan),
        **({} if plan.shape.experts is None else {"experts": describe.experts(plan)}),
        **({} if plan.adapter is None else {"adapter": describe.adapter(plan)}),
        "start": _start(plan, resume_from),
        **_since(plan, resume_from),
        "layout": _layout(plan, groups),
        "precision": f"{plan.precision} layers; fp32 gradients, master weights and scores; fp64 objective",
        "kernels": _kernels(plan, groups),
        "optimizer": describe_optimizer(config.optimizer),
        "objective": describe.objective(plan),
        "rewards": describe.rewards(plan),
        "reference": describe.reference(plan),
        "train data": describe.store(plan.train_store),
        "valid data": describe.valid_store(plan),
        "steps": describe.steps(plan),
        "batches": _batches(plan),
        "run": config.run_dir,
    }
    return "\n".join(f"{name:<13} {value}".replace("\n", "\n" + " " * 14) for name, value in rows.items())


def _start(plan: Plan, resume_from: Path | None) -> str:
    if resume_from is not None:
        return f"resumed from {resume_from}"
    if plan.config.model.init == "random":
        return f"random weights, seed {plan.config.seed}"
    head = f", value head drawn from seed {plan.config.seed}" * (read_shape(plan.source.hf).head != plan.shape.head)
    return f"{plan.source.path}, weights {plan.source.fingerprint()[:12]}{head}"


def _since(plan: Plan, resume_from: Path | None) -> dict[str, str]:
    if resume_from is None:
        return {}
    notes = resume.notes(resume_from, read_state(resume_from), plan.config)
    return {"changed": "\n".join(notes)} if notes else {}


def _layout(plan: Plan, groups: Groups) -> str:
    context = f" x context {groups.cp.size}" * (groups.cp.size > 1)
    experts = f", experts over {groups.ep.size}" * (groups.ep.size > 1)
    sequence = ", sequence parallel" if plan.config.parallel.sequence else ""
    overlap = ", reducing and gathering behind computation" * overlaps(plan.config.parallel, groups)
    device = "CPU (gloo)" if groups.device.type == "cpu" else f"{torch.cuda.get_device_name(groups.device)} (nccl)"
    return (
        f"{groups.world} process{'es' * (groups.world > 1)} = tensor {groups.tp.size} x pipeline {groups.pp.size} "
        f"({describe.stages(plan)}){context} x data {groups.dp.size}{experts}{sequence}{overlap}; {device}"
    )


def _kernels(plan: Plan, groups: Groups) -> str:
    config = plan.config
    layers = choose_layers(config.kernels, config.fp8).replace("_", " ")
    again = {"none": "nothing", "mlp": "feed-forward layers", "full": "whole layers"}[config.recompute]
    attention = choose_attention(config.kernels.attention, groups.device)
    logprobs = choose_logprobs(config.kernels.logprobs, groups.device)
    kept = choose_kept(config.kernels.keep_logits_mib, logprobs, groups.device) >> 20
    return (
        f"{attention} attention, {layers} layers, log-probabilities without logits ({logprobs}; up to {kept} MiB kept "
        f"for backward); {again} computed again in backward"
    )


def _batches(plan: Plan) -> str:
    data, store = plan.config.data, plan.train_store
    longest = max(store.manifest.lengths.total)
    rows = f"rows of up to {data.tokens_per_microbatch} tokens" if data.packing else "one group per row"
    note = f"; the longest groups (up to {longest} distinct tokens) get longer rows" * (
        longest > data.tokens_per_microbatch
    )
    repeated = int((store.prompt_length_D * (store.num_responses_D - 1)).sum())
    share = store.manifest.tokens / (store.manifest.tokens + repeated)
    prompts = f"a prompt computed once for its responses, which leaves {share:.0%} of the tokens"
    if not data.share_prompt:
        prompts = "a prompt computed for each response"
    return f"whole groups packed into {rows}{note}; {prompts}"
