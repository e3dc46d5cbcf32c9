"""From a RunConfig to everything that follows from it, checked: the Plan. No torch, no weights, no process group.

`rpo config` prints it and `rpo train` starts from it, so both refuse the same mistakes with the same words, before
anything expensive happens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from rpo_megatron import config_io
from rpo_megatron.config import RunConfig
from rpo_megatron.data.store import Store
from rpo_megatron.data.tokenizer import same_tokenizer, tokenizer_fingerprints
from rpo_megatron.errors import UserError
from rpo_megatron.model.shape import ModelShape, check_layout, num_parameters, padded_vocab, read_shape, stage_layers
from rpo_megatron.model.source import Source, find
from rpo_megatron.objectives import methods


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A config with its files opened. Each property is computed once and raises UserError when it cannot be."""

    config: RunConfig

    @cached_property
    def source(self) -> Source:
        """The starting weights."""
        return _find("model.path", self.config.model.path)

    @cached_property
    def shape(self) -> ModelShape:
        return read_shape(self.source.hf)

    @cached_property
    def reads(self) -> frozenset[str]:
        """Columns that the objective reads: ref_logp, reward, length."""
        knobs = methods.resolve_knobs(self.config.objective)
        return methods.columns_read(methods.find(self.config.objective.method), knobs=knobs)

    @property
    def reference(self) -> Literal["none", "resident", "stored"]:
        return self.config.reference.mode if "ref_logp" in self.reads else "none"

    @cached_property
    def reference_source(self) -> Source:
        path = self.config.reference.path
        return self.source if path is None else _find("reference.path", path)

    @cached_property
    def reference_shape(self) -> ModelShape:
        return read_shape(self.reference_source.hf)

    @cached_property
    def reference_fingerprint(self) -> str:
        return self.reference_source.fingerprint()

    @cached_property
    def train_store(self) -> Store:
        return self._open(self.config.data.train)

    @cached_property
    def valid_store(self) -> Store | None:
        prefix = self.config.data.valid
        return None if prefix is None else self._open(prefix)

    @property
    def stores(self) -> list[Store]:
        return [store for store in (self.train_store, self.valid_store) if store is not None]

    @cached_property
    def num_steps(self) -> int:
        train = self.config.train
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        return max(1, math.ceil(train.epochs * len(self.train_store) / train.groups_per_step))

    @property
    def row_multiple(self) -> int:
        """Row lengths are multiples of this: sequence parallelism splits a row evenly over the tensor ranks."""
        return self.config.parallel.tensor if self.config.parallel.sequence else 1

    def reference_identity(self, store: Store) -> dict[str, str]:
        """What the log-probabilities of a stored reference depend on. No layout: they are valid under any."""
        return {
            "weights": self.reference_fingerprint,
            "tokenizer": _join(store.manifest.tokenizer.fingerprints),
            "template": store.manifest.template.fingerprint,
            "precision": self.config.precision,
        }

    def with_reference(self, store: Store) -> Store:
        """The store as the objective reads it: with its stored reference, if the config says `stored`."""
        return store.with_reference(self.reference_identity(store)) if self.reference == "stored" else store

    def _open(self, prefix: str) -> Store:
        store = Store.open(prefix)
        _check_model_reads(store, self.source, self.shape)
        if self.reference != "none":
            _check_model_reads(store, self.reference_source, self.reference_shape)
        if "reward" in self.reads and not store.has_reward:
            raise UserError(
                f"'{store.prefix}' has no rewards, but objective.method={self.config.objective.method} reads them; "
                f"prepare data that has them, or train with objective.method=sft objective.responses=all"
            )
        return store


def resolve(config: RunConfig) -> Plan:
    """Check a config against itself and against the files it names.

    Raises UserError with the key, the file and what to do.
    """
    check_config(config)
    plan = Plan(config=config)
    check_layout(plan.shape, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    _ = plan.train_store, plan.valid_store
    if plan.reference != "none":
        check_layout(plan.reference_shape, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    return plan


def check_config(config: RunConfig) -> None:
    """What can be told from the config alone."""
    train, optimizer, parallel = config.train, config.optimizer, config.parallel
    reads_reference = "ref_logp" in Plan(config=config).reads
    given = [name for name, value in (("steps", train.steps), ("epochs", train.epochs)) if value is not None]
    if len(given) != 1:
        raise UserError(f"give one of train.steps and train.epochs, found {' and '.join(given) or 'neither'}")
    _positive(config)
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence splits over the tensor ranks: it needs parallel.tensor > 1")
    if optimizer.schedule == "constant" and optimizer.min_lr:
        raise UserError("optimizer.min_lr is not used by optimizer.schedule=constant; remove it, or use cosine")
    if config.evaluation.every and config.data.valid is None:
        raise UserError("evaluation.every needs a held-out store: give data.valid, or set evaluation.every=0")
    if config.reference.path is not None and not reads_reference:
        raise UserError(f"reference.path is not used: objective.method={config.objective.method} reads no reference")
    if config.reference.mode == "stored" and not reads_reference:
        raise UserError(f"reference.mode is not used: objective.method={config.objective.method} reads no reference")


def print_config(config: RunConfig) -> None:
    """`rpo config`: the resolved config as yaml, then what follows from it (as far as the files are there)."""
    print(config_io.dump(config))
    check_config(config)
    plan = Plan(config=config)
    for name, describe in _DERIVED.items():
        print(f"# {name:<12} {_or_reason(lambda describe=describe: describe(plan))}")  # type: ignore[misc]


def _or_reason(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except UserError as error:
        return f"not known yet: {error}"


def describe_model(plan: Plan) -> str:
    shape = plan.shape
    check_layout(shape, tensor=plan.config.parallel.tensor, pipeline=plan.config.parallel.pipeline)
    return (
        f"{shape.family}, {num_parameters(shape):,} parameters, {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"{shape.num_heads} heads ({shape.num_kv_heads} kv), vocabulary {shape.vocab_size} (padded to "
        f"{padded_vocab(shape)}), {'tied' if shape.tied_embeddings else 'untied'} embeddings"
    )


def describe_layout(plan: Plan) -> str:
    parallel = plan.config.parallel
    sequence = " with sequence parallelism" if parallel.sequence else ""
    model_ranks = parallel.tensor * parallel.pipeline
    return (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} ({describe_stages(plan)}){sequence}; "
        f"data = processes / {model_ranks}"
    )


def describe_stages(plan: Plan) -> str:
    stages = stage_layers(plan.shape, plan.config.parallel.pipeline)
    return "+".join(map(str, stages)) + " layers"


def describe_store(store: Store) -> str:
    manifest = store.manifest
    counts = sorted(manifest.responses_per_group)
    widths = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    rewards = "no rewards"
    if manifest.reward is not None:
        rewards = f"rewards {manifest.reward.mean:.3g} +- {manifest.reward.std:.3g} ({manifest.reward.source})"
    return (
        f"{store.prefix}: {len(store):,} groups of {widths} responses, {manifest.tokens:,} tokens, {rewards}, "
        f"fingerprint {store.fingerprint[:12]}"
    )


def describe_reference(plan: Plan) -> str:
    if plan.reference == "none":
        return f"none: {plan.config.objective.method} reads no reference"
    text = f"{plan.reference}, {plan.reference_source.path}, weights {plan.reference_fingerprint[:12]}"
    for store in plan.stores:
        plan.with_reference(store)
    return text


def describe_steps(plan: Plan) -> str:
    per_step = plan.config.train.groups_per_step
    passes = plan.num_steps * per_step / len(plan.train_store)
    return f"{plan.num_steps} of {per_step} groups ({passes:.2f} passes over the data)"


_DERIVED: dict[str, Callable[[Plan], str]] = {
    "model": describe_model,
    "layout": describe_layout,
    "objective": lambda plan: _objective(plan.config),
    "train data": lambda plan: describe_store(plan.train_store),
    "valid data": lambda plan: "none" if plan.valid_store is None else describe_store(plan.valid_store),
    "reference": describe_reference,
    "steps": describe_steps,
}


def _objective(config: RunConfig) -> str:
    knobs = methods.resolve_knobs(config.objective)
    return methods.describe(config.objective.method, knobs=knobs).replace("\n", "\n# " + " " * 13)


def _positive(config: RunConfig) -> None:
    at_least_one = {
        "parallel.tensor": config.parallel.tensor,
        "parallel.pipeline": config.parallel.pipeline,
        "parallel.timeout_minutes": config.parallel.timeout_minutes,
        "optimizer.eps": config.optimizer.eps,
        "train.steps": config.train.steps,
        "train.epochs": config.train.epochs,
        "train.stop_at": config.train.stop_at,
        "train.groups_per_step": config.train.groups_per_step,
        "data.tokens_per_microbatch": config.data.tokens_per_microbatch,
        "checkpoint.keep": config.checkpoint.keep,
        "logging.every": config.logging.every,
        "evaluation.groups": config.evaluation.groups,
    }
    for key, value in at_least_one.items():
        if value is not None and (value <= 0 or (isinstance(value, int) and value < 1)):
            raise UserError(f"{key} must be positive, found {value}")
    for key, beta in (("optimizer.beta1", config.optimizer.beta1), ("optimizer.beta2", config.optimizer.beta2)):
        if not 0 <= beta < 1:
            raise UserError(f"{key} must be in [0, 1), found {beta}")
    not_negative = {
        "optimizer.lr": config.optimizer.lr,
        "optimizer.min_lr": config.optimizer.min_lr,
        "optimizer.warmup_steps": config.optimizer.warmup_steps,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.clip_norm": config.optimizer.clip_norm,
        "evaluation.every": config.evaluation.every,
        "checkpoint.every": config.checkpoint.every,
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{key} must be a number that is not negative, found {value}")


def _check_model_reads(store: Store, source: Source, shape: ModelShape) -> None:
    """The model in `source` can read the tokens of the store: its vocabulary, its tokenizer, its context."""
    manifest, path = store.manifest, source.path
    if manifest.tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"'{store.prefix}' was made with a vocabulary of {manifest.tokenizer.vocab_size}, the model in {path} has "
            f"{shape.vocab_size}; prepare the data with tokenizer={source.hf}"
        )
    if same_tokenizer(manifest.tokenizer.fingerprints, _tokenizer_of(source)) is False:
        raise UserError(
            f"'{store.prefix}' was made with another tokenizer ({manifest.tokenizer.path}) than the one of the model "
            f"in {path}; prepare the data with tokenizer={source.hf}"
        )
    limit = min(shape.max_positions, shape.sliding_window or shape.max_positions)
    if manifest.max_length > limit:
        raise UserError(
            f"'{store.prefix}' has a prompt + response of {manifest.max_length} tokens, the model in {path} reads at "
            f"most {limit}; prepare the data with max_length={limit}"
        )


def _find(key: str, path: str) -> Source:
    try:
        return find(Path(path))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _tokenizer_of(source: Source) -> dict[str, str]:
    """Fingerprints, or none where the model comes without a tokenizer (then only the vocabulary sizes are compared)."""
    if not any((source.hf / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return {}
    return tokenizer_fingerprints(str(source.hf))


def _join(fingerprints: dict[str, str]) -> str:
    return ",".join(f"{name}:{value}" for name, value in sorted(fingerprints.items()))
