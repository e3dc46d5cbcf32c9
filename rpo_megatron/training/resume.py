"""What a run may change when it goes on from a checkpoint. Every knob of config.py has its place in KNOBS.

1. FREE knobs say where and how the work is done, what is logged, evaluated and kept: the weights come out the same.
2. NOTED knobs change how training goes on. The header names those that differ from the checkpoint's config.yaml.
3. All others stand for something that state.json keeps (RunState): a run with another one is another run and refused.
   What counts is what the knobs come to (fingerprints, resolved values): data may move, a default may be spelled out.

What a checkpoint does not say was not kept yet when it was written. It is not compared; of the objective and the order
of the data the header says so.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rpo_megatron import config_io
from rpo_megatron.config import RunConfig
from rpo_megatron.errors import UserError
from rpo_megatron.training.resolve import Plan

FREE, NOTED = "free", "noted"

KNOBS = {
    **dict.fromkeys(("run_dir", "recompute", "model.init"), FREE),
    "precision": "precision",
    "seed": "seed",
    "model.path": "model",
    **{f"lora.{name}": "adapter" for name in ("rank", "alpha", "targets", "rank_stabilised", "start")},
    "data.train": "data",
    **{f"data.{name}": FREE for name in ("valid", "tokens_per_microbatch", "packing", "share_prompt")},
    "data.source_column": "objective",
    **{f"rewards.{name}": "objective" for name in ("columns", "standardise", "clip")},
    **{f"objective.{name}": "objective" for name in ("method", "beta", "eta", "alpha", "gamma", "gamma_beta_ratio")},
    **{f"objective.{name}": "objective" for name in ("label_smoothing", "win_scale", "pair", "log_ratio")},
    **{f"objective.{name}": "objective" for name in ("source_weight", "source_schedule", "kl_weight", "kl_estimator")},
    **{f"objective.{name}": "objective" for name in ("kl_samples", "odds_weight", "desirable_weight")},
    **{f"objective.{name}": "objective" for name in ("undesirable_weight", "kl_baseline", "responses")},
    **{f"objective.{name}": "objective" for name in ("nll_weight", "nll_on")},
    **{f"moe.{name}": "objective" for name in ("aux_loss", "z_loss")},
    "reference.path": "reference",
    **{f"reference.{name}": FREE for name in ("mode", "offload")},
    **{f"parallel.{name}": FREE for name in ("tensor", "pipeline", "virtual", "sequence", "context", "overlap")},
    **{f"parallel.{name}": FREE for name in ("bucket_size", "timeout_minutes")},
    "parallel.expert": "layout",
    **{f"optimizer.{name}": NOTED for name in ("lr", "schedule", "warmup_steps", "min_lr", "weight_decay")},
    **{f"optimizer.{name}": NOTED for name in ("beta1", "beta2", "eps", "clip_norm")},
    "optimizer.offload": FREE,
    **{f"train.{name}": NOTED for name in ("steps", "epochs")},
    "train.stop_at": FREE,
    "train.groups_per_step": "groups_per_step",
    **{f"evaluation.{name}": FREE for name in ("every", "groups", "checkpoint")},
    **{f"score.{name}": FREE for name in ("what", "column", "checkpoint")},
    **{f"checkpoint.{name}": FREE for name in ("every", "keep", "resume")},
    **{f"logging.{name}": FREE for name in ("every", "tensorboard")},
    **{f"profile.{name}": FREE for name in ("steps", "skip", "directory")},
    **{f"kernels.{name}": FREE for name in ("attention", "logprobs", "keep_logits_mib", "layers")},
    **{f"fp8.{name}": NOTED for name in ("recipe", "bf16_layers")},
    "fp8.reference_weights": FREE,
}
"""Knob -> FREE, NOTED, or the entry of a checkpoint's state.json that says what it came to."""

SET_BACK = {
    "groups_per_step": "set train.groups_per_step back",
    "precision": "set precision back",
    "seed": "set seed back",
    "objective": "set it back",
    "data": "point data.train back at the store that the run began with",
    "reference": "set reference.path, precision, fp8.recipe and the store back to what the run began with",
    "order": "its data came as another version of this program orders it: go on with that one",
}
"""Entry of state.json that is compared here -> what to do about another one. (`model`, `adapter` and `layout` are
compared with the model itself, in checkpoint.py.)"""

SILENT = {
    "objective": "what its objective and rewards were",
    "order": "in which order its data came (groups of this pass may come twice, or not at all)",
}
"""Entries that older versions did not keep -> what then could not be compared."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint knows besides tensors. Nothing in a step draws random numbers: (seed, step) is all of it."""

    step: int
    """Updates done."""
    consumed: int
    """Groups consumed."""
    groups_per_step: int
    """With the step it says which groups come next, so it may not change in the middle of a run."""
    seed: int
    precision: str
    data: str
    """Fingerprint of the training store."""
    reference: dict[str, str] | None
    """Identity of the reference, None for a method without one."""
    base: dict[str, str] | None = None
    """Where the weights are that an adapter belongs to, and their fingerprint; None for a whole model."""
    order: str | None = None
    """Fingerprint of the data's order; see data/sampler.py. None where it was not kept."""
    objective: dict[str, Any] | None = None
    """What is trained, by knob, as resolved; None where it was not kept."""


def trained(plan: Plan) -> dict[str, Any]:
    """Every knob that decides the loss of a group, as resolved: defaults filled in, names of columns for none."""
    config, view = plan.config, plan.view
    record: dict[str, Any] = {"objective.method": config.objective.method}
    record |= {f"objective.{name}": value for name, value in plan.knobs.items()}
    record |= {f"moe.{name}": value for name, value in asdict(config.moe).items()}
    if view is not None:
        record |= {"rewards.columns": list(view.columns), "rewards.standardise": view.standardise}
        record |= {"rewards.clip": view.clip, "data.source_column": view.source_column}
    return record


def check_same(directory: Path, record: Mapping[str, Any], expected: RunState) -> None:
    """Raises UserError when the checkpoint in `directory`, whose state.json is `record`, is that of another run than
    one that would write `expected` now."""
    for name, what in SET_BACK.items():
        there, here = record.get(name), getattr(expected, name)
        if name in SILENT and (there is None or here is None):
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            here = {key: value for key, value in here.items() if key in there}
        if there != here:
            raise UserError(
                f"{directory}: was written by a run with another {name} ({difference(there, here)}); {what}, or start "
                f"a new run in another run_dir (model.path={directory} starts from these weights)"
            )


def difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        return ", ".join(f"{name}: {before.get(name)} there, {now.get(name)} here" for name in names)
    return f"{before} there, {now} here"


def notes(directory: Path, record: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What is worth knowing of a resume that is not refused: knobs that have changed, and what could not be checked."""
    before, now = knobs_of(config_io.read_yaml(directory / "config.yaml")), knobs_of(asdict(config))
    changed = [name for name, rule in KNOBS.items() if rule == NOTED and name in before and before[name] != now[name]]
    found = [f"{name} was {before[name]}, is {now[name]} from here on" for name in changed]
    unknown = [what for name, what in SILENT.items() if record.get(name) is None]
    if unknown:
        found.append(
            f"the checkpoint is of an older version and does not say {' and '.join(unknown)}: where that may have "
            f"changed, start a new run from its weights with model.path={directory}"
        )
    return found


def knobs_of(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """The values of a config, as its dump or as a mapping, by knob: {"train.steps": 6, ...}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= knobs_of(value, prefix=f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
