"""Writes stores, and what is added to one later: reference log-probabilities and columns.

Everything goes to temporary names first; the manifest that makes it readable is written last.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from rpo_megatron import __version__
from rpo_megatron.data.indexed import FileInfo, IndexedWriter, token_dtype
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
from rpo_megatron.data.store import FLOAT32, Store, fingerprint_of


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
        self._columns: dict[str, _ColumnWriter] = {}
        self._statistics = Statistics()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.abort()
        self.drop_rewards()
        for column in self._columns.values():
            column.abort()

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
        reward_K = None if reward is None else _finite_float32(reward, len(responses), "rewards")
        named = columns or {}
        columns_K = {name: _finite_float32(named[name], len(responses), f"column '{name}'") for name in named}
        if self._statistics.groups and columns_K.keys() != self._columns.keys():
            raise ValueError(f"columns {', '.join(columns_K)}, but the first group has {', '.join(self._columns)}")
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
        for name, values_K in columns_K.items():
            if name not in self._columns:
                self._columns[name] = _ColumnWriter(self.prefix, name)
            self._columns[name].add(values_K)
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
            writer.add(value_K)
        writer.publish(tokens=store.token_fingerprint, identity=identity)
    except BaseException:
        writer.abort()
        raise


class _ColumnWriter:
    """One column under temporary names until `publish`."""

    def __init__(self, prefix: str, name: str) -> None:
        if not COLUMN_NAME.fullmatch(name) or name == REWARD:
            raise ValueError(f"'{name}' cannot name a column: letters, digits, _ and - can, '{REWARD}' is taken")
        self._name = name
        self._prefix = f"{prefix}.column.{name}"
        self._writer = IndexedWriter(self._prefix, dtype=FLOAT32)
        self._moments = RewardMoments()

    def add(self, values_K: np.ndarray) -> None:
        self._writer.add(values_K)
        self._writer.end_document()
        self._moments.add(values_K)

    def publish(self, *, tokens: str, identity: dict[str, str]) -> None:
        files: dict[str, FileInfo] = {f"column.{self._name}.{end}": i for end, i in self._writer.finish().items()}
        record = ColumnManifest(
            format=FORMAT,
            tokens=tokens,
            name=self._name,
            statistics=self._moments.statistics("given"),
            identity=identity,
            files=files,
        )
        Path(f"{self._prefix}.json").unlink(missing_ok=True)
        self._writer.publish()
        write_record(record, Path(f"{self._prefix}.json"))

    def abort(self) -> None:
        self._writer.abort()


def _checked(store: Store, values: Iterable[np.ndarray], *, what: str) -> Iterable[np.ndarray]:
    """The values as finite float32 [K], one per group of the store, no more and no fewer."""
    num_groups = 0
    for num_groups, value in enumerate(values, start=1):
        if num_groups > len(store):
            raise ValueError(f"{what}: more than the {len(store)} groups of '{store.prefix}'")
        yield _finite_float32(value, int(store.num_responses_D[num_groups - 1]), f"{what} of group {num_groups - 1}")
    if num_groups < len(store):
        raise ValueError(f"{what} of {num_groups} groups, '{store.prefix}' has {len(store)}")


def _remove_columns(prefix: str) -> None:
    here = Path(prefix)
    for path in here.parent.iterdir():
        if path.name.startswith(f"{here.name}.column.") and path.suffix in (".json", ".bin", ".idx"):
            path.unlink()


def _finite_float32(values: np.ndarray, size: int, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows float32 is infinite and refused below
        stored = np.asarray(values).astype(FLOAT32)
    if stored.shape != (size,):
        raise ValueError(f"{what}: expected {size} numbers, got shape {stored.shape}")
    if not np.isfinite(stored).all():
        raise ValueError(f"{what}: {stored} are not all finite")
    return stored
