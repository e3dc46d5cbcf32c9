"""The store: groups of a prompt, its K responses and their rewards, on disk (PREFIX.*), reader beside writer.

    PREFIX.bin, .idx           Megatron indexed dataset; a document is a group: prompt, then response 1..K (token ids)
    PREFIX.reward.bin, .idx    float32, one sequence of K rewards per document; absent without rewards
    PREFIX.ref_logp.bin, .idx  float32, one summed reference log-probability per response; `rpo score` writes it
    PREFIX.ref_logp.json       which weights and numerics made them; written last
    PREFIX.json                manifest: what is in the store, what made it, checksums; written last

Whatever is interrupted leaves no store that opens. Shapes: D documents (groups), K responses of a group.
"""

import hashlib
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from rpo_megatron import __version__
from rpo_megatron.data.indexed import FileInfo, IndexedReader, IndexedWriter, token_dtype
from rpo_megatron.data.manifest import (
    FORMAT,
    NO_TEMPLATE,
    Manifest,
    RewardSource,
    Statistics,
    TemplateInfo,
    TokenizerInfo,
    read_record,
    write_record,
)
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import sha256

FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class Group:
    """One document of a store. The arrays are copies: they outlive the store and may be written to."""

    prompt: np.ndarray
    """int64 token ids."""
    responses: list[np.ndarray]
    """K arrays of int64 token ids, each with its end-of-turn token."""
    reward: np.ndarray | None
    """float32[K], or None when the store has no rewards."""
    ref_logp: np.ndarray | None
    """float32[K], or None when the store was opened without its reference."""


@dataclass(frozen=True, kw_only=True)
class ReferenceManifest:
    """PREFIX.ref_logp.json."""

    format: int
    tokens: str
    """`token_fingerprint` of the store that was scored."""
    identity: dict[str, str]
    """What made the numbers: fingerprints of weights, tokenizer, template and numerics."""
    files: dict[str, FileInfo]


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
        return self._reward is not None

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the checksums of the token and reward files: equal for equal data."""
        return _fingerprint(self.manifest.files)

    @cached_property
    def token_fingerprint(self) -> str:
        """The same over the token files alone: reference log-probabilities do not depend on rewards."""
        return _fingerprint({name: info for name, info in self.manifest.files.items() if name in ("bin", "idx")})

    def __len__(self) -> int:
        return self._tokens.num_documents

    def response_lengths(self, i: int) -> np.ndarray:
        """int64[K], tokens of each response of group i; from the index, without reading a token."""
        sequences = self._tokens.document_range(i)
        return self._tokens.length_S[sequences.start + 1 : sequences.stop].astype(np.int64)

    def group(self, i: int) -> Group:
        """Group i. Raises IndexError outside 0 <= i < len(self)."""
        prompt, *responses = (tokens.astype(np.int64) for tokens in self._tokens.document(i))
        reward = self._reward.get(i) if self._reward is not None else None
        ref_logp = self._reference.get(i) if self._reference is not None else None
        return Group(prompt=prompt, responses=responses, reward=reward, ref_logp=ref_logp)

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

    def _sidecar(self, name: str) -> IndexedReader:
        sidecar = IndexedReader(f"{self.prefix}.{name}")
        if sidecar.dtype != FLOAT32 or not np.array_equal(sidecar.length_S, self.num_responses_D):
            raise UserError(f"{sidecar.prefix}.idx: not one number per response of '{self.prefix}': write it again")
        return sidecar


def _differences(stored: dict[str, str], wanted: dict[str, str]) -> list[str]:
    keys = sorted({*stored, *wanted})
    values = ((key, stored.get(key, "(absent)"), wanted.get(key, "(absent)")) for key in keys)
    return [f"{key}: stored '{was}', this run '{now}'" for key, was, now in values if was != now]


def _fingerprint(files: dict[str, FileInfo]) -> str:
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


# ------------------------------------------------------------------------------------------------ writers


class StoreWriter:
    """Writes a store under temporary names; an older store at PREFIX stands until `finish` replaces it.

        with StoreWriter(prefix, tokenizer=info) as writer:
            writer.add(prompt, responses, reward)
            writer.finish()

    Leaving the block without `finish` (an exception) deletes the temporary files.
    """

    def __init__(self, prefix: str, *, tokenizer: TokenizerInfo, template: TemplateInfo = NO_TEMPLATE) -> None:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self.prefix = prefix
        self._tokenizer = tokenizer
        self._template = template
        self._tokens = IndexedWriter(prefix, dtype=token_dtype(tokenizer.vocab_size))
        self._reward: IndexedWriter | None = None
        self._statistics = Statistics()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.abort()
        self.drop_rewards()

    def __len__(self) -> int:
        return self._statistics.groups

    def add(self, prompt: np.ndarray, responses: list[np.ndarray], reward: np.ndarray | None) -> None:
        """Append a group: integer token ids and, for all groups or for none, K finite rewards.

        Raises ValueError for a group that is not one: fewer than two responses, an empty sequence, a token outside
        the vocabulary, rewards that are not K finite numbers.
        """
        reward_K = None if reward is None else _finite_float32(reward, len(responses), "rewards")
        if self._statistics.groups and (reward_K is None) != (self._reward is None):
            raise ValueError("rewards must be given for all groups of a store or for none")
        if len(responses) < 2:
            raise ValueError(f"a group needs two responses at least, got {len(responses)}")
        for tokens in (prompt, *responses):
            self._check_tokens(tokens)
        for tokens in (prompt, *responses):
            self._tokens.add(tokens)
        self._tokens.end_document()
        if reward_K is not None:
            self._reward = self._reward or IndexedWriter(f"{self.prefix}.reward", dtype=FLOAT32)
            self._reward.add(reward_K)
            self._reward.end_document()
        self._statistics.add(prompt.size, [tokens.size for tokens in responses], reward_K)

    def drop_rewards(self) -> None:
        """Forget the rewards of the groups so far; those that follow are added without."""
        if self._reward is not None:
            self._reward.abort()
            self._reward = None

    def finish(
        self,
        *,
        reward_source: RewardSource = "given",
        dropped: dict[str, int] | None = None,
        boundary_merges: int = 0,
    ) -> Manifest:
        """Publish the store, its manifest last. Raises ValueError when nothing was added."""
        statistics = self._statistics
        if not statistics.groups:
            raise ValueError("a store needs a group at least")
        files = self._tokens.finish()
        if self._reward is not None:
            files |= {f"reward.{name}": info for name, info in self._reward.finish().items()}
        manifest = Manifest(
            format=FORMAT,
            created_by=f"rpo_megatron {__version__}",
            tokenizer=self._tokenizer,
            template=self._template,
            groups=statistics.groups,
            responses=statistics.responses,
            tokens=statistics.tokens,
            max_length=statistics.max_length,
            responses_per_group=statistics.sorted_responses_per_group(),
            lengths=statistics.lengths(),
            reward=statistics.rewards.statistics(reward_source) if self._reward is not None else None,
            dropped=dropped or {},
            boundary_merges=boundary_merges,
            files=files,
        )
        self._publish(manifest)
        return manifest

    def _publish(self, manifest: Manifest) -> None:
        path = Path(f"{self.prefix}.json")
        path.unlink(missing_ok=True)  # from here to the last line nothing opens at PREFIX
        self._tokens.publish()
        if self._reward is not None:
            self._reward.publish()
        else:
            for name in ("reward.bin", "reward.idx"):
                Path(f"{self.prefix}.{name}").unlink(missing_ok=True)
        write_record(manifest, path)

    def _check_tokens(self, tokens: np.ndarray) -> None:
        if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise ValueError(f"expected a non-empty row of token ids, got {tokens.dtype} of shape {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self._tokenizer.vocab_size:
            size = self._tokenizer.vocab_size
            raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} in a vocabulary of {size}")


def write_reference(store: Store, values: Iterable[np.ndarray], *, identity: dict[str, str]) -> None:
    """Write PREFIX.ref_logp.*: one array of K summed log-probabilities per group of the store, in order.

    Raises ValueError for a wrong number of groups or responses and for NaN or infinity; then, as after any
    interruption, no reference opens that was not there before.
    """
    prefix = f"{store.prefix}.ref_logp"
    writer = IndexedWriter(prefix, dtype=FLOAT32)
    try:
        num_responses_D = store.num_responses_D
        num_groups = 0
        for num_groups, value in enumerate(values, start=1):
            if num_groups > len(store):
                raise ValueError(f"more than the {len(store)} groups of '{store.prefix}'")
            num_responses = int(num_responses_D[num_groups - 1])
            writer.add(_finite_float32(value, num_responses, f"reference log-probabilities of group {num_groups - 1}"))
            writer.end_document()
        if num_groups < len(store):
            raise ValueError(f"reference log-probabilities of {num_groups} groups, '{store.prefix}' has {len(store)}")
        files = {f"ref_logp.{name}": info for name, info in writer.finish().items()}
        Path(f"{prefix}.json").unlink(missing_ok=True)
        writer.publish()
    except BaseException:
        writer.abort()
        raise
    record = ReferenceManifest(format=FORMAT, tokens=store.token_fingerprint, identity=identity, files=files)
    write_record(record, Path(f"{prefix}.json"))


def _finite_float32(values: np.ndarray, size: int, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows float32 is infinite and refused below
        stored = np.asarray(values).astype(FLOAT32)
    if stored.shape != (size,):
        raise ValueError(f"{what}: expected {size} numbers, got shape {stored.shape}")
    if not np.isfinite(stored).all():
        raise ValueError(f"{what}: {stored} are not all finite")
    return stored
