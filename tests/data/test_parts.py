"""A text that is cut at a safe place has the tokens that it has in one piece."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.parts import PATTERNS, first_safe_place, has_safe_places, last_safe_place
from rpo_megatron.data.probes import PROBES
from rpo_megatron.data.tokenizer import Tokenizer

WORDS = ["a", "Is", "n't", "'s", "'", "12", "3456", "?", "...", "é", "e\u0301", "\u0301", "日本", "\u00a0", "\u3000"]
PIECES = [*WORDS, " ", " ", "  ", "\n", "\r\n", "\t", "\x1f", "\x85", "<s>", "<|im_end|>", "<|im", "_end|>", "*" * 70]
TEXT = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)


def backend(pattern: str, *, normalizer: Any = None) -> Any:
    """A byte-level BPE whose merges run over white space and punctuation too: words alone keep them apart."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=["<s>", "<|im_end|>"], show_progress=False
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spaced = [a + between + b for a in WORDS for b in WORDS for between in ("", " ", "  ", "\n", " \n ")]
    library.train_from_iterator(spaced * 2, trainer)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, library.pre_tokenizer])
    library.normalizer = normalizer
    library.decoder = decoders.ByteLevel()
    return library


@pytest.fixture(scope="module")
def libraries() -> list[Any]:
    from tokenizers import normalizers

    composed = backend(max(PATTERNS, key=len), normalizer=normalizers.NFC())
    return [composed, *map(backend, sorted(PATTERNS))]


def encode(library: Any, *texts: str) -> list[int]:
    return [i for each in library.encode_batch(texts, add_special_tokens=False) for i in each.ids]


@settings(deadline=None, max_examples=200)
@given(text=TEXT)
def test_parts_have_the_tokens_of_the_whole(libraries: list[Any], text: str) -> None:
    """Every safe place of any text, in the library itself: a word, a token or a composed character that spans one."""
    for library in libraries:
        assert has_safe_places(library.to_str())
        whole = encode(library, text)
        for place in {first_safe_place(text), last_safe_place(text)}:
            assert encode(library, text[:place], text[place:]) == whole


def test_parts_of_hard_texts(libraries: list[Any]) -> None:
    """Of the probes, cut at each safe place in turn."""
    for library in libraries:
        for text in PROBES:
            rest, parts = text, []
            while rest:
                place = first_safe_place(rest)
                parts.append(rest[:place])
                rest = rest[place:]
            assert encode(library, *parts) == encode(library, text)


def test_places_by_hand() -> None:
    """Only between a visible ASCII character and a space."""
    assert last_safe_place("one two  three") == 7  # not between the two spaces
    assert first_safe_place("one two  three") == 3
    assert last_safe_place("one é x") == 3
    assert first_safe_place("é x y") == 3
    for text in ("", " ", " one", "one", "é one", "\n one", "日本 語"):
        assert last_safe_place(text) == 0
        assert first_safe_place(text) == len(text)


def change(tree: dict[str, Any], path: str, value: Any) -> str:
    *parents, last = path.split("/")
    changed = json.loads(json.dumps(tree))
    at = changed
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[last] = value
    return json.dumps(changed)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pre_tokenizer/pretokenizers/0/pattern/Regex", r"\S+\s*"),
        ("pre_tokenizer/pretokenizers/0/behavior", "Removed"),
        ("pre_tokenizer/pretokenizers/0/invert", True),
        ("pre_tokenizer/pretokenizers/1/add_prefix_space", True),
        ("added_tokens/1/lstrip", True),
        ("added_tokens/1/rstrip", True),
        ("added_tokens/1/single_word", True),
        ("added_tokens/1/content", "end of turn"),
        ("normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": "_"}),
        ("model/dropout", 0.1),
        ("model/type", "Unigram"),
    ],
)
def test_other_tokenizers_have_none(libraries: list[Any], path: str, value: Any) -> None:
    """Whatever might make a word depend on text beyond a space turns this off."""
    assert not has_safe_places(change(json.loads(libraries[1].to_str()), path, value))


def test_kinds_of_tokenizers(chat_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    """A byte-level BPE has safe places; sentencepiece, which joins words, has none."""
    assert has_safe_places(chat_tokenizer.definition)
    assert not has_safe_places(sentencepiece_tokenizer.definition)
