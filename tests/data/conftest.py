"""Tiny tokenizers, trained in a second: a byte-level BPE in a Hugging Face directory and a sentencepiece model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.data.parts import LLAMA_3
from rpo_megatron.data.tokenizer import Tokenizer

CORPUS = [
    "Once upon a time there was a little dog who wanted to see the world.",
    "What is the capital of France? The capital of France is Paris, of course.",
    "Question: how are you? Answer: I am fine, thank you, and how are you?",
    "one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9",
    "Human: hello there\n\nAssistant: good morning\n\nHuman: name a colour\n\nAssistant: blue or red",
] * 8

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_bpe(
    pattern: str | None, *, vocab_size: int = 400, special_tokens: Sequence[str] = (), ignore_merges: bool = True
) -> Any:
    """A tokenizers.Tokenizer that cuts texts into words by the pattern, or without one by the library's own."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(ignore_merges=ignore_merges))
    steps: list[Any] = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


@pytest.fixture(scope="session")
def chat_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen-like tokenizer: byte-level BPE, ChatML template, <|im_end|> as EOS, no BOS."""
    from transformers import PreTrainedTokenizerFast

    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(None, special_tokens=special_tokens, ignore_merges=False),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    path = tmp_path_factory.mktemp("chat_tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A Llama-3-like tokenizer: its pre-tokenization, a BOS that templates write, not the tokenizer."""
    from transformers import PreTrainedTokenizerFast

    library = byte_level_bpe(LLAMA_3, special_tokens=["<s>", "</s>"])
    path = tmp_path_factory.mktemp("bos_tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return Tokenizer(str(path))


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama-like tokenizer: sentencepiece BPE with byte fallback, <s> = 1 before every text, </s> = 2."""
    from sentencepiece import SentencePieceTrainer

    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return f"{prefix}.model"


@pytest.fixture(scope="session")
def chat_tokenizer(chat_directory: str) -> Tokenizer:
    return Tokenizer(chat_directory)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_model: str) -> Tokenizer:
    return Tokenizer(sentencepiece_model)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines; returns the path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
