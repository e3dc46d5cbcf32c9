"""Writes stores, and what is added to one later: reference log-probabilities and columns.

Everything goes to temporary names first; the manifest that makes it readable is written last.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from rpo_megatron import __version__
from rpo_megatron.data.batch import FLOAT32, GroupBatch, check_finite, float32
from rpo_megatron.data.indexed import FileInfo, token_dtype
from rpo_megatron.data.indexed_writer import IndexedWriter, WrittenSoFar
from rpo_megatron.data.manifest import (
    COLUMN_NAME,
    FORMAT,
    NO_TEMPLATE,
    REWARD,
    ColumnManifest,
    Manifest,
    ReferenceManifest,
    RewardMoments,
    RewardSource,
    Statistics,
    TemplateInfo,
    TokenizerInfo,
    write_record,
)
from rpo_megatron.data.store import Store, fingerprint_of


@dataclass(frozen=True, kw_only=True)
class ColumnState:
    written: WrittenSoFar
    moments: RewardMoments


@dataclass(frozen=True, kw_only=True)
class WriterState:
    """All that a StoreWriter needs to go on where another one was when its `sync` returned this."""

    tokens: WrittenSoFar
    reward: WrittenSoFar | None
    columns: dict[str, ColumnState]
    statistics: Statistics

    def is_there(self, prefix: str) -> bool:
        """Whether the temporary files of the store at PREFIX hold what they held then."""
        files = {prefix: self.tokens} | {_column_prefix(prefix, name): c.written for name, c in self.columns.items()}
        if self.reward is not None:
            files[f"{prefix}.reward"] = self.reward
        return all(written.is_there(path) for path, written in files.items())


class StoreWriter:
    """Writes a store under temporary names; an older store at PREFIX stands until `finish` replaces it.

        with StoreWriter(prefix, tokenizer=info) as writer:
            writer.add(prompt, responses, reward)
            writer.finish()

    Leaving the block without `finish` (an exception) deletes the temporary files, unless `sync` was called: then they
    stay, for a writer that is made with `resume`.
    """

    def __init__(
        self,
        prefix: str,
        *,
        tokenizer: TokenizerInfo,
        template: TemplateInfo = NO_TEMPLATE,
        resume: WriterState | None = None,
    ) -> None:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self.prefix = prefix
        self._tokenizer = tokenizer
        self._template = template
        self._is_synced = resume is not None
        dtype = token_dtype(tokenizer.vocab_size)
        self._tokens = IndexedWriter(prefix, dtype=dtype, resume=resume.tokens if resume else None)
        self._reward: IndexedWriter | None = None
        self._columns: dict[str, _ColumnWriter] = {}
        self._statistics = Statistics()
        if resume is not None:
            self._statistics = resume.statistics
            self._columns = {name: _ColumnWriter(prefix, name, resume=state) for name, state in resume.columns.items()}
            if resume.reward is not None:
                self._reward = IndexedWriter(f"{prefix}.reward", dtype=FLOAT32, resume=resume.reward)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_synced:
            for writer in self._writers():
                writer.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Delete the temporary files."""
        for writer in self._writers():
            writer.abort()
        self._is_synced = False

    def sync(self) -> WriterState:
        """Have all that was added reach the disk."""
        state = WriterState(
            tokens=self._tokens.sync(),
            reward=None if self._reward is None else self._reward.sync(),
            columns={name: column.sync() for name, column in self._columns.items()},
            statistics=self._statistics,
        )
        self._is_synced = True
        return state

    def _writers(self) -> list[IndexedWriter]:
        rewards = [] if self._reward is None else [self._reward]
        return [self._tokens, *rewards, *(column.writer for column in self._columns.values())]

    def __len__(self) -> int:
        return self._statistics.groups

    def add(
        self,
        prompt: np.ndarray,
        responses: list[np.ndarray],
        reward: np.ndarray | None,
        columns: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Append a group: integer token ids and, for all groups or for none, K finite rewards and further columns.

        Raises ValueError for a group that is not one: fewer than two responses, an empty sequence, a token outside
        the vocabulary, rewards or columns that are not K finite numbers, other columns than the first group's.
        """
        self.add_batch(
            GroupBatch(
                tokens_T=np.concatenate([prompt, *responses]),
                length_S=np.array([prompt.size, *(tokens.size for tokens in responses)]),
                num_responses_G=np.array([len(responses)]),
                reward_R=None if reward is None else float32(reward),
                columns_R={name: float32(values) for name, values in (columns or {}).items()},
            )
        )

    def add_batch(self, batch: GroupBatch) -> None:
        """Append groups, with one write to each file. Raises ValueError as `add`."""
        batch.check(vocab_size=self._tokenizer.vocab_size)
        if not len(batch):
            return
        if self._statistics.groups and batch.columns_R.keys() != self._columns.keys():
            found, first = ", ".join(batch.columns_R), ", ".join(self._columns)
            raise ValueError(f"columns {found}, but the first group has {first}")
        if self._statistics.groups and (batch.reward_R is None) != (self._reward is None):
            raise ValueError("rewards must be given for all groups of a store or for none")
        num_responses_G = batch.num_responses_G
        self._tokens.add_documents(batch.tokens_T, length_S=batch.length_S, num_sequences_D=num_responses_G + 1)
        if batch.reward_R is not None:
            self._reward = self._reward or IndexedWriter(f"{self.prefix}.reward", dtype=FLOAT32)
            _add_numbers(self._reward, batch.reward_R, num_responses_G)
        for name, values_R in batch.columns_R.items():
            if name not in self._columns:
                self._columns[name] = _ColumnWriter(self.prefix, name)
            self._columns[name].add(values_R, num_responses_G)
        self._statistics.add(batch.length_S, num_responses_G, batch.reward_R)

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
        _remove_columns(self.prefix)  # of the store that stood here
        self._tokens.publish()
        if self._reward is not None:
            self._reward.publish()
        else:
            for name in ("reward.bin", "reward.idx"):
                Path(f"{self.prefix}.{name}").unlink(missing_ok=True)
        tokens = fingerprint_of({name: info for name, info in manifest.files.items() if name in ("bin", "idx")})
        for column in self._columns.values():
            column.publish(tokens=tokens, identity={})
        write_record(manifest, path)


def write_reference(store: Store, values: Iterable[np.ndarray], *, identity: dict[str, str]) -> None:
    """Write PREFIX.ref_logp.*: one array of K summed log-probabilities per group of the store, in order.

    Raises ValueError for a wrong number of groups or responses and for NaN or infinity; then, as after any
    interruption, no reference opens that was not there before.
    """
    prefix = f"{store.prefix}.ref_logp"
    writer = IndexedWriter(prefix, dtype=FLOAT32)
    try:
        for value_K in _checked(store, values, what="reference log-probabilities"):
            writer.add(value_K)
            writer.end_document()
        files = {f"ref_logp.{name}": info for name, info in writer.finish().items()}
        Path(f"{prefix}.json").unlink(missing_ok=True)
        writer.publish()
    except BaseException:
        writer.abort()
        raise
    record = ReferenceManifest(format=FORMAT, tokens=store.token_fingerprint, identity=identity, files=files)
    write_record(record, Path(f"{prefix}.json"))


def write_column(store: Store, name: str, values: Iterable[np.ndarray], *, identity: dict[str, str]) -> None:
    """Write PREFIX.column.NAME.*: one array of K numbers per group of the store, in order; `identity` says what made
    them. A column of that name is replaced.

    Raises ValueError for a name that is not made of letters, digits, _ and -, or is `reward`, and as write_reference.
    """
    writer = _ColumnWriter(store.prefix, name)
    try:
        for value_K in _checked(store, values, what=f"column '{name}'"):
            writer.add(value_K, np.array([value_K.size]))
        writer.publish(tokens=store.token_fingerprint, identity=identity)
    except BaseException:
        writer.writer.abort()
        raise


class _ColumnWriter:
    """One column under temporary names until `publish`."""

    def __init__(self, prefix: str, name: str, *, resume: ColumnState | None = None) -> None:
        if not COLUMN_NAME.fullmatch(name) or name == REWARD:
            raise ValueError(f"'{name}' cannot name a column: letters, digits, _ and - can, '{REWARD}' is taken")
        self._name = name
        self._prefix = _column_prefix(prefix, name)
        self.writer = IndexedWriter(self._prefix, dtype=FLOAT32, resume=resume.written if resume else None)
        self._moments = resume.moments if resume else RewardMoments()

    def add(self, values_R: np.ndarray, num_responses_G: np.ndarray) -> None:
        _add_numbers(self.writer, values_R, num_responses_G)
        self._moments.add(values_R, num_responses_G)

    def sync(self) -> ColumnState:
        return ColumnState(written=self.writer.sync(), moments=self._moments)

    def publish(self, *, tokens: str, identity: dict[str, str]) -> None:
        files: dict[str, FileInfo] = {f"column.{self._name}.{end}": i for end, i in self.writer.finish().items()}
        record = ColumnManifest(
            format=FORMAT,
            tokens=tokens,
            name=self._name,
            statistics=self._moments.statistics("given"),
            identity=identity,
            files=files,
        )
        Path(f"{self._prefix}.json").unlink(missing_ok=True)
        self.writer.publish()
        write_record(record, Path(f"{self._prefix}.json"))


def _checked(store: Store, values: Iterable[np.ndarray], *, what: str) -> Iterable[np.ndarray]:
    """The values as finite float32 [K], one per group of the store, no more and no fewer."""
    num_groups = 0
    for num_groups, value in enumerate(values, start=1):
        if num_groups > len(store):
            raise ValueError(f"{what}: more than the {len(store)} groups of '{store.prefix}'")
        value_K = float32(value)
        check_finite(value_K, size=int(store.num_responses_D[num_groups - 1]), what=f"{what} of group {num_groups - 1}")
        yield value_K
    if num_groups < len(store):
        raise ValueError(f"{what} of {num_groups} groups, '{store.prefix}' has {len(store)}")


def _column_prefix(prefix: str, name: str) -> str:
    return f"{prefix}.column.{name}"


def _remove_columns(prefix: str) -> None:
    here = Path(prefix)
    for path in here.parent.iterdir():
        if path.name.startswith(f"{here.name}.column.") and path.suffix in (".json", ".bin", ".idx"):
            path.unlink()


def _add_numbers(writer: IndexedWriter, values_R: np.ndarray, num_responses_G: np.ndarray) -> None:
    """One number per response: a document of one sequence for each group."""
    writer.add_documents(values_R, length_S=num_responses_G, num_sequences_D=np.ones_like(num_responses_G))
