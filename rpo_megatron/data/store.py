"""The store: groups of a prompt, its K responses and numbers for each of them, on disk (PREFIX.*). writer.py writes it.

    PREFIX.bin, .idx           Megatron indexed dataset; a document is a group: prompt, then response 1..K (token ids)
    PREFIX.reward.bin, .idx    float32, one sequence of K rewards per document; absent without rewards
    PREFIX.ref_logp.bin, .idx  float32, one summed reference log-probability per response; `rpo score` writes it
    PREFIX.ref_logp.json       which weights and numerics made them; written last
    PREFIX.column.NAME.*       the same three for any other number per response: of the input, or by `rpo score`
    PREFIX.json                manifest: what is in the store, what made it, checksums; written last

Whatever is interrupted leaves no store that opens. Shapes: D documents (groups), K responses of a group.
"""

import hashlib
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rpo_megatron.data.batch import FLOAT32
from rpo_megatron.data.indexed import FileInfo, IndexedReader
from rpo_megatron.data.manifest import (
    REWARD,
    ColumnManifest,
    Manifest,
    ReferenceManifest,
    RewardStatistics,
    read_record,
)
from rpo_megatron.data.view import RewardView
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import sha256

INT64 = np.dtype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One document of a store. The arrays are copies: they outlive the store and may be written to."""

    prompt: np.ndarray
    """int64 token ids."""
    responses: list[np.ndarray]
    """K arrays of int64 token ids, each with its end-of-turn token."""
    reward: np.ndarray | None
    """float32[K], or None when the store has no rewards: the column `reward` as it is, or the view's mean."""
    rewards: np.ndarray | None = None
    """float32[K, M], the view's columns, transformed; None without a view."""
    source: np.ndarray | None = None
    """bool[K], True for responses of another model; None unless the view names a source column."""
    ref_logp: np.ndarray | None
    """float32[K], or None when the store was opened without its reference."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number per response that the store holds under a name."""

    statistics: RewardStatistics
    identity: dict[str, str]
    """What made the numbers; empty for a column of the input."""


class Store:
    """A read-only store. Opening reads the index and the manifest; tokens are mapped and read group by group."""

    prompt_length_D: np.ndarray
    """int64, tokens of each prompt; from the index, without reading a token."""
    num_responses_D: np.ndarray
    """int64, K of each group; from the index."""

    def __init__(self, prefix: str, manifest: Manifest) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self._tokens = IndexedReader(prefix)
        self.num_responses_D = np.diff(self._tokens.border_D) - 1
        if len(self) != manifest.groups or self.num_responses_D.min(initial=2) < 2:
            raise UserError(f"{prefix}.idx: not the groups that {prefix}.json describes: prepare the data again")
        self.prompt_length_D = self._tokens.length_S[self._tokens.border_D[:-1]].astype(np.int64)
        self._reward = self._sidecar("reward") if "reward.idx" in manifest.files else None
        self._reference: IndexedReader | None = None
        self._view: RewardView | None = None
        self._viewed: tuple[IndexedReader, ...] = ()
        self._source: IndexedReader | None = None

    @classmethod
    def open(cls, prefix: str, *, verify: bool = False) -> "Store":
        """Open PREFIX.*; `verify` also recomputes the checksums, which reads every byte.

        Raises UserError, naming the file, when the store is absent, incomplete, damaged or not of this format.
        """
        path = Path(f"{prefix}.json")
        if not path.is_file():
            raise UserError(f"there is no store at '{prefix}' ({path} does not exist): write one with `rpo prepare`")
        manifest = read_record(Manifest, path)
        _check_files(prefix, manifest.files, verify=verify)
        return cls(prefix, manifest)

    @property
    def has_reward(self) -> bool:
        """True if groups carry a reward: that of the view, or the column `reward`."""
        return self._reward is not None if self._view is None else True

    @property
    def num_rewards(self) -> int:
        """M, the columns of the view; 0 without one."""
        return len(self._viewed)

    @property
    def has_source(self) -> bool:
        return self._source is not None

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    @property
    def fingerprint(self) -> str:
        """sha256 over the checksums of the token and reward files, and of the other columns that the view reads: equal
        for equal data."""
        files = dict(self.manifest.files)
        for name in self._view_columns():
            files |= self._column_manifests[name].files
        return fingerprint_of(files)

    @cached_property
    def columns(self) -> Mapping[str, Column]:
        """Every number per response that the store holds, by name: `reward` first, then in alphabetical order. A column
        that was made for other tokens is not one of them."""
        columns = {}
        if self.manifest.reward is not None:
            columns[REWARD] = Column(statistics=self.manifest.reward, identity={})
        for name, record in self._column_manifests.items():
            columns[name] = Column(statistics=record.statistics, identity=record.identity)
        return columns

    @cached_property
    def _column_manifests(self) -> dict[str, ColumnManifest]:
        here = Path(self.prefix)
        paths = sorted(path for path in here.parent.glob("*.json") if path.name.startswith(f"{here.name}.column."))
        records = [read_record(ColumnManifest, path) for path in paths]
        return {record.name: record for record in records if record.tokens == self.token_fingerprint}

    @cached_property
    def token_fingerprint(self) -> str:
        """The same over the token files alone: reference log-probabilities do not depend on rewards."""
        return fingerprint_of({name: info for name, info in self.manifest.files.items() if name in ("bin", "idx")})

    def __len__(self) -> int:
        return self._tokens.num_documents

    def response_lengths(self, ids: np.ndarray) -> np.ndarray:
        """int64, tokens of each response of the groups `ids`, one group after the other; from the index, without
        reading a token."""
        num_responses = self.num_responses_D[ids]
        before = np.cumsum(num_responses) - num_responses
        first = self._tokens.border_D[ids] + 1
        responses = np.arange(num_responses.sum()) + np.repeat(first - before, num_responses)
        return self._tokens.length_S[responses].astype(np.int64)

    def group(self, i: int) -> Group:
        """Group i. Raises IndexError outside 0 <= i < len(self)."""
        prompt, *responses = self._tokens.document(i, dtype=INT64)
        reward = self._reward.get(i) if self._reward is not None else None
        ref_logp = self._reference.get(i) if self._reference is not None else None
        rewards = None
        if self._view is not None:
            rewards = self._view.apply(np.stack([column.get(i) for column in self._viewed], axis=1))
            reward = rewards.mean(axis=1)
        source = self._source.get(i) != 0 if self._source is not None else None
        return Group(
            prompt=prompt, responses=responses, reward=reward, rewards=rewards, source=source, ref_logp=ref_logp
        )

    def numbers(self, i: int) -> dict[str, np.ndarray]:
        """Every column of group i as it was written, float32[K] by name."""
        return {name: self._column(name).get(i) for name in self.columns}

    def with_view(self, view: RewardView) -> "Store":
        """This store with the view's columns as its rewards and its source column.

        Raises UserError when it lacks one of them, or when the column's files are damaged.
        """
        store = copy(self)
        store._view = view
        store._viewed = tuple(self._column(name) for name in view.columns)
        store._source = None if view.source_column is None else self._column(view.source_column)
        return store

    def with_reference(self, identity: dict[str, str]) -> "Store":
        """This store with its stored reference log-probabilities, which `identity` must have made.

        Raises UserError when there are none, when they belong to other tokens, or when any entry of the recorded
        identity differs (both values are named).
        """
        path = Path(f"{self.prefix}.ref_logp.json")
        if not path.is_file():
            raise UserError(f"'{self.prefix}' has no stored reference ({path} does not exist): run `rpo score` first")
        record = read_record(ReferenceManifest, path)
        if record.tokens != self.token_fingerprint:
            raise UserError(f"{path}: made for an earlier version of '{self.prefix}': run `rpo score` again")
        if different := _differences(record.identity, identity):
            raise UserError(f"{path}: made by another reference: {'; '.join(different)}. Run `rpo score` again")
        _check_files(self.prefix, record.files, verify=False)
        store = copy(self)
        store._reference = self._sidecar("ref_logp")
        return store

    def reference_identity(self) -> dict[str, str] | None:
        """The recorded identity of the stored reference, or None when there is none."""
        path = Path(f"{self.prefix}.ref_logp.json")
        return read_record(ReferenceManifest, path).identity if path.is_file() else None

    def _view_columns(self) -> list[str]:
        """The columns besides `reward` that the view reads."""
        if self._view is None:
            return []
        names = {*self._view.columns, self._view.source_column} - {REWARD, None}
        return sorted(name for name in names if name is not None)

    def _column(self, name: str) -> IndexedReader:
        if name == REWARD and self._reward is not None:
            return self._reward
        if name not in self._column_manifests:
            path = Path(f"{self.prefix}.column.{name}.json")
            why = f"{path} was made for an earlier version of it" if path.is_file() else f"{path} does not exist"
            raise UserError(f"'{self.prefix}' has no column '{name}' ({why}); its columns: {', '.join(self.columns)}")
        _check_files(self.prefix, self._column_manifests[name].files, verify=False)
        return self._sidecar(f"column.{name}")

    def _sidecar(self, name: str) -> IndexedReader:
        sidecar = IndexedReader(f"{self.prefix}.{name}")
        if sidecar.dtype != FLOAT32 or not np.array_equal(sidecar.length_S, self.num_responses_D):
            raise UserError(f"{sidecar.prefix}.idx: not one number per response of '{self.prefix}': write it again")
        return sidecar


def _differences(stored: dict[str, str], wanted: dict[str, str]) -> list[str]:
    keys = sorted({*stored, *wanted})
    values = ((key, stored.get(key, "(absent)"), wanted.get(key, "(absent)")) for key in keys)
    return [f"{key}: stored '{was}', this run '{now}'" for key, was, now in values if was != now]


def fingerprint_of(files: dict[str, FileInfo]) -> str:
    text = "".join(f"{name} {info.sha256}\n" for name, info in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_files(prefix: str, files: dict[str, FileInfo], *, verify: bool) -> None:
    for name, info in files.items():
        path = Path(f"{prefix}.{name}")
        if not path.is_file():
            raise UserError(f"{path}: does not exist, but '{prefix}' needs it; copy it from the store's source")
        found = path.stat().st_size
        if found != info.bytes:
            raise UserError(f"{path}: damaged: {found} bytes, should be {info.bytes}. Copy or prepare it again")
        if verify and sha256(path) != info.sha256:
            raise UserError(f"{path}: damaged: its checksum is not the recorded one. Copy or prepare it again")
