"""Two libraries behind one interface, and identities that survive a re-saved file but not another vocabulary."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.data.tokenizer import (
    Tokenizer,
    encode_continuations,
    same_tokenizer,
    tokenizer_fingerprints,
)
from rpo_megatron.errors import UserError

TEXTS = ["Once upon a time", "one\n\ntwo  three", "é 日本 x", "", "a", "</s>", "well</s> then\n"]


def test_directory_facts(chat_tokenizer: Tokenizer) -> None:
    """BOS, EOS, size and template as the directory says; a tokenizer that adds no BOS must not get one."""
    assert chat_tokenizer.bos_id is None
    assert not chat_tokenizer.adds_bos
    assert chat_tokenizer.eos_id is not None
    assert chat_tokenizer.decode([chat_tokenizer.eos_id]) == "<|im_end|>"
    assert chat_tokenizer.chat_template is not None
    assert chat_tokenizer.special_names["eos_token"] == "<|im_end|>"
    assert {0, 1, 2} <= chat_tokenizer.turn_end_ids
    assert chat_tokenizer.info.vocab_size == chat_tokenizer.vocab_size > 256


def test_sentencepiece_facts(sentencepiece_tokenizer: Tokenizer) -> None:
    """<unk> = 0 cannot close a turn: a response that ends in an unknown character is not closed by it."""
    tokenizer = sentencepiece_tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    assert tokenizer.turn_end_ids == {1, 2}
    assert tokenizer.chat_template is None
    assert tokenizer.special_names == {"bos_token": "<s>", "eos_token": "</s>"}


def test_encode_decode(chat_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    """Text survives the round trip, special tokens included, and nothing is added."""
    for tokenizer in (chat_tokenizer, sentencepiece_tokenizer):
        for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
            assert tokenizer.decode(ids) == text
            assert "".join(tokenizer.pieces(ids)) == text
            assert len(tokenizer.pieces(ids)) == len(ids)


def test_special_tokens_in_text_are_one_token(chat_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    """Rendered templates write them out; as plain characters the model would never have seen them."""
    [ids] = chat_tokenizer.encode(["<|im_start|>user"])
    assert ids[0] == 1
    [ids] = sentencepiece_tokenizer.encode(["<s>one</s>two"])
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 1)


def test_continuation_has_no_extra_space(chat_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    """Sentencepiece puts a space before every text; in the middle of a conversation it is one token too many."""
    for tokenizer in (chat_tokenizer, sentencepiece_tokenizer):
        for text in ("France", " France", "\nFrance", "\n\n one", "0 1"):
            [before] = tokenizer.encode(["the capital of"])
            assert (
                tokenizer.decode(before + encode_continuations(tokenizer.encode, [text])[0]) == "the capital of" + text
            )


def test_pieces_join_split_characters(sentencepiece_tokenizer: Tokenizer) -> None:
    """A character of three byte tokens shows once, at the last of them, instead of three question marks."""
    [ids] = sentencepiece_tokenizer.encode(["a 日"])
    assert sentencepiece_tokenizer.pieces(ids)[-3:] == ["", "", "日"]


def test_half_a_surrogate_pair(chat_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    """JSON can hold "\\ud83d" alone; both libraries fail on it with a message about C++ types."""
    for tokenizer in (chat_tokenizer, sentencepiece_tokenizer):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode(["a \ud83d"])


def test_fingerprint_ignores_formatting_not_meaning(chat_directory: str, tmp_path: Path) -> None:
    """Another layout of the file, a version or merges written as strings is the same tokenizer; a swapped pair of ids
    is another one."""
    [(name, fingerprint)] = tokenizer_fingerprints(chat_directory).items()
    assert name == "tokenizer.json"
    tree = json.loads(Path(chat_directory, "tokenizer.json").read_text())
    tree["version"] = "2.0"
    tree["model"]["merges"] = [" ".join(merge) for merge in tree["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(tree.items())), indent=4))
    assert tokenizer_fingerprints(str(tmp_path)) == {name: fingerprint}

    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert tokenizer_fingerprints(str(tmp_path)) != {name: fingerprint}


def test_same_tokenizer() -> None:
    """True if any common file is equal, False if none, None if nothing can be compared."""
    a = {"tokenizer.json": "1", "tokenizer.model": "2"}
    assert same_tokenizer(a, {"tokenizer.model": "2"}) is True
    assert same_tokenizer(a, {"tokenizer.json": "9", "tokenizer.model": "2"}) is True
    assert same_tokenizer(a, {"tokenizer.model": "9"}) is False
    assert same_tokenizer({"tokenizer.json": "1"}, {"tokenizer.model": "2"}) is None


def test_bare_model_matches_a_directory_that_holds_it(sentencepiece_model: str, tmp_path: Path) -> None:
    """A store made from the .model file alone belongs to the model directory."""
    (tmp_path / "tokenizer.model").write_bytes(Path(sentencepiece_model).read_bytes())
    assert same_tokenizer(tokenizer_fingerprints(sentencepiece_model), tokenizer_fingerprints(str(tmp_path))) is True


def test_bad_paths(tmp_path: Path, chat_directory: str) -> None:
    """Each message names the path; a file that is no model, or a newer one, must not become a traceback of a library
    in another language."""
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer(str(tmp_path))
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(str(tmp_path / "x.model"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer(str(tmp_path))
    newer = shutil.copytree(chat_directory, tmp_path / "newer") / "tokenizer.json"
    newer.write_text(newer.read_text().replace('"type": "BPE"', '"type": "NEW"'))
    with pytest.raises(UserError, match=r"newer: transformers cannot load .*update"):
        Tokenizer(str(newer.parent))


def test_fingerprints_import_nothing_heavy(chat_directory: str) -> None:
    """`rpo train` compares fingerprints on every rank before it loads a weight."""
    script = (
        "import sys\nfrom rpo_megatron.data.tokenizer import tokenizer_fingerprints\n"
        "tokenizer_fingerprints(sys.argv[1])\n"
        "assert not {'torch', 'transformers', 'sentencepiece', 'datasets'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script, chat_directory], check=True)


def test_real_directory_and_its_model_agree(shared: Path) -> None:
    """A Llama directory and its sentencepiece model must give the same tokens."""
    directory = Tokenizer(str(shared / "models" / "stories260K"))
    model = Tokenizer(str(shared / "models" / "stories260K" / "tokenizer.model"))
    assert same_tokenizer(directory.fingerprints, model.fingerprints) is True
    assert (directory.bos_id, directory.eos_id, directory.adds_bos) == (model.bos_id, model.eos_id, model.adds_bos)
    assert directory.encode(TEXTS) == model.encode(TEXTS)
    assert encode_continuations(directory.encode, ["bar"]) == encode_continuations(model.encode, ["bar"])


def test_settings_of_the_file_do_not_shorten_texts(chat_directory: str, tmp_path: Path) -> None:
    """Many a tokenizer.json was saved with truncation and padding on; the library obeys them, transformers does not."""
    from tokenizers import Tokenizer as Library

    shutil.copytree(chat_directory, tmp_path / "t")
    library = Library.from_file(f"{chat_directory}/tokenizer.json")
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "t" / "tokenizer.json"))
    assert Tokenizer(str(tmp_path / "t")).encode(TEXTS) == Tokenizer(chat_directory).encode(TEXTS)


def test_library_that_differs_is_not_called(chat_directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of transformers that do more than the library below them, or have none."""
    from tokenizers import Tokenizer as Library

    expected = Tokenizer(chat_directory).encode(TEXTS)

    def other(self: Library, texts: list[str], **_: bool) -> Any:
        return self.encode_batch([text + "!" for text in texts])

    monkeypatch.setattr(Library, "encode_batch_fast", other)
    tokenizer = Tokenizer(chat_directory)
    assert tokenizer.encode(TEXTS) == expected
    assert tokenizer.definition is None
