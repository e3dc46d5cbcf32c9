"""`rpo prepare`: raw preference data to a store.

    rpo prepare input=data.jsonl.gz output_prefix=data/train tokenizer=models/llama

1. Read rows (readers.py), in chunks.
2. In the worker processes (workers.py): find each row's layout (layouts.py), tokenize all of a chunk (chat.py, with
   fast.py where that gives the same tokens), apply the policies on empty, duplicate, too long and single responses
   (chunk.py).
3. In this process, in the order of the input: the policy on missing rewards (collector.py), then write (writer.py).
4. Every few seconds: write down how far this has come (journal.py). Started again after an interruption with the same
   arguments, the program goes on from there.

The store depends neither on the number of workers nor on interruptions. Wrong input leaves nothing behind.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, islice

from rpo_megatron import __version__
from rpo_megatron.config_verbs import PrepareConfig
from rpo_megatron.data import fast
from rpo_megatron.data.chat import Chat
from rpo_megatron.data.collector import Collector, CollectorState
from rpo_megatron.data.journal import Checkpoint, Journal, locked
from rpo_megatron.data.layouts import check_columns, parse_row
from rpo_megatron.data.manifest import Manifest
from rpo_megatron.data.progress import Progress
from rpo_megatron.data.readers import RawRow, Source
from rpo_megatron.data.template import load_template, template_info
from rpo_megatron.data.tokenizer import Tokenizer
from rpo_megatron.data.workers import WorkersKilledError, chunk_results
from rpo_megatron.data.writer import StoreWriter
from rpo_megatron.errors import UserError

JOURNAL_SECONDS = 10.0
"""At most so much work is lost with an interruption."""
SAMPLE_ROWS = 1000
"""The fast tokenizer has to agree with the normal one on so many rows, or ..."""
SAMPLE_BYTES = 1 << 23
"""... on so much of the input."""


def prepare(config: PrepareConfig) -> None:
    """Raises UserError, naming file and line or the key of the config, for anything that is wrong with the input; what
    stood at output_prefix before is then still there."""
    check_columns(config.columns)
    tokenizer = Tokenizer(config.tokenizer)
    chat = Chat(tokenizer, load_template(config.chat_template, tokenizer))
    source = Source(config.input, split=config.split)
    with locked(config.output_prefix):
        opening = choose_tokenizer(config, chat, islice(source, config.limit))
        print(opening.note)
        journal = Journal(config.output_prefix, _identity(config, source, chat))
        manifest = _write(config, opening, journal)
        journal.remove()
    print("\n".join(report(config.output_prefix, manifest, columns=list(config.columns.extra))))


def _write(config: PrepareConfig, opening: "Opening", journal: Journal) -> Manifest:
    chat, start = opening.chat, journal.load()
    with StoreWriter(
        config.output_prefix,
        tokenizer=chat.tokenizer.info,
        template=template_info(chat.template),
        resume=start.writer if start else None,
    ) as writer:
        collector = Collector(config, writer, start.collector if start else CollectorState())
        try:
            _collect(config, opening, collector, journal, start)
            return collector.finish()
        except BaseException as error:
            if isinstance(error, UserError) and not isinstance(error, WorkersKilledError):
                writer.abort()
                journal.remove()
            elif journal.exists:
                print(f"{config.output_prefix}: interrupted; the same command goes on from here", file=sys.stderr)
            raise


def _collect(
    config: PrepareConfig, opening: "Opening", collector: Collector, journal: Journal, start: Checkpoint | None
) -> None:
    num_rows = start.rows if start else 0
    rows = islice(opening.rows, num_rows, None)
    saved_at = time.monotonic()
    with (
        Progress(unit="row", limit=config.limit, done=num_rows) as progress,
        closing(chunk_results(config, opening.chat, rows, use_fast=opening.use_fast)) as results,
    ):
        for done in results:
            collector.add(done.result)
            num_rows += done.num_rows
            progress.advance(done.num_rows, fraction=done.fraction)
            if time.monotonic() - saved_at >= JOURNAL_SECONDS:
                journal.save(rows=num_rows, writer=collector.sync(), collector=collector.state)
                saved_at = time.monotonic()


def _identity(config: PrepareConfig, source: Source, chat: Chat) -> dict[str, str]:
    """All that the content of the store follows from; in what order processes work, and how fast, is not part of it."""
    knobs = {name: json.dumps(value) for name, value in asdict(config).items() if name not in NO_MATTER}
    tokenizer, template = chat.tokenizer.info, template_info(chat.template)
    return knobs | {
        "input (size or time of a file)": json.dumps(source.identity),
        "tokenizer": json.dumps(tokenizer.fingerprints),
        "chat template": template.fingerprint,
        "version of rpo_megatron": __version__,
    }


NO_MATTER = {"output_prefix", "tokenizer", "workers", "fast_tokenizer"}


# ------------------------------------------------------------------------------------------------ which tokenizer


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The rows, still all of them, and what tokenizes them."""

    rows: Iterator[RawRow]
    chat: Chat
    use_fast: bool
    note: str


def choose_tokenizer(config: PrepareConfig, chat: Chat, rows: Iterator[RawRow]) -> Opening:
    """Raises UserError when fast_tokenizer=always cannot be had."""
    wish = config.fast_tokenizer
    if wish == "never" or (wish == "auto" and not fast.is_installed()):
        why = "fast_tokenizer=never" if wish == "never" else "for a faster one: pip install 'rpo_megatron[fast]'"
        return Opening(rows=rows, chat=chat, use_fast=False, note=f"normal tokenizer ({why})")
    sample = _sample(rows)
    rows = chain(sample, rows)
    if wish == "auto" and len(sample) < SAMPLE_ROWS and sum(row.size for row in sample) < SAMPLE_BYTES:
        note = "normal tokenizer (too few rows for a faster one to pay)"
        return Opening(rows=rows, chat=chat, use_fast=False, note=note)
    choice = fast.choose(wish, chat.tokenizer, _texts(config, chat, sample))
    fast_chat = Chat(chat.tokenizer, chat.template, encode=choice.encode)
    return Opening(rows=rows, chat=fast_chat, use_fast=choice.encode is not None, note=choice.note)


def _sample(rows: Iterator[RawRow]) -> list[RawRow]:
    sample: list[RawRow] = []
    size = 0
    while len(sample) < SAMPLE_ROWS and size < SAMPLE_BYTES and (row := next(rows, None)) is not None:
        sample.append(row)
        size += row.size
    return sample


def _texts(config: PrepareConfig, chat: Chat, rows: list[RawRow]) -> Iterator[str]:
    for row in rows:
        try:
            group = chat.lay_out(parse_row(row.decode(), where=row.where, columns=config.columns))
        except UserError:
            return  # the same error comes again, in its turn
        yield from group.texts


# ------------------------------------------------------------------------------------------------ what is printed


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
