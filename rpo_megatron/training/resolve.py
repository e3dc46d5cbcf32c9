"""From a RunConfig to everything that follows from it, checked: the Plan. No torch, no weights, no process group.

`rpo config` prints it and `rpo train` starts from it, so both refuse the same mistakes with the same words, before
anything expensive happens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from rpo_megatron.config import Fp8Config, MoeConfig, RewardsConfig, RunConfig
from rpo_megatron.data.rewards import make_view
from rpo_megatron.data.store import Store
from rpo_megatron.data.tokenizer import same_tokenizer, tokenizer_fingerprints
from rpo_megatron.data.view import RewardView
from rpo_megatron.errors import UserError
from rpo_megatron.model.adapter import Adapter
from rpo_megatron.model.precision import frozen, row_alignment
from rpo_megatron.model.shape import ModelShape, check_layout, read_shape
from rpo_megatron.model.source import Source, find
from rpo_megatron.objectives import catalogue
from rpo_megatron.objectives.row import KnobValue
from rpo_megatron.training import adapters

READS_REFERENCE = frozenset({"ref_logp", "token_kl"})
READS_REWARD = frozenset({"reward", "rewards"})


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
        """Of the model that is trained."""
        return self.shape_of(self.source)

    def shape_of(self, source: Source) -> ModelShape:
        """Of the weights in `source`, with the head that the objective trains: one value, or an output layer."""
        if "value" in self.reads:
            return replace(read_shape(source.hf), head="value")
        return _language_model(source, f"objective.method={self.config.objective.method}")

    @cached_property
    def adapter(self) -> Adapter | None:
        """What is trained in place of the weights, if the section `lora` says so."""
        return adapters.wanted(self.config.lora, self.shape, self.source)

    @cached_property
    def base(self) -> dict[str, str] | None:
        """Identity of the weights that it belongs to."""
        if self.adapter is None:
            return None
        return {"path": str(self.source.path.resolve()), "weights": self.source.fingerprint()}

    @cached_property
    def knobs(self) -> Mapping[str, KnobValue]:
        """Of the objective."""
        return catalogue.resolve_knobs(self.config.objective)

    @cached_property
    def reads(self) -> frozenset[str]:
        """What the objective reads; see Method.reads."""
        return catalogue.columns_read(catalogue.find(self.config.objective.method), knobs=self.knobs)

    @property
    def reference(self) -> Literal["none", "resident", "stored"]:
        return self.config.reference.mode if self.reads & READS_REFERENCE else "none"

    @property
    def reference_is_base(self) -> bool:
        """The policy without its adapter is the reference: there is no second model."""
        adapted = adapters.is_on(self.config.lora) and self.config.reference.path is None
        return self.reference == "resident" and adapted

    @cached_property
    def reference_source(self) -> Source:
        path = self.config.reference.path
        return self.source if path is None else _find("reference.path", path)

    @cached_property
    def reference_shape(self) -> ModelShape:
        return _language_model(self.reference_source, "the reference")

    @cached_property
    def reference_fingerprint(self) -> str:
        return self.reference_source.fingerprint()

    @cached_property
    def stores(self) -> list[Store]:
        """data.train and, if there is one, data.valid, as they are on disk."""
        prefixes = (self.config.data.train, self.config.data.valid)
        return [self._open(prefix) for prefix in prefixes if prefix is not None]

    @cached_property
    def train_store(self) -> Store:
        """data.train with the rewards that the objective reads."""
        return self._as_read(self.stores[0])

    @cached_property
    def valid_store(self) -> Store | None:
        return None if self.config.data.valid is None else self._as_read(self.stores[1])

    @cached_property
    def view(self) -> RewardView | None:
        """Which reward columns the objective reads, and how, in terms of the training store; None if it reads none."""
        if not self.reads & (READS_REWARD | {"source"}):
            return None
        return make_view(self.config.rewards, self.stores[0], source_column=self.config.data.source_column)

    @cached_property
    def num_steps(self) -> int:
        train = self.config.train
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        return max(1, math.ceil(train.epochs * len(self.train_store) / train.groups_per_step))

    @property
    def row_multiple(self) -> int:
        """Row lengths are multiples of this: context parallelism splits a row evenly over its ranks, and sequence
        parallelism each part over the tensor ranks."""
        parallel = self.config.parallel
        return parallel.context * (parallel.tensor if parallel.sequence else 1) * row_alignment(self.config.fp8)

    @property
    def precision(self) -> str:
        """What decides the last digits of a log-probability besides the weights."""
        return _precision(self.config.precision, self.config.fp8)

    def reference_identity(self, store: Store) -> dict[str, str]:
        """What the log-probabilities of a stored reference depend on. No layout: they are valid under any."""
        return {
            "weights": self.reference_fingerprint,
            "tokenizer": _join(store.manifest.tokenizer.fingerprints),
            "template": store.manifest.template.fingerprint,
            "precision": _precision(self.config.precision, frozen(self.config.fp8)),
        }

    def with_reference(self, store: Store) -> Store:
        """The store as the objective reads it: with its stored reference, if the config says `stored`."""
        return store.with_reference(self.reference_identity(store)) if self.reference == "stored" else store

    def check_model(self, source: Source) -> None:
        """Weights that are not those of model.path can be split as the config says, and can read the data.

        Raises UserError otherwise.
        """
        shape = self.shape_of(source)
        self._check_layout(shape)
        for store in self.stores:
            _check_model_reads(store, source, shape)

    def check_models(self) -> None:
        """The same for the starting weights and the reference, and that the two can be compared."""
        self._check_layout(self.shape)
        if self.config.moe != MoeConfig() and self.shape.experts is None:
            raise UserError(f"the section `moe` is for models with experts; {self.shape.family} has none: remove it")
        if self.reference == "none":
            return
        self._check_layout(self.reference_shape)
        if "token_kl" in self.reads and self.reference_shape.vocab_size != self.shape.vocab_size:
            raise UserError(
                f"reference.path: {self.reference_source.path} has a vocabulary of {self.reference_shape.vocab_size}, "
                f"the model in {self.source.path} has {self.shape.vocab_size}: a KL over the vocabulary needs one and "
                f"the same; use objective.kl_estimator=sample, or another reference"
            )

    def _check_layout(self, shape: ModelShape) -> None:
        parallel = self.config.parallel
        check_layout(
            shape,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual,
            context=parallel.context,
            expert=parallel.expert,
            sequence=parallel.sequence,
        )

    def _open(self, prefix: str) -> Store:
        store = Store.open(prefix)
        _check_model_reads(store, self.source, self.shape)
        if self.reference != "none":
            _check_model_reads(store, self.reference_source, self.reference_shape)
        return store

    def _as_read(self, store: Store) -> Store:
        if self.reads & READS_REWARD and not set(store.columns) - {self.config.data.source_column}:
            raise UserError(
                f"'{store.prefix}' has no rewards, but objective.method={self.config.objective.method} reads them; "
                f"prepare data that has them, or train with objective.method=sft objective.responses=all"
            )
        return store if self.view is None else store.with_view(self.view)


def resolve(config: RunConfig) -> Plan:
    """Check a config against itself and against the files it names.

    Raises UserError with the key, the file and what to do.
    """
    check_config(config)
    plan = Plan(config=config)
    plan.check_models()
    _ = plan.train_store, plan.valid_store, plan.adapter
    return plan


def check_config(config: RunConfig) -> None:
    """What can be told from the config alone."""
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
    _check_columns(config, reads=Plan(config=config).reads)


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


def _precision(precision: str, fp8: Fp8Config) -> str:
    return precision + (f" with fp8 {fp8.recipe}" if fp8.recipe != "none" else "")


def _language_model(source: Source, user: str) -> ModelShape:
    shape = read_shape(source.hf)
    if shape.head != "lm":
        raise UserError(
            f"{source.path} is a reward model: it has no output layer, and {user} needs log-probabilities; give a "
            f"language model"
        )
    return shape


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
    limit = shape.max_positions
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
