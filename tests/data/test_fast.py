"""The fast tokenizer is used only where it gives the same tokens; which one was used never shows in the store."""

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpo_megatron.config_verbs import PrepareConfig
from rpo_megatron.data import fast
from rpo_megatron.data import prepare as prepare_module
from rpo_megatron.data.prepare import prepare
from rpo_megatron.data.probes import probe_texts
from rpo_megatron.data.store import Store
from rpo_megatron.data.tokenizer import Tokenizer
from rpo_megatron.errors import UserError

Change = Callable[[str, list[int]], list[int]]
ROWS = [
    {"prompt": f"what is {i} ", "chosen": f"one {i} two\n\n", "rejected": f"three<|im_end|>four {i % 7} "}
    for i in range(60)
]


class StandIn:
    """gigatoken's interface over the tokenizers library, with one change to what it gives."""

    change: Change = staticmethod(lambda text, ids: ids)
    calls = 0

    def __init__(self, library: Any) -> None:
        self.library = library

    @classmethod
    def from_json(cls, definition: str) -> "StandIn":
        from tokenizers import Tokenizer as Library

        return cls(Library.from_str(definition))

    @classmethod
    def from_sentencepiece(cls, definition: bytes) -> "StandIn":
        raise ValueError("only byte_fallback models are supported")

    def encode_batch(self, texts: list[str], *, parallel: bool) -> SimpleNamespace:
        ids = self.encode_batch_list(texts, parallel=parallel)
        offsets = np.cumsum([0, *map(len, ids)])
        content = np.array([i for row in ids for i in row], dtype=np.uint32)
        layout = SimpleNamespace(content=SimpleNamespace(data=content), offsets=SimpleNamespace(data=offsets))
        return SimpleNamespace(layout=layout)

    def encode_batch_list(self, texts: list[str], *, parallel: bool) -> list[list[int]]:
        assert not parallel
        type(self).calls += 1
        encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return [type(self).change(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """The package as far as the program sees it."""
    library = type("Library", (StandIn,), {})
    module = ModuleType("gigatoken")
    module.Tokenizer = library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    monkeypatch.setattr(fast, "is_installed", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    return library


@pytest.fixture
def run(tmp_path: Path, write_rows: Callable[..., str], chat_directory: str) -> Callable[..., Store]:
    def prepare_rows(rows: list[Any] = ROWS, **knobs: Any) -> Store:
        defaults = {"output_prefix": str(tmp_path / "store"), "tokenizer": chat_directory, "workers": 1}
        config = PrepareConfig(**{"input": write_rows(rows), **defaults, **knobs})
        prepare(config)
        return Store.open(config.output_prefix, verify=True)

    return prepare_rows


@pytest.mark.parametrize("chat_template", ["auto", "none"])
def test_the_same_store(
    run: Callable[..., Store], stand_in: type[StandIn], chat_template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With boundary merges, special tokens in the text and a chat template: not one byte depends on the tokenizer."""
    slow = run(chat_template=chat_template, fast_tokenizer="never")
    assert "normal tokenizer (fast_tokenizer=never)" in capsys.readouterr().out
    assert stand_in.calls == 0
    quick = run(chat_template=chat_template, fast_tokenizer="always")
    assert "fast tokenizer: gigatoken 0.0, verified on" in capsys.readouterr().out
    assert stand_in.calls > 2  # probes, sample and the rows themselves
    assert (slow.manifest.boundary_merges > 0) == (chat_template == "none")
    assert quick.manifest == slow.manifest


def swap_two(text: str, ids: list[int]) -> list[int]:
    return [ids[1], ids[0], *ids[2:]] if text.endswith("one 3 two\n\n") else ids


def merge_specials(text: str, ids: list[int]) -> list[int]:
    return ids[:1] * len(ids) if "<|im_end|>" in text else ids


def lose_one(text: str, ids: list[int]) -> list[int]:
    return ids[:-1] if "日" in text else ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_two, r"gigatoken gives other tokens: .* of ' one 3 two"),
        (merge_specials, r"gigatoken gives other tokens: .*<\|im_end\|>"),
        (lose_one, "gigatoken gives other tokens: .*日"),
    ],
)
def test_one_different_token_is_enough(
    run: Callable[..., Store],
    stand_in: type[StandIn],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    message: str,
) -> None:
    """In one text of the input, in special tokens only, in a script that the input lacks: the normal tokenizer does it
    all, and the text is named; fast_tokenizer=always stops."""
    monkeypatch.setattr(prepare_module, "SAMPLE_ROWS", 50)
    expected = run(fast_tokenizer="never", chat_template="none").fingerprint
    capsys.readouterr()
    stand_in.change = staticmethod(change)
    assert run(chat_template="none").fingerprint == expected
    out = capsys.readouterr().out
    assert out.startswith("normal tokenizer: gigatoken gives other tokens")
    with pytest.raises(UserError, match=rf"(?s)fast_tokenizer=always: {message}.*fast_tokenizer=auto"):
        run(fast_tokenizer="always", chat_template="none")


def test_small_input_is_not_worth_it(
    run: Callable[..., Store], stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    """Verifying takes as long as tokenizing the sample does."""
    run()
    assert "too few rows" in capsys.readouterr().out
    assert stand_in.calls == 0


def test_unsupported_and_failing(
    run: Callable[..., Store],
    stand_in: type[StandIn],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sentencepiece_model: str,
) -> None:
    """Whatever the package raises becomes a line, or the message of fast_tokenizer=always."""
    monkeypatch.setattr(prepare_module, "SAMPLE_ROWS", 50)
    run(tokenizer=sentencepiece_model)
    assert "does not support this tokenizer (only byte_fallback models are supported)" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not support this tokenizer"):
        run(tokenizer=sentencepiece_model, fast_tokenizer="always")

    def fail(text: str, ids: list[int]) -> list[int]:
        raise RuntimeError("no idea")

    stand_in.change = staticmethod(fail)
    run()
    assert "fails on the start of this input (no idea)" in capsys.readouterr().out


def test_errors_of_the_input_are_the_same(run: Callable[..., Store], stand_in: type[StandIn]) -> None:
    """The sample is read first; a bad row in it must neither be lost nor hide an earlier one."""
    rows = [*ROWS[:3], {"prompt": "x", "chosen": "", "rejected": "b"}, {"prompt": "half \ud83d", **ROWS[0]}, {"bad": 1}]
    with pytest.raises(UserError, match=r"rows\.jsonl:4: response 0 is empty"):
        run(rows, fast_tokenizer="always", empty_response="error")
    with pytest.raises(UserError, match=r"rows\.jsonl:6: no known layout"):
        run(rows, fast_tokenizer="always")


def test_not_installed(
    run: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """auto goes on and says what to install; on does not."""
    monkeypatch.setattr(fast, "is_installed", lambda: False)
    run()
    assert r"pip install 'rpo_megatron[fast]'" in capsys.readouterr().out
    with pytest.raises(UserError, match="gigatoken is not installed"):
        run(fast_tokenizer="always")


@pytest.mark.parametrize("kind", ["chat_directory", "sentencepiece_model"])
def test_the_real_package(request: pytest.FixtureRequest, kind: str) -> None:
    """Token for token on the probes, or refused by the verification: never different."""
    pytest.importorskip("gigatoken", reason="gigatoken is not installed: pip install 'rpo_megatron[fast]'")
    tokenizer = Tokenizer(request.getfixturevalue(kind))
    texts = probe_texts(tokenizer.special_tokens)
    choice = fast.choose("auto", tokenizer, texts)
    if kind == "chat_directory":
        assert choice.encode is not None, choice.note
    if choice.encode is not None:
        assert choice.encode(texts).lists() == tokenizer.encode(texts)
