"""Byte-level BPE with a dictionary of words: the same tokens as the tokenizers library, in less than half its time.

1. A text is cut at special tokens, then by the tokenizer's own regular expression, into pieces ("words").
2. The library tokenizes each piece for itself, so that a piece always gets the same tokens: those of a piece that was
   seen before are looked up, others are asked of the library's model.

Python's `re` takes the place of the library's engine, and must cut alike. So a pattern may hold only what both read in
the same way (pattern_of), and character classes list the characters that the library itself counts to them. A text
with more characters than are listed, and every tokenizer of another kind, goes to the library.
"""

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from rpo_megatron.data.probes import probe_texts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the library's ByteLevel cuts by when it is not told otherwise."""
MOST_WORDS = 1 << 18
"""Then the dictionary starts anew: memory is bounded."""
LONGEST_WORD = 64
"""In characters; longer ones hardly come again."""
MOST_CHARACTERS, MOST_PATTERNS = 1 << 13, 64
"""Of the character classes, and how often they are made anew for characters that were not seen before."""
ASCII = frozenset(map(chr, range(128)))

SYNTAX = re.compile(
    r"(?P<fold>\(\?i:[a-z'|]+\))"
    r"|(?P<open>\(\?[:!])|(?P<close>\))|(?P<bar>\|)"
    r"|\[(?P<negated>\^?)(?P<members>(?:\\p\{\w+\}|\\s|\\[rnt]|\\[^\w\s]|[^\\\[\]&^-])+)\]"
    r"|(?P<property>\\p\{\w+\}|\\s)|(?P<other>\\S)"
    r"|(?P<repeat>(?:\{\d+(?:,\d*)?\}|[?*+])(?![?*+{]))"
    r"|(?P<literal>\\[rnt]|\\[^\w\s]|[^\\\[\](){}?*+.^$|])"
)
"""All that a pattern may be made of."""
MEMBER = re.compile(r"\\p\{\w+\}|\\s|\\?.", re.DOTALL)


class WordEncoder:
    """Texts to the tokens that one tokenizer of the library gives them, without those it would add."""

    def __init__(self, library: Any, pattern: str, added: dict[str, int]) -> None:
        self._library = library
        self._added = {text: _bytes([i]) for text, i in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self._words: dict[str, bytes] = {}
        self._classes = _Classes(pattern, ASCII)
        self._num_patterns = 1

    @property
    def is_usable(self) -> bool:
        """Whether the library agrees, on every pair of ASCII characters and on the probes."""
        pairs = ["".join(a + b for b in sorted(ASCII)) for a in sorted(ASCII)]
        texts = [*pairs, *probe_texts(self._added)]
        return self._classes.pattern.match("") is None and self.encode(texts) == self._ask(texts)

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text as int32. Raises UnicodeEncodeError for half a surrogate pair."""
        self._learn_characters(texts)
        found = [self._encode(text) for text in texts]
        unknown = [i for i, ids in enumerate(found) if ids is None]
        asked = iter(self._ask([texts[i] for i in unknown]))
        return [next(asked) if ids is None else ids for ids in found]

    def _ask(self, texts: list[str]) -> list[bytes]:
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [_bytes(encoding.ids) for encoding in encodings]

    def _learn_characters(self, texts: list[str]) -> None:
        new = set(chain.from_iterable(text for text in texts if not text.isascii())) - self._classes.known
        if new:
            "".join(new).encode()  # raises
        wanted = {c for c in new if not any(folded.isascii() for folded in c.casefold() + c.lower() + c.upper())}
        if wanted and self._num_patterns < MOST_PATTERNS and len(self._classes.known) + len(new) <= MOST_CHARACTERS:
            self._classes = _Classes(self._classes.source, self._classes.known | wanted)
            self._num_patterns += 1

    def _encode(self, text: str) -> bytes | None:
        """None when it is the library's to do."""
        if not (text.isascii() or self._classes.known.issuperset(text)):
            return None
        if self._added_pattern is None:
            return self._encode_plain(text)
        ids: list[bytes] = []
        for i, part in enumerate(self._added_pattern.split(text)):
            found = self._added[part] if i % 2 else self._encode_plain(part)
            if found is None:
                return None
            ids.append(found)
        return b"".join(ids)

    def _encode_plain(self, text: str) -> bytes | None:
        """Of a text without special tokens."""
        pieces = self._classes.pattern.findall(text)
        try:
            ids = b"".join(map(self._words.__getitem__, pieces))
        except KeyError:
            ids = b"".join(map(self._learned, pieces))
        return ids if sum(map(len, pieces)) == len(text) else None

    def _learned(self, piece: str) -> bytes:
        ids = self._words.get(piece)
        if ids is not None:
            return ids
        tokens = self._library.model.tokenize(piece.encode().decode("latin-1").translate(BYTE_LEVEL))
        ids = _bytes([token.id for token in tokens])
        if len(self._words) >= MOST_WORDS:
            self._words.clear()
        if len(piece) <= LONGEST_WORD:
            self._words[piece] = ids
        return ids


class _Classes:
    """A pattern of the library for Python, good for texts of known characters only."""

    def __init__(self, source: str, known: frozenset[str]) -> None:
        self.source, self.known = source, known
        self.pattern = re.compile(pattern_of(source, known))


def word_encoder(library: Any) -> WordEncoder | None:
    """For a tokenizers.Tokenizer, or None if it is not of a kind that this serves."""
    kind = Definition.read(library.to_str())
    source = kind.source
    one_pass = len({token.normalized for token in kind.added_tokens}) < 2 and not library.encode_special_tokens
    if source is None or kind.normalizer is not None or not (kind.is_plain_bpe and one_pass):
        return None
    try:
        encoder = WordEncoder(library, source, {token.content: token.id for token in kind.added_tokens})
    except (NotSharedError, re.error):
        return None
    return encoder if encoder.is_usable else None


# ------------------------------------------------------------------------------------------------ kinds of tokenizers


class AddedToken(msgspec.Struct):
    """Of a tokenizer.json."""

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


class _Model(msgspec.Struct):
    type: str
    dropout: float | None = None


class Definition(msgspec.Struct):
    """What counts of a tokenizer.json as the library writes it."""

    added_tokens: list[AddedToken]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    model: _Model

    @classmethod
    def read(cls, text: str) -> "Definition":
        return msgspec.json.decode(text, type=cls)

    @property
    def is_plain_bpe(self) -> bool:
        """Always the same tokens, and added ones are found by their text alone, whatever stands beside them."""
        looks_around = any(token.single_word or token.lstrip or token.rstrip for token in self.added_tokens)
        return self.model.type == "BPE" and not self.model.dropout and not looks_around

    @property
    def source(self) -> str | None:
        """The regular expression that cuts, if that is all that happens before bytes become characters."""
        whole = self.pre_tokenizer or {"type": "Sequence", "pretokenizers": []}
        steps = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
        if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
            return None
        *splits, last = steps
        if not splits:
            return GPT2 if last["use_regex"] else None
        [split, *more] = splits
        usual = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
        return split["pattern"].get("Regex") if usual and not more and not last["use_regex"] else None


# ------------------------------------------------------------------------------------------------ patterns


class NotSharedError(Exception):
    """A pattern holds something that the two engines might read differently."""


def pattern_of(source: str, known: Iterable[str]) -> str:
    """The library's regular expression for Python; a class lists those of the `known` characters that are in it.

    Raises NotSharedError for a pattern that this does not know how to translate.
    """
    known = sorted(known)
    parts = []
    at = 0
    while at < len(source):
        match = SYNTAX.match(source, at)
        if match is None:
            raise NotSharedError(source[at : at + 20])
        if match["members"]:
            parts.append(f"[{match['negated']}{_members(match['members'], known)}]")
        elif match["property"]:
            parts.append(f"[{_members(match['property'], known)}]")
        elif match["other"]:
            parts.append(f"[^{_members(chr(92) + 's', known)}]")
        else:
            parts.append(match[0])
        at = match.end()
    return "".join(parts)


def _members(text: str, known: list[str]) -> str:
    """What stands between the brackets of a class."""
    found: list[str] = []
    for member in MEMBER.findall(text):
        if member.startswith("\\p") or member == "\\s":
            found += map(re.escape, _in_class(member, known))
        else:
            found.append(member)
    return "".join(found) or "\uffff"


def _in_class(name: str, characters: list[str]) -> list[str]:
    """Those that the library's own engine finds in the class."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    outside = Split(Regex(name), "removed")
    return [c for c in characters if not outside.pre_tokenize_str(c)]


def _byte_level() -> dict[int, str]:
    """Byte -> the printable character that stands for it in a byte-level vocabulary (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()


def _bytes(ids: list[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()
