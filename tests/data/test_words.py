"""The dictionary of words against the tokenizers library, token for token."""

import functools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data import words
from rpo_megatron.data.parts import LLAMA_3, QWEN_2
from rpo_megatron.data.probes import probe_texts
from rpo_megatron.data.words import GPT2, NotSharedError, WordEncoder, pattern_of, word_encoder
from tests.data.conftest import CORPUS, byte_level_bpe

GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|end|>", "<|end|>\n", "<|im_start|>"]


def tokenizer(pattern: str | None, **token: Any) -> Any:
    """Its special tokens are added behind the training, with these properties."""
    from tokenizers import AddedToken

    library = byte_level_bpe(pattern, vocab_size=420)
    library.add_special_tokens([AddedToken(text, **token) for text in SPECIAL])
    return library


def usable(library: Any) -> WordEncoder:
    found = word_encoder(library)
    assert found is not None
    return found


@functools.cache
def libraries() -> dict[str, Any]:
    patterns = {"gpt2": None, "llama": LLAMA_3, "qwen": QWEN_2, "4o": GPT_4O}
    return {name: tokenizer(pattern) for name, pattern in patterns.items()}


@functools.cache
def encoders() -> dict[str, WordEncoder]:
    return {name: usable(library) for name, library in libraries().items()}


def check(texts: list[str], encoders: dict[str, WordEncoder]) -> None:
    for name, library in libraries().items():
        expected = [e.ids for e in library.encode_batch_fast(texts, add_special_tokens=False)]
        found = [list(memoryview(ids).cast("i")) for ids in encoders[name].encode(texts)]
        assert found == expected, name


PIECE = st.one_of(
    st.sampled_from(
        [*SPECIAL, "one", "I'm", "DON'T", "'S", "'ſ", "12345", "\r\n", "  ", "\u2003", "é", "e\u0301", "日本"]
    ),
    st.text(max_size=4),
)


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.lists(PIECE, max_size=8).map("".join), min_size=1, max_size=6))
def test_equal_on_any_text(texts: list[str]) -> None:
    """A class of characters, a look-ahead, a case or a border of a special token that Python sees otherwise."""
    check(texts, encoders())


def test_equal_on_hard_and_on_much_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the dictionary is full, and with more characters than the classes may list."""
    monkeypatch.setattr(words, "MOST_WORDS", 50)
    monkeypatch.setattr(words, "MOST_CHARACTERS", 700)
    rng = random.Random(0)
    fresh = {name: usable(library) for name, library in libraries().items()}
    for start, stop in ((32, 127), (0x80, 0x250), (0x300, 0x600), (0x4E00, 0x5200), (0x1F300, 0x1F700)):
        alphabet = [" ", *map(chr, range(start, stop))]
        check(["".join(rng.choices(alphabet, k=40)) for _ in range(20)], fresh)
    check([*probe_texts(SPECIAL), *CORPUS], fresh)
    for encoder in fresh.values():
        assert len(encoder._words) <= 50
        assert len(encoder._classes.known) <= 700


def test_the_library_does_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that the pattern cuts as the library does must not be asked of it, those with a character that it folds
    must."""
    library = tokenizer(LLAMA_3)
    encoder = usable(library)
    asked: list[str] = []

    def ask(texts: list[str]) -> list[bytes]:
        asked.extend(texts)
        return [b""] * len(texts)

    monkeypatch.setattr(encoder, "_ask", ask)
    encoder.encode(["plain text", "wor\u0142d", "lon\u017f", "\u212a"])
    assert asked == ["lon\u017f", "\u212a"]  # these two are s and K when case does not count
    with pytest.raises(UnicodeEncodeError):
        encoder.encode(["half \ud83d"])


@pytest.mark.parametrize("key", ["single_word", "lstrip", "rstrip"])
def test_special_tokens_that_take_their_surroundings(key: str) -> None:
    """Cutting at their text alone would leave spaces that the library swallows."""
    assert word_encoder(tokenizer(LLAMA_3, **{key: True})) is None


def test_other_tokenizers_are_left_to_the_library() -> None:
    """A normalizer, a space in front, two cuts, a cut that drops what it finds, no cut, dropout: none is this kind."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    def with_parts(**parts: Any) -> Tokenizer:
        tree = json.loads(tokenizer(LLAMA_3).to_str())
        tree["model"] |= parts.pop("model", {})
        changed = Tokenizer.from_str(json.dumps(tree))
        for name, part in parts.items():
            setattr(changed, name, part)
        return changed

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    removed = pre_tokenizers.Split(Regex(LLAMA_3), "removed")
    assert word_encoder(with_parts()) is not None
    assert word_encoder(with_parts(normalizer=normalizers.NFC())) is None
    assert word_encoder(with_parts(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    assert word_encoder(with_parts(pre_tokenizer=pre_tokenizers.Sequence([split, split, level]))) is None
    assert word_encoder(with_parts(pre_tokenizer=pre_tokenizers.Sequence([removed, level]))) is None
    assert word_encoder(with_parts(pre_tokenizer=level)) is None
    assert word_encoder(with_parts(pre_tokenizer=pre_tokenizers.Sequence([]))) is None
    assert word_encoder(with_parts(pre_tokenizer=pre_tokenizers.Whitespace())) is None
    assert word_encoder(with_parts(model={"dropout": 0.1})) is None


UNSURE = (
    *(r"\p{L}+$", "^a", "a.b", "(a|b)", r"\w+", "a{2}+", "a{1,2}?", "a++"),
    *("[a[bc]]", "[a&&b]", "(?<=a)b", r"\P{L}", r"(?i:\p{L})"),
)


@pytest.mark.parametrize("pattern", UNSURE)
def test_patterns_that_two_engines_may_read_differently(pattern: str) -> None:
    """E.g. `$`, in Ruby's syntax also before every line break, and `a{2}+`, there the same as `(?:a{2})+`."""
    with pytest.raises(NotSharedError):
        pattern_of(pattern, "a")


def test_translation_by_hand() -> None:
    """Classes hold what is known of them, escaped; all else stays."""
    assert pattern_of(GPT2, "ab1] ") == (r"'s|'t|'re|'ve|'m|'ll|'d| ?[ab]+| ?[1]+| ?[^\ ab1]+|[\ ]+(?![^\ ])|[\ ]+")
    assert pattern_of(r"[^\r\n\p{L}]?\p{Lu}{1,3}", "a^") == "[^\\r\\na]?[\uffff]{1,3}"
