"""One tokenizer interface over a Hugging Face directory and a bare sentencepiece .model, and a cheap identity of both.

transformers and sentencepiece are imported when a tokenizer of their kind is loaded; `tokenizer_fingerprints` needs
neither.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from rpo_megatron.data.manifest import TokenizerInfo
from rpo_megatron.data.probes import probe_texts
from rpo_megatron.data.words import WordEncoder, word_encoder
from rpo_megatron.errors import UserError

ANCHORS = ("\n", "|", "0", "a")
"""Texts whose token rarely merges with what follows; see encode_continuations."""


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """Token ids of N texts, end to end (T in all)."""

    ids_T: np.ndarray
    """int32."""
    border_N: np.ndarray
    """int64[N + 1]; the ids of text i are ids_T[border_N[i] : border_N[i + 1]]."""

    @classmethod
    def of_lists(cls, ids: list[list[int]]) -> "EncodedTexts":
        border_N = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)), out=border_N[1:])
        return cls(ids_T=np.fromiter(chain.from_iterable(ids), np.int32, int(border_N[-1])), border_N=border_N)

    @classmethod
    def of_bytes(cls, ids: list[bytes]) -> "EncodedTexts":
        border_N = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)), out=border_N[1:])
        return cls(ids_T=np.frombuffer(b"".join(ids), np.int32), border_N=border_N // np.dtype(np.int32).itemsize)

    def equals(self, other: "EncodedTexts") -> bool:
        return np.array_equal(self.border_N, other.border_N) and np.array_equal(self.ids_T, other.ids_T)

    def as_bytes(self) -> list[bytes]:
        """The ids of each text, as bytes of int32."""
        raw, borders = self.ids_T.tobytes(), (self.border_N * self.ids_T.itemsize).tolist()
        return [raw[start:end] for start, end in pairwise(borders)]

    def lists(self) -> list[list[int]]:
        """The ids of each text."""
        ids, borders = self.ids_T.tolist(), self.border_N.tolist()
        return [ids[start:end] for start, end in pairwise(borders)]


Encoder = Callable[[list[str]], EncodedTexts]
"""Texts to token ids, without BOS or EOS. Raises UnicodeEncodeError for half a surrogate pair."""


class _Backend(Protocol):
    """What the two libraries are reduced to."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    adds_bos: bool
    special: dict[str, int]
    """Text of every special token -> id."""
    names: dict[str, str]
    """What a chat template may refer to: bos_token, eos_token, ..."""
    chat_template: str | None
    library: Any | None
    """A tokenizers.Tokenizer, if all the work is done by one."""

    def definition(self) -> str | bytes | None: ...
    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """Text to token ids and back. Special tokens that are written out in a text become one token each."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fingerprints = tokenizer_fingerprints(path)
        self._backend: _Backend = _HuggingFace(path) if Path(path).is_dir() else _SentencePiece(path)

    @property
    def vocab_size(self) -> int:
        """Added tokens included."""
        return self._backend.vocab_size

    @property
    def bos_id(self) -> int | None:
        return self._backend.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._backend.eos_id

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer by itself opens every text with its BOS. Some have a BOS that they never use."""
        return self._backend.adds_bos

    @cached_property
    def turn_end_ids(self) -> frozenset[int]:
        """Special tokens that can close a turn: all but the one for unknown text (unless it doubles as the EOS)."""
        backend = self._backend
        unknown = set() if backend.unk_id == backend.eos_id else {backend.unk_id}
        return frozenset(backend.special.values()) - unknown

    @property
    def special_tokens(self) -> list[str]:
        """Texts of the special tokens."""
        return list(self._backend.special)

    @property
    def definition(self) -> str | bytes | None:
        """The contents of a tokenizer.json (text) or of a sentencepiece model (bytes); None if it is neither."""
        return self._backend.definition()

    @property
    def special_names(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... -> their text, for chat templates."""
        return self._backend.names

    @property
    def chat_template(self) -> str | None:
        return self._backend.chat_template

    @property
    def info(self) -> TokenizerInfo:
        return TokenizerInfo(
            path=self.path,
            fingerprints=self.fingerprints,
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; no BOS or EOS is added. Raises UnicodeEncodeError for half a surrogate pair."""
        for text in texts:
            text.encode()  # both libraries fail on it in words that help nobody
        return self._backend.encode(texts)

    def encode_flat(self, texts: list[str]) -> EncodedTexts:
        """The same as two arrays, for many texts."""
        words = self._words
        return (
            EncodedTexts.of_lists(self.encode(texts)) if words is None else EncodedTexts.of_bytes(words.encode(texts))
        )

    @cached_property
    def _words(self) -> WordEncoder | None:
        return None if self._backend.library is None else word_encoder(self._backend.library)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens written out."""
        return self._backend.decode(ids)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text that each token adds to those before it; a character cut into bytes appears at its last token."""
        pieces = []
        start = end = 0  # ids[start:end] is the context that settles how the next token reads
        for i in range(len(ids)):
            before, text = self.decode(ids[start:end]), self.decode(ids[start : i + 1])
            if text.endswith("\ufffd"):
                pieces.append("")
                continue
            pieces.append(text[len(before) :])
            start, end = end, i + 1
        return pieces


Ids = TypeVar("Ids", list[int], bytes)
"""Of one text, as numbers or as the bytes of int32."""


def encode_continuations(encode: Callable[[list[str]], list[Ids]], texts: list[str]) -> list[Ids]:
    """Token ids of each text as it goes on after other text.

    On its own it would get the space that sentencepiece puts before every text. So it is encoded behind an anchor that
    stays a token of its own, and the anchor is taken off.
    """
    found: dict[int, Ids] = {}
    left: list[int] = list(range(len(texts)))
    for anchor in ANCHORS:
        if not left:
            break
        behind: list[str] = [anchor + texts[i] for i in left]
        encoded: list[Ids] = encode([anchor, *behind])
        alone = encoded[0]
        if alone:
            pairs = zip(left, encoded[1:], strict=True)
            found |= {i: ids[len(alone) :] for i, ids in pairs if ids[: len(alone)] == alone}
        left = [i for i in left if i not in found]
    if left:
        found |= zip(left, encode([texts[i] for i in left]), strict=True)
    return [found[i] for i in range(len(texts))]


class _HuggingFace:
    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # the tokenizers library has no class of its own for what it cannot read
            raise UserError(
                f"{path}: transformers cannot load a tokenizer from here: {error}; copy the directory again, or update "
                "transformers and tokenizers to the versions that wrote it"
            ) from None
        tokenizer = self._tokenizer
        self.vocab_size = len(tokenizer)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.unk_id: int | None = tokenizer.unk_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        added = tokenizer.added_tokens_decoder.items()
        self.special = {token.content: i for i, token in added if token.special}
        self.names = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        template = tokenizer.chat_template
        self.chat_template: str | None = template.get("default") if isinstance(template, dict) else template
        self.library: Any = _tokenizers_of(tokenizer)

    def definition(self) -> str | None:
        return None if self.library is None else self.library.to_str()

    def encode(self, texts: list[str]) -> list[list[int]]:
        if self.library is None:
            return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [encoding.ids for encoding in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _tokenizers_of(tokenizer: Any) -> Any | None:
    """The object of the tokenizers library beneath one of transformers, if the latter adds nothing to what it gives:
    called directly it takes a fifth less time."""
    if not tokenizer.is_fast:
        return None
    texts = probe_texts(tokenizer.all_special_tokens)
    expected = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    library = tokenizer.backend_tokenizer  # the call above has turned off padding and truncation in it
    found = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
    return library if found == expected else None


class _SentencePiece:
    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromFile(path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a sentencepiece model: {error}") from None
        processor = self._processor
        self.library: Any | None = None
        self.chat_template: str | None = None
        self.vocab_size = processor.get_piece_size()
        self.bos_id: int | None = None if processor.bos_id() < 0 else processor.bos_id()
        self.eos_id: int | None = None if processor.eos_id() < 0 else processor.eos_id()
        self.unk_id: int | None = processor.unk_id()
        self.adds_bos = self.bos_id is not None
        ids = range(self.vocab_size)
        self.special = {processor.id_to_piece(i): i for i in ids if processor.is_control(i) or processor.is_unknown(i)}
        pairs = (("bos_token", self.bos_id), ("eos_token", self.eos_id))
        self.names = {name: processor.id_to_piece(i) for name, i in pairs if i is not None}
        self._special_text = {i: text for text, i in self.special.items()}
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    def definition(self) -> bytes:
        return self._processor.serialized_model_proto()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The library reads a special token in a text as plain characters; here it is one token."""
        special = self.special
        parts = [self._special_pattern.split(text) for text in texts]
        ids = self._encode_plain([first for first, *_ in parts])
        plain = [part for _, *rest in parts for part in rest if part not in special]
        behind = iter(encode_continuations(self._encode_plain, plain))
        for i, (_, *rest) in enumerate(parts):
            for part in rest:
                ids[i] += [special[part]] if part in special else next(behind)
        return ids

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1) if texts else []

    def decode(self, ids: list[int]) -> str:
        """The library leaves special tokens out; here they are written out."""
        runs: list[list[int]] = [[]]
        specials: list[str] = [""]
        for i in ids:
            if i in self._special_text:
                specials.append(self._special_text[i])
                runs.append([])
            else:
                runs[-1].append(i)
        opens = 1 if ids[:1] == [self.bos_id] else 0  # this run has the space that stands before every text
        texts = [self._processor.decode(run) if i <= opens else self._decode_behind(run) for i, run in enumerate(runs)]
        return "".join(special + text for special, text in zip(specials, texts, strict=True))

    def _decode_behind(self, ids: list[int]) -> str:
        """Alone, a space before the first word would be taken for the one that stands before every text."""
        newline = list(self._processor.encode("\n"))
        return self._processor.decode(newline + ids)[len(self._processor.decode(newline)) :]


# ------------------------------------------------------------------------------------------------ identity


def tokenizer_fingerprints(path: str) -> dict[str, str]:
    """File name -> sha256, for those of `tokenizer.json` (its vocabulary, merges and added tokens) and
    `tokenizer.model` (its bytes) that a directory has; a bare .model file counts as a `tokenizer.model`.

    Raises UserError when there is neither.
    """
    root = Path(path)
    if root.is_file():
        return {"tokenizer.model": hashlib.sha256(root.read_bytes()).hexdigest()}
    if not root.is_dir():
        raise UserError(f"tokenizer '{path}' does not exist: give a Hugging Face directory or a sentencepiece .model")
    found = {}
    if (root / "tokenizer.json").is_file():
        found["tokenizer.json"] = _json_fingerprint(root / "tokenizer.json")
    if (root / "tokenizer.model").is_file():
        found |= tokenizer_fingerprints(str(root / "tokenizer.model"))
    if not found:
        raise UserError(
            f"{path}: neither tokenizer.json nor tokenizer.model in this directory; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes the former"
        )
    return found


def same_tokenizer(a: dict[str, str], b: dict[str, str]) -> bool | None:
    """Whether two `tokenizer_fingerprints` are of one tokenizer: True if any file that both have is equal, False if
    none is, None if they have no file in common (one has only a tokenizer.json, the other only a tokenizer.model)."""
    common = a.keys() & b.keys()
    return any(a[name] == b[name] for name in common) if common else None


def _json_fingerprint(path: Path) -> str:
    """Of what decides the meaning of a token id; the file also holds versions and formatting, which may change."""
    try:
        tree = json.loads(path.read_bytes())
        model = tree["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
        added = [[token["id"], token["content"]] for token in tree.get("added_tokens") or []]
        meaning = {"vocab": model["vocab"], "merges": merges, "added": added}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library; copy it again") from None
    return hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
