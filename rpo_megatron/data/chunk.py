"""A chunk of raw rows to tokenized groups.

1. Find each row's layout (layouts.py, typed_rows.py) and its texts (chat.py).
2. Tokenize all of them in one call.
3. Apply the policies on empty, duplicate, too long and single responses: the few groups that any of them could concern
   are found in arrays, and only those are looked at one by one.

Shapes: G groups, R responses, N texts (of each group its prompt, then its responses), T tokens.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from rpo_megatron.config_verbs import PrepareConfig
from rpo_megatron.data.batch import FLOAT32, GroupBatch, starts
from rpo_megatron.data.chat import Chat, LaidOut
from rpo_megatron.data.closing import TokenizedTexts
from rpo_megatron.data.layouts import RawGroup
from rpo_megatron.data.manifest import RewardSource
from rpo_megatron.data.readers import RawRow
from rpo_megatron.data.typed_rows import group_reader
from rpo_megatron.errors import UserError

NAN = [float("nan")]


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """What became of a chunk's rows. Shapes as in batch.py."""

    batch: GroupBatch
    """Rewards of groups without any are NaN."""
    where_G: list[str]
    reward_source_G: list[RewardSource | None]
    boundary_merges_G: np.ndarray
    dropped: Counter[str]


def prepare_chunk(config: PrepareConfig, chat: Chat, rows: list[RawRow]) -> ChunkResult:
    """Raises UserError for the first row that deserves it, as if rows were treated one after the other."""
    laid_out: list[LaidOut] = []
    raws: list[RawGroup] = []
    failure: UserError | None = None
    read = group_reader(config.columns)
    for row in rows:
        try:
            raw = read(row)
            laid_out.append(chat.lay_out(raw))
        except UserError as error:
            failure = error
            break
        raws.append(raw)
    result = _Groups(raws, chat.tokenize_all(laid_out)).result(config) if raws else None
    if failure is not None:
        raise failure
    assert result is not None
    return result


class _Groups:
    """Some groups (at least one) as text and as tokens."""

    def __init__(self, raws: list[RawGroup], texts: TokenizedTexts) -> None:
        self._raws, self._texts = raws, texts
        self._num_responses_G = np.fromiter((len(raw.responses) for raw in raws), np.int64, len(raws))
        self._first_N, self._first_R = starts(self._num_responses_G + 1), starts(self._num_responses_G)
        self._is_response_N = np.ones(texts.length_N.size, dtype=bool)
        self._is_response_N[self._first_N] = False
        self._prompt_length_G = texts.length_N[self._first_N]

    def result(self, config: PrepareConfig) -> ChunkResult:
        dropped: Counter[str] = Counter()
        keep_R = self._keep(config, dropped)
        keep_N = np.ones(self._is_response_N.size, dtype=bool)
        num_kept_G = np.add.reduceat(keep_R, self._first_R, dtype=np.int64)
        keep_N[self._first_N], keep_N[self._is_response_N] = num_kept_G > 0, keep_R
        merges_G = np.add.reduceat(self._texts.is_boundary_merge_N & keep_N, self._first_N, dtype=np.int64)
        kept = [self._raws[i] for i in np.flatnonzero(num_kept_G).tolist()]
        return ChunkResult(
            batch=self._batch(keep_N, keep_R, num_kept_G[num_kept_G > 0]),
            where_G=[raw.where for raw in kept],
            reward_source_G=[raw.reward_source for raw in kept],
            boundary_merges_G=merges_G[num_kept_G > 0],
            dropped=dropped,
        )

    def _batch(self, keep_N: np.ndarray, keep_R: np.ndarray, num_responses_G: np.ndarray) -> GroupBatch:
        texts, raws = self._texts, self._raws
        rewards = (NAN * len(raw.responses) if raw.rewards is None else raw.rewards for raw in raws)
        columns = {name: [raw.columns[name] for raw in raws] for name in raws[0].columns}
        return GroupBatch(
            tokens_T=texts.ids_T if keep_N.all() else texts.ids_T[np.repeat(keep_N, texts.length_N)],
            length_S=texts.length_N[keep_N],
            num_responses_G=num_responses_G,
            reward_R=_float32(rewards)[keep_R],
            columns_R={name: _float32(values)[keep_R] for name, values in columns.items()},
        )

    def _keep(self, config: PrepareConfig, dropped: Counter[str]) -> np.ndarray:
        """Which responses the policies leave, [R]; of a group that is dropped none."""
        keep_R = np.ones(int(self._num_responses_G.sum()), dtype=bool)
        for i in np.flatnonzero(self._is_suspect(config)).tolist():
            first, count = int(self._first_R[i]), int(self._num_responses_G[i])
            keep_R[first : first + count] = False
            try:
                keep_R[[first + k for k in self._kept(config, i, dropped)]] = True
            except _GroupDroppedError as reason:
                dropped[f"group_{reason}"] += 1
        return keep_R

    def _is_suspect(self, config: PrepareConfig) -> np.ndarray:
        """The groups that a policy might touch, [G]: all others are kept as they are."""
        num_responses_G, raws = self._num_responses_G, self._raws
        length_R = self._texts.length_N[self._is_response_N]
        blank = [not text or text.isspace() for raw in raws for text in raw.responses]
        is_too_long_R = length_R + np.repeat(self._prompt_length_G, num_responses_G) > config.max_length
        suspect_R = is_too_long_R | self._texts.is_empty_N[self._is_response_N] | blank
        suspect_G = np.logical_or.reduceat(suspect_R, self._first_R) | (num_responses_G < 2)
        suspect_G |= self._prompt_length_G == 0
        if config.duplicate == "drop_response":
            suspect_G |= np.array([_any_equal(raw.responses) for raw in raws])
        return suspect_G

    def _kept(self, config: PrepareConfig, i: int, dropped: Counter[str]) -> list[int]:
        """Which responses of group i the policies leave. What they do not is counted."""
        raw, prompt_length, first = self._raws[i], int(self._prompt_length_G[i]), int(self._first_N[i])
        if not prompt_length:
            raise UserError(f"{raw.where}: the prompt is empty and the tokenizer adds no BOS: nothing to continue")
        seen: set[str] = set()
        kept: list[int] = []
        for k, text in enumerate(raw.responses):
            length = prompt_length + int(self._texts.length_N[first + 1 + k])
            if self._texts.is_empty_N[first + 1 + k] or not text or text.isspace():
                _drop(config.empty_response, "empty", f"{raw.where}: response {k} is empty (empty_response)", dropped)
            elif text in seen and config.duplicate == "drop_response":
                dropped["response_duplicate"] += 1
            elif length > config.max_length:
                what = f"{length} tokens with its prompt, max_length is {config.max_length} (too_long)"
                _drop(config.too_long, "too_long", f"{raw.where}: response {k} has {what}", dropped)
            else:
                kept.append(k)
            seen.add(text)
        if len(kept) < 2:
            what = f"{len(kept)} of {len(raw.responses)} responses left, a group needs two (single_response)"
            _drop(config.single_response, "single_response", f"{raw.where}: {what}", dropped)
        return kept


def _any_equal(texts: list[str]) -> bool:
    """Whether any two are equal. Lengths come first: to hash all texts takes as long as everything else here."""
    return len(set(map(len, texts))) < len(texts) and len(set(texts)) < len(texts)


class _GroupDroppedError(Exception):
    """Ends the treatment of a group whose policy is drop_group."""


def _drop(policy: str, reason: str, message: str, dropped: Counter[str]) -> None:
    if policy == "error":
        raise UserError(message)
    if policy == "drop_group":
        raise _GroupDroppedError(reason)
    dropped[f"response_{reason}"] += 1


def _float32(values: Iterable[list[float]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(values), np.float64).astype(FLOAT32)
