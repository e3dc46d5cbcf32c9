"""Chunks of rows through `prepare_chunk`, in several processes; results in the order of the rows."""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from threading import Thread

from rpo_megatron.config_verbs import PrepareConfig
from rpo_megatron.data.chat import Chat
from rpo_megatron.data.chunk import ChunkResult, prepare_chunk
from rpo_megatron.data.fast import load_fast
from rpo_megatron.data.readers import RawRow
from rpo_megatron.data.template import load_template
from rpo_megatron.data.tokenizer import Tokenizer
from rpo_megatron.errors import UserError

CHUNK_ROWS = 256
"""Rows that a worker gets at a time, at most ..."""
CHUNK_BYTES = 1 << 21
"""... and the size at which a chunk ends."""
FEW_CHUNKS = 8
"""So many are done in this process before others are started, which takes a few seconds each, ..."""
FEW_CHUNKS_FAST = 256
"""... and so many when they are done fast."""
CHUNKS_IN_FLIGHT = 4
"""Per worker: enough to keep it busy while the oldest chunk is written, few enough to bound memory."""


class WorkersKilledError(UserError):
    """Not the input's fault: what was done so far is good."""


@dataclass(frozen=True, kw_only=True)
class ChunkDone:
    num_rows: int
    fraction: float
    """Share of the input that is read once these rows are."""
    result: ChunkResult


def chunks_of(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Depends on the rows alone: a store must not depend on who works on what, or on where a run was interrupted."""
    chunk: list[RawRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.size
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def chunk_results(
    config: PrepareConfig, chat: Chat, rows: Iterator[RawRow], *, use_fast: bool
) -> Generator[ChunkDone, None, None]:
    """From this process, with `chat`; if there is much to do and config.workers is not 1, from that many others, which
    load a Chat of their own (`use_fast`: with the fast tokenizer)."""
    chunks = chunks_of(rows)
    workers = config.workers or _num_cores()
    for chunk in islice(chunks, None if workers == 1 else FEW_CHUNKS_FAST if use_fast else FEW_CHUNKS):
        yield _done(chunk, prepare_chunk(config, chat, chunk))
    first = next(chunks, None)
    if first is None:
        return
    # spawn, because forking a process whose libraries have started threads can deadlock
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        pending: deque[tuple[list[RawRow], Future[ChunkResult]]] = deque()
        try:
            for chunk in chain([first], chunks):
                pending.append((chunk, pool.submit(_work, config, use_fast, chunk)))
                if len(pending) >= workers * CHUNKS_IN_FLIGHT:
                    yield _next(pending)
            while pending:
                yield _next(pending)
        except BrokenProcessPool:
            raise WorkersKilledError(
                f"one of the {workers} tokenizing processes was killed, perhaps for want of memory: try fewer workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _next(pending: deque[tuple[list[RawRow], Future[ChunkResult]]]) -> ChunkDone:
    chunk, future = pending.popleft()
    return _done(chunk, future.result())


def _done(chunk: list[RawRow], result: ChunkResult) -> ChunkDone:
    return ChunkDone(num_rows=len(chunk), fraction=chunk[-1].fraction, result=result)


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
def _load_chat(tokenizer_path: str, chat_template: str, use_fast: bool) -> Chat:
    tokenizer = Tokenizer(tokenizer_path)
    encode = load_fast(tokenizer) if use_fast else None
    return Chat(tokenizer, load_template(chat_template, tokenizer), encode=encode)


def _work(config: PrepareConfig, use_fast: bool, rows: list[RawRow]) -> ChunkResult:
    return prepare_chunk(config, _load_chat(config.tokenizer, config.chat_template, use_fast), rows)
