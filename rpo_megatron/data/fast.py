"""The package gigatoken in place of the normal tokenizer, where both give the same tokens.

It knows most byte-level and sentencepiece-like BPE tokenizers and is many times faster. Before it is used it has to
agree with the normal one, token for token, on the start of the real input and on a list of hard texts (probes.py);
otherwise the normal one does the work, and the reason is printed.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from rpo_megatron.data.probes import PROBES, probe_texts
from rpo_megatron.data.tokenizer import ANCHORS, EncodedTexts, Encoder, Tokenizer
from rpo_megatron.errors import UserError

PACKAGE = "gigatoken"
TEXTS_PER_CALL = 1024
FEW_CHARACTERS = 1 << 13
"""Lists are made in less time than the arrays of the package awkward, for texts of so many characters."""
SHOWN = 60
"""Characters of a text that a message shows."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    encode: Encoder | None
    """None: the normal tokenizer does it."""
    note: str
    """What was chosen and why, for the log."""


class UnusableError(Exception):
    """Why gigatoken cannot be used."""


def choose(wish: Literal["auto", "always"], tokenizer: Tokenizer, texts: Iterable[str]) -> Choice:
    """The fast tokenizer, if it agrees with `tokenizer` on `texts` and on the probes.

    Raises UserError when it cannot be used although the wish is `always`.
    """
    try:
        encode = load_fast(tokenizer)
        count = verify(encode, tokenizer, texts)
    except UnusableError as why:
        if wish == "always":
            raise UserError(f"fast_tokenizer=always: {why}; say fast_tokenizer=auto to go on without") from None
        return Choice(encode=None, note=f"normal tokenizer: {why}")
    version = importlib.metadata.version(PACKAGE)
    return Choice(encode=encode, note=f"fast tokenizer: {PACKAGE} {version}, verified on {count:,} texts")


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def load_fast(tokenizer: Tokenizer) -> Encoder:
    """Raises UnusableError when gigatoken is not installed or does not know this kind of tokenizer."""
    if not is_installed():
        raise UnusableError(f"{PACKAGE} is not installed (pip install 'rpo_megatron[fast]')")
    definition = tokenizer.definition
    if definition is None:
        raise UnusableError("this tokenizer is neither a tokenizer.json nor a sentencepiece model")
    cls = importlib.import_module(PACKAGE).Tokenizer
    try:
        library = cls.from_json(definition) if isinstance(definition, str) else cls.from_sentencepiece(definition)
    except Exception as error:  # whatever it is: this tokenizer is not for it
        raise UnusableError(f"{PACKAGE} does not support this tokenizer ({_first_line(error)})") from None
    return _encoder(library)


def verify(encode: Encoder, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """The number of texts compared. Raises UnusableError at the first that the two cut differently."""
    hard = [*probe_texts(tokenizer.special_tokens), *(anchor + text for anchor in ANCHORS for text in PROBES)]
    count = 0
    for part in (hard, *_parts(texts)):
        try:
            found = encode(part)
        except Exception as error:
            raise UnusableError(f"{PACKAGE} fails on the start of this input ({_first_line(error)})") from None
        expected = EncodedTexts.of_lists(tokenizer.encode(part))
        if not found.equals(expected):
            raise UnusableError(f"{PACKAGE} gives other tokens: {_first_difference(part, found, expected)}")
        count += len(part)
    return count


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while part := list(islice(rest, TEXTS_PER_CALL)):
        yield part


def _first_difference(texts: list[str], found: EncodedTexts, expected: EncodedTexts) -> str:
    for text, ours, theirs in zip(texts, expected.lists(), found.lists(), strict=True):
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if ours != theirs:
            at = min(len(ours), len(theirs)) if at is None else at
            return f"{theirs[at : at + 4]} for {ours[at : at + 4]} at token {at} of {text[:SHOWN]!r}"
    return f"{len(found.border_N) - 1} texts for {len(texts)}"


def _encoder(library: Any) -> Encoder:
    def encode(texts: list[str]) -> EncodedTexts:
        # parallel=False: several processes share the cores
        if sum(map(len, texts)) < FEW_CHARACTERS:
            return EncodedTexts.of_lists(library.encode_batch_list(texts, parallel=False))
        layout = library.encode_batch(texts, parallel=False).layout
        ids_T, border_N = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
        return EncodedTexts(ids_T=ids_T.view(np.int32), border_N=border_N.astype(np.int64, copy=False))

    return encode
