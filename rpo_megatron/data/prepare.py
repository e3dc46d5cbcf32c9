"""`rpo prepare`: raw preference data to a store.

    rpo prepare input=data.jsonl.gz output_prefix=data/train tokenizer=models/llama

1. Read rows (readers.py), in chunks.
2. In the worker processes: find each row's layout (layouts.py), tokenize it (chat.py), apply the policies on empty,
   duplicate, too long and single responses (below).
3. In this process, in the order of the input: the policy on missing rewards, then write (store.py).

The store does not depend on the number of workers. An error in any stage leaves nothing behind.
"""

import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np

from rpo_megatron.config import PrepareConfig
from rpo_megatron.data.chat import Chat
from rpo_megatron.data.layouts import RawGroup, check_columns, parse_row
from rpo_megatron.data.manifest import Manifest, RewardSource
from rpo_megatron.data.progress import Progress
from rpo_megatron.data.readers import RawRow, Source
from rpo_megatron.data.template import load_template, template_info
from rpo_megatron.data.tokenizer import Tokenizer
from rpo_megatron.data.writer import StoreWriter
from rpo_megatron.errors import UserError

CHUNK = 64
"""Rows that a worker gets at a time."""
FEW_CHUNKS = 16
"""Input of fewer chunks is done here: starting processes would take longer."""
CHUNKS_IN_FLIGHT = 4
"""Per worker: enough to keep it busy while the oldest chunk is written, few enough to bound memory."""


def prepare(config: PrepareConfig) -> None:
    """Raises UserError, naming file and line or the key of the config, for anything that is wrong with the input; what
    stood at output_prefix before is then still there."""
    check_columns(config.columns)
    tokenizer = Tokenizer(config.tokenizer)
    template = load_template(config.chat_template, tokenizer)
    chat = Chat(tokenizer, template)
    rows = islice(Source(config.input, split=config.split), config.limit)
    with StoreWriter(config.output_prefix, tokenizer=tokenizer.info, template=template_info(template)) as writer:
        collector = _Collector(config, writer)
        with (
            Progress(unit="row", limit=config.limit) as progress,
            closing(_chunk_results(config, chat, rows)) as results,
        ):
            for result in results:
                collector.add(result)
                progress.advance(result.num_rows, fraction=result.fraction)
        manifest = collector.finish()
    print("\n".join(report(config.output_prefix, manifest, columns=list(config.columns.extra))))


def report(prefix: str, manifest: Manifest, *, columns: list[str]) -> list[str]:
    """Lines that say what was written and what was left out."""
    lines = [f"{prefix}: {manifest.groups:,} groups, {manifest.responses:,} responses, {manifest.tokens:,} tokens"]
    if manifest.reward is None:
        lines.append("no rewards")
    else:
        reward = manifest.reward
        lines.append(f"rewards ({reward.source}): mean {reward.mean:.4g}, {reward.all_equal:.1%} of groups all equal")
    if columns:
        lines.append(f"further columns: {', '.join(columns)}")
    lines.append(f"{manifest.boundary_merges:>10,}  responses tokenized apart from their prompt (boundary merges)")
    lines += [f"{count:>10,}  dropped: {reason}" for reason, count in manifest.dropped.items()]
    return lines


# ------------------------------------------------------------------------------------------------ in the workers


@dataclass(frozen=True, kw_only=True)
class PreparedGroup:
    where: str
    prompt: np.ndarray
    responses: list[np.ndarray]
    reward: np.ndarray | None
    reward_source: RewardSource | None
    columns: dict[str, np.ndarray]
    boundary_merges: int


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    num_rows: int
    fraction: float
    """Share of the input that is read once these rows are."""
    groups: list[PreparedGroup]
    dropped: Counter[str]


class _GroupDroppedError(Exception):
    """Ends the treatment of a group whose policy is drop_group."""


def prepare_chunk(config: PrepareConfig, chat: Chat, rows: list[RawRow]) -> ChunkResult:
    dropped: Counter[str] = Counter()
    groups = []
    for row in rows:
        raw = parse_row(row.decode(), where=row.where, columns=config.columns)
        try:
            groups.append(_prepare_group(config, chat, raw, dropped))
        except _GroupDroppedError as reason:
            dropped[f"group_{reason}"] += 1
    return ChunkResult(num_rows=len(rows), fraction=rows[-1].fraction, groups=groups, dropped=dropped)


def _prepare_group(config: PrepareConfig, chat: Chat, raw: RawGroup, dropped: Counter[str]) -> PreparedGroup:
    tokenized = chat.tokenize(raw)
    seen: set[str] = set()
    kept: list[int] = []
    for i, (text, response) in enumerate(zip(raw.responses, tokenized.responses, strict=True)):
        length = tokenized.prompt.size + response.ids.size
        if not text.strip() or response.is_empty:
            _drop(config.empty_response, "empty", f"{raw.where}: response {i} is empty (empty_response)", dropped)
        elif text in seen and config.duplicate == "drop_response":
            dropped["response_duplicate"] += 1
        elif length > config.max_length:
            what = f"{length} tokens with its prompt, max_length is {config.max_length} (too_long)"
            _drop(config.too_long, "too_long", f"{raw.where}: response {i} has {what}", dropped)
        else:
            kept.append(i)
        seen.add(text)
    if len(kept) < 2:
        what = f"{len(kept)} of {len(raw.responses)} responses left, a group needs two (single_response)"
        _drop(config.single_response, "single_response", f"{raw.where}: {what}", dropped)
    return PreparedGroup(
        where=raw.where,
        prompt=tokenized.prompt,
        responses=[tokenized.responses[i].ids for i in kept],
        reward=None if raw.rewards is None else np.array([raw.rewards[i] for i in kept], dtype=np.float32),
        reward_source=raw.reward_source,
        columns={name: np.array([values[i] for i in kept], dtype=np.float32) for name, values in raw.columns.items()},
        boundary_merges=sum(tokenized.responses[i].is_boundary_merge for i in kept),
    )


def _drop(policy: str, reason: str, message: str, dropped: Counter[str]) -> None:
    if policy == "error":
        raise UserError(message)
    if policy == "drop_group":
        raise _GroupDroppedError(reason)
    dropped[f"response_{reason}"] += 1


# ------------------------------------------------------------------------------------------------ worker processes


def _chunk_results(config: PrepareConfig, chat: Chat, rows: Iterator[RawRow]) -> Generator[ChunkResult, None, None]:
    """Results in the order of the rows, from `workers` processes (from this one, if it is one)."""
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    workers = config.workers or _num_cores()
    first = list(islice(chunks, FEW_CHUNKS))
    if workers == 1 or len(first) < FEW_CHUNKS:
        yield from (prepare_chunk(config, chat, chunk) for chunk in chain(first, chunks))
        return
    # spawn, because forking a process whose libraries have started threads can deadlock
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        pending: deque[Future[ChunkResult]] = deque()
        try:
            for chunk in chain(first, chunks):
                pending.append(pool.submit(_work, config, chunk))
                if len(pending) >= workers * CHUNKS_IN_FLIGHT:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"one of the {workers} tokenizing processes was killed, perhaps for want of memory: try fewer workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _num_cores() -> int:
    """Cores that this process may use, where the system can tell; a container often gives it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; a worker whose parent was killed must not wait for work forever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@cache
def _load_chat(tokenizer_path: str, chat_template: str) -> Chat:
    tokenizer = Tokenizer(tokenizer_path)
    return Chat(tokenizer, load_template(chat_template, tokenizer))


def _work(config: PrepareConfig, rows: list[RawRow]) -> ChunkResult:
    return prepare_chunk(config, _load_chat(config.tokenizer, config.chat_template), rows)


# ------------------------------------------------------------------------------------------------ in this process


class _Collector:
    """Writes the groups in order, after the policy on missing rewards, which needs to have seen the others."""

    def __init__(self, config: PrepareConfig, writer: StoreWriter) -> None:
        self._config = config
        self._writer = writer
        self._dropped: Counter[str] = Counter()
        self._boundary_merges = 0
        self._standard: PreparedGroup | None = None
        """The group whose kind of rewards the others must have."""
        self._keeps_rewards = True

    def add(self, result: ChunkResult) -> None:
        self._dropped.update(result.dropped)
        for group in result.groups:
            if self._accept(group):
                reward = group.reward if self._keeps_rewards else None
                self._writer.add(group.prompt, group.responses, reward, group.columns)
                self._boundary_merges += group.boundary_merges
            else:
                self._dropped["group_missing_reward"] += 1

    def _accept(self, group: PreparedGroup) -> bool:
        policy = self._config.missing_reward
        if policy == "drop_group" and group.reward_source is None:
            return False
        self._standard = self._standard or group
        standard = self._standard
        if group.reward_source == standard.reward_source:
            return True
        if policy == "drop_group" and standard.reward_source == "given":
            return False
        if policy == "no_rewards":
            self._keeps_rewards = False
            self._writer.drop_rewards()
            return True
        raise UserError(
            f"{group.where}: {REWARDS_ARE[group.reward_source]}, but {standard.where}: "
            f"{REWARDS_ARE[standard.reward_source]}. missing_reward=no_rewards stores none, missing_reward=drop_group "
            "leaves out the groups without (if the first group has them)"
        )

    def finish(self) -> Manifest:
        dropped = dict(sorted(self._dropped.items()))
        if not len(self._writer):
            raise UserError(f"input '{self._config.input}': no group is left to store; dropped: {dropped or 'none'}")
        source = self._standard.reward_source if self._standard is not None else None
        return self._writer.finish(
            reward_source=source or "given", dropped=dropped, boundary_merges=self._boundary_merges
        )


REWARDS_ARE: dict[RewardSource | None, str] = {
    None: "rewards are missing",
    "given": "there are rewards",
    "preference": "there is only chosen over rejected, no reward",
}
