"""A chunk of raw rows to tokenized groups.

Find each row's layout, tokenize all of them in one call, apply the policies on empty, duplicate, too long and single
responses.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from rpo_megatron.config_verbs import PrepareConfig
from rpo_megatron.data.batch import FLOAT32, GroupBatch, concatenate
from rpo_megatron.data.chat import Chat, LaidOut, TokenizedGroup
from rpo_megatron.data.layouts import RawGroup, parse_row
from rpo_megatron.data.manifest import RewardSource
from rpo_megatron.data.readers import RawRow
from rpo_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """What became of a chunk's rows. Shapes as in batch.py."""

    batch: GroupBatch
    """Rewards of groups without any are NaN."""
    where_G: list[str]
    reward_source_G: list[RewardSource | None]
    boundary_merges_G: np.ndarray
    dropped: Counter[str]


class _GroupDroppedError(Exception):
    """Ends the treatment of a group whose policy is drop_group."""


def prepare_chunk(config: PrepareConfig, chat: Chat, rows: list[RawRow]) -> ChunkResult:
    """Raises UserError for the first row that deserves it, as if rows were treated one after the other."""
    laid_out: list[LaidOut] = []
    raws: list[RawGroup] = []
    failure: UserError | None = None
    for row in rows:
        try:
            raw = parse_row(row.decode(), where=row.where, columns=config.columns)
            laid_out.append(chat.lay_out(raw))
        except UserError as error:
            failure = error
            break
        raws.append(raw)
    gathered = _Gathered()
    for raw, tokenized in zip(raws, chat.tokenize_all(laid_out), strict=True):
        try:
            gathered.add(raw, tokenized, _kept(config, raw, tokenized, gathered.dropped))
        except _GroupDroppedError as reason:
            gathered.dropped[f"group_{reason}"] += 1
    if failure is not None:
        raise failure
    return gathered.result()


def _kept(config: PrepareConfig, raw: RawGroup, tokenized: TokenizedGroup, dropped: Counter[str]) -> list[int]:
    """Which responses the policies leave. What they do not is counted."""
    seen: set[str] = set()
    kept: list[int] = []
    room = config.max_length - tokenized.prompt.size
    for i, (text, response) in enumerate(zip(raw.responses, tokenized.responses, strict=True)):
        if response.is_empty or not text or text.isspace():
            _drop(config.empty_response, "empty", f"{raw.where}: response {i} is empty (empty_response)", dropped)
        elif text in seen and config.duplicate == "drop_response":
            dropped["response_duplicate"] += 1
        elif response.ids.size > room:
            length = tokenized.prompt.size + response.ids.size
            what = f"{length} tokens with its prompt, max_length is {config.max_length} (too_long)"
            _drop(config.too_long, "too_long", f"{raw.where}: response {i} has {what}", dropped)
        else:
            kept.append(i)
        seen.add(text)
    if len(kept) < 2:
        what = f"{len(kept)} of {len(raw.responses)} responses left, a group needs two (single_response)"
        _drop(config.single_response, "single_response", f"{raw.where}: {what}", dropped)
    return kept


def _drop(policy: str, reason: str, message: str, dropped: Counter[str]) -> None:
    if policy == "error":
        raise UserError(message)
    if policy == "drop_group":
        raise _GroupDroppedError(reason)
    dropped[f"response_{reason}"] += 1


@dataclass(kw_only=True)
class _Gathered:
    """Groups one after the other, until they become arrays."""

    sequences: list[np.ndarray] = field(default_factory=list)
    num_responses: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)
    where: list[str] = field(default_factory=list)
    reward_source: list[RewardSource | None] = field(default_factory=list)
    boundary_merges: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, raw: RawGroup, tokenized: TokenizedGroup, kept: list[int]) -> None:
        responses = [tokenized.responses[i] for i in kept]
        self.sequences.append(tokenized.prompt)
        self.sequences += [response.ids for response in responses]
        self.num_responses.append(len(kept))
        self.rewards += [float("nan") if raw.rewards is None else raw.rewards[i] for i in kept]
        for name, values in raw.columns.items():
            self.columns.setdefault(name, []).extend(values[i] for i in kept)
        self.where.append(raw.where)
        self.reward_source.append(raw.reward_source)
        self.boundary_merges.append(sum(response.is_boundary_merge for response in responses))

    def result(self) -> ChunkResult:
        length_S = np.fromiter((ids.size for ids in self.sequences), np.int64, len(self.sequences))
        batch = GroupBatch(
            tokens_T=concatenate(self.sequences, dtype=np.dtype(np.int32)),
            length_S=length_S,
            num_responses_G=np.array(self.num_responses, dtype=np.int64),
            reward_R=np.array(self.rewards, dtype=FLOAT32),
            columns_R={name: np.array(values, dtype=FLOAT32) for name, values in self.columns.items()},
        )
        return ChunkResult(
            batch=batch,
            where_G=self.where,
            reward_source_G=self.reward_source,
            boundary_merges_G=np.array(self.boundary_merges, dtype=np.int64),
            dropped=self.dropped,
        )
