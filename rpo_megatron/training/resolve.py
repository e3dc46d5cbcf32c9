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

from rpo_megatron.config import Fp8Config, MoeConfig, RunConfig
from rpo_megatron.data.rewards import make_view
from rpo_megatron.data.store import Store
from rpo_megatron.data.tokenizer import same_tokenizer, tokenizer_fingerprints
from rpo_megatron.data.view import RewardView
from rpo_megatron.errors import UserError
from rpo_megatron.model.adapter import Adapter
from rpo_megatron.model.layout import check_engine_knows, check_layout
from rpo_megatron.model.precision import frozen, row_alignment
from rpo_megatron.model.shape import ModelShape, read_shape
from rpo_megatron.model.source import Source, find
from rpo_megatron.objectives import catalogue
from rpo_megatron.objectives.row import KnobValue
from rpo_megatron.training import adapters
from rpo_megatron.training.checks import READS_REFERENCE, READS_REWARD, check_config, columns_read


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
        return columns_read(self.config.objective)

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
        num_groups = len(self.train_store)
        if train.groups_per_step > num_groups:
            raise UserError(
                f"train.groups_per_step={train.groups_per_step:,} is more than the {num_groups:,} groups of "
                f"'{self.train_store.prefix}', so that train.epochs={train.epochs:g} cannot be kept: one step would be "
                f"{train.groups_per_step / num_groups:.2f} passes; set train.groups_per_step to {num_groups} or less, "
                f"or train.steps in place of train.epochs if a step is to take groups several times"
            )
        return max(1, math.ceil(train.epochs * num_groups / train.groups_per_step))

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
        self.check_shape(shape)
        for store in self.stores:
            _check_model_reads(store, source, shape)

    def check_models(self) -> None:
        """The same for the starting weights and the reference, and that the two can be compared."""
        self.check_shape(self.shape)
        if self.config.moe != MoeConfig() and self.shape.experts is None:
            raise UserError(f"the section `moe` is for models with experts; {self.shape.family} has none: remove it")
        if self.reference == "none":
            return
        self.check_shape(self.reference_shape)
        if "token_kl" in self.reads and self.reference_shape.vocab_size != self.shape.vocab_size:
            raise UserError(
                f"reference.path: {self.reference_source.path} has a vocabulary of {self.reference_shape.vocab_size}, "
                f"the model in {self.source.path} has {self.shape.vocab_size}: a KL over the vocabulary needs one and "
                f"the same; use objective.kl_estimator=sample, or another reference"
            )

    def check_shape(self, shape: ModelShape) -> None:
        """A model of this shape can be split as the config says, and has the layers that it asks for.

        Raises UserError otherwise.
        """
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
        if self.config.fp8.recipe != "none" or self.config.kernels.layers == "transformer_engine":
            check_engine_knows(shape)

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
    _ = plan.train_store, plan.valid_store, plan.adapter, plan.num_steps
    return plan


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
