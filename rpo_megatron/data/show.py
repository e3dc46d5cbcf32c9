"""`rpo inspect`: what is in a store, and a few groups decoded with their token borders.

rpo inspect data/train examples=1 first=17
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rpo_megatron.config_verbs import InspectConfig
from rpo_megatron.data.manifest import REWARD, Manifest
from rpo_megatron.data.store import Group, Store
from rpo_megatron.data.tokenizer import Tokenizer, same_tokenizer, tokenizer_fingerprints
from rpo_megatron.errors import UserError

BAR_WIDTH = 50
BORDER = "▏"
"""Stands between two tokens of a decoded text."""


def inspect(config: InspectConfig) -> None:
    """Raises UserError when the store or its tokenizer cannot be opened, or `first` is not in the store."""
    store = Store.open(config.prefix)
    if config.examples > 0 and not 0 <= config.first < len(store):
        raise UserError(f"first={config.first}: '{config.prefix}' has groups 0 to {len(store) - 1}")
    tokenizer = _tokenizer(config, store.manifest) if config.examples > 0 else None
    for line in _summary(store):
        print(line)
    if tokenizer is None:
        return
    for i in range(config.first, min(config.first + config.examples, len(store))):
        print("\n".join(_example(tokenizer, i, store.group(i), store.numbers(i))))


def _tokenizer(config: InspectConfig, manifest: Manifest) -> Tokenizer:
    path = config.tokenizer or manifest.tokenizer.path
    if not Path(path).exists():
        raise UserError(f"tokenizer '{path}' is not here: give tokenizer=PATH, or examples=0 for the counts alone")
    if same_tokenizer(tokenizer_fingerprints(path), manifest.tokenizer.fingerprints) is False:
        raise UserError(f"'{path}' is not the tokenizer that made '{config.prefix}'; give that one: tokenizer=PATH")
    return Tokenizer(path)


# ------------------------------------------------------------------------------------------------ summary


def _summary(store: Store) -> Iterator[str]:
    manifest = store.manifest
    tokenizer, template = manifest.tokenizer, manifest.template
    yield f"{store.prefix}  (format {manifest.format}, made by {manifest.created_by})"
    yield f"  groups          {manifest.groups:,}"
    yield f"  responses       {manifest.responses:,}"
    yield f"  tokens          {manifest.tokens:,}"
    yield f"  longest         {manifest.max_length:,} tokens (prompt + response)"
    yield f"  tokenizer       {tokenizer.path}"
    yield f"                  {tokenizer.vocab_size:,} entries, BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}"
    yield f"  chat template   {template.source} {template.fingerprint[:12]}".rstrip()
    yield f"  fingerprint     {store.fingerprint}"
    yield from _columns(store)
    yield from _reference(store)
    yield "  left out"
    yield from (f"    {count:>10,}  {reason}" for reason, count in manifest.dropped.items())
    yield f"    {manifest.boundary_merges:>10,}  boundary merges (kept: tokenized apart from their prompt)"
    yield from _histogram("responses per group", manifest.responses_per_group, prefix="")
    yield from _histogram("prompt length, tokens", manifest.lengths.prompt, prefix="<= ")
    yield from _histogram("response length, tokens", manifest.lengths.response, prefix="<= ")
    yield from _histogram("group length (prompt + all responses), tokens", manifest.lengths.total, prefix="<= ")


def _columns(store: Store) -> Iterator[str]:
    if not store.columns:
        yield "  rewards         none"
    for name, column in store.columns.items():
        numbers = column.statistics
        title = "rewards" if name == REWARD else f"column {name}"
        yield f"  {title:<15} {numbers.source}: mean {numbers.mean:.6g}, std {numbers.std:.6g}"
        yield f"{'':18}from {numbers.min:.6g} to {numbers.max:.6g}; all equal in {numbers.all_equal:.2%} of groups"
        yield from (f"{'':18}{key}: {value}" for key, value in sorted(column.identity.items()))


def _reference(store: Store) -> Iterator[str]:
    identity = store.reference_identity()
    if identity is None:
        yield "  reference       none stored"
        return
    yield "  reference       stored log-probabilities of"
    yield from (f"    {key}: {value}" for key, value in sorted(identity.items()))


def _histogram(title: str, counts: dict[int, int], *, prefix: str) -> Iterator[str]:
    yield f"  {title}"
    most = max(counts.values())
    for value, count in sorted(counts.items()):
        bar = "█" * max(1, round(BAR_WIDTH * count / most))
        yield f"    {prefix + str(value):>10}  {count:>10,}  {bar}"


# ------------------------------------------------------------------------------------------------ examples


def _example(tokenizer: Tokenizer, i: int, group: Group, numbers: dict[str, np.ndarray]) -> Iterator[str]:
    prompt = group.prompt.tolist()
    yield f"\n=== group {i}: prompt, {len(prompt)} tokens"
    yield BORDER.join(tokenizer.pieces(prompt))
    for k, response in enumerate(group.responses):
        columns = "".join(f", {name} {values_K[k]:.6g}" for name, values_K in numbers.items())
        yield f"--- group {i}: response {k}, {response.size} tokens{columns}"
        yield BORDER.join(tokenizer.pieces([*prompt, *response.tolist()])[len(prompt) :])
