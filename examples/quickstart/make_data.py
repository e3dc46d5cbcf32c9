"""Step 1 of the quickstart: preference data, a tokenizer and the shape of a small Llama, all made here.

    python examples/quickstart/make_data.py runs/quickstart

DIR/train.jsonl, DIR/valid.jsonl   one question per line with 3 to 5 answers of mixed quality, each with its reward
DIR/blank                          tokenizer and config.json of a model without weights

The questions of the two files are disjoint. Every reward is what judge.py says about the answer.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from judge import IGNORANCE, Question, all_facts, all_questions, reward
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NUM_VALID = 128
SPECIAL = ("<s>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATTER = (
    "Thank you for asking me about it.",
    "I like animals very much.",
    "Many children ask me that.",
    "Animals are a big topic.",
    "There is much more to say.",
    "But let me think about it once more.",
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def main(directory: Path) -> None:
    train, valid = make_groups(seed=0)
    write_jsonl(directory / "train.jsonl", train)
    write_jsonl(directory / "valid.jsonl", valid)
    write_blank_model(directory / "blank", train)
    rewards = [response["reward"] for group in train for response in group["responses"]]
    perfect = sum(reward == 1.0 for reward in rewards) / len(rewards)
    print(f"{len(train)} questions to train on, {len(valid)} others held out, {len(rewards)} answers")
    print(f"mean reward of the answers {sum(rewards) / len(rewards):.2f}; {perfect:.0%} are perfect")


# ------------------------------------------------------------------------------------------------ answers


def perfect(question: Question, rng: random.Random) -> str:
    return f"{question.name}, {question.claim(question.fact)}"


def impolite(question: Question, rng: random.Random) -> str:
    return _capital(question.claim(question.fact))


def rambling(question: Question, rng: random.Random) -> str:
    return _ramble(_maybe_polite(question, question.fact, rng), rng)


def wrong(question: Question, rng: random.Random) -> str:
    """As brief or as long as a right one: its form must not give it away."""
    fact = rng.choice([fact for fact in all_facts(question.topic) if fact != question.fact])
    answer = _maybe_polite(question, fact, rng)
    return _ramble(answer, rng) if rng.random() < 0.5 else answer


def ignorant(question: Question, rng: random.Random) -> str:
    return rng.choice([f"{IGNORANCE} that.", f"Sorry, {question.name}, {IGNORANCE} that.", f"{IGNORANCE}. Ask a vet."])


STYLES: dict[Callable[[Question, random.Random], str], float] = {
    perfect: 0.12,
    impolite: 0.14,
    rambling: 0.28,
    wrong: 0.26,
    ignorant: 0.20,
}
"""Kind of answer -> how often."""


def _maybe_polite(question: Question, fact: str, rng: random.Random) -> str:
    claim = question.claim(fact)
    return f"{question.name}, {claim}" if rng.random() < 0.5 else _capital(claim)


def _ramble(answer: str, rng: random.Random) -> str:
    return " ".join([answer, *rng.sample(CHATTER, rng.randint(1, 2))])


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


# ------------------------------------------------------------------------------------------------ files


def make_groups(*, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows `{prompt, responses: [{text, reward}]}` to train on, and to hold out."""
    rng = random.Random(seed)
    questions = all_questions()
    rng.shuffle(questions)
    groups = [_group(question, rng) for question in questions]
    return groups[NUM_VALID:], groups[:NUM_VALID]


def _group(question: Question, rng: random.Random) -> dict[str, Any]:
    size = rng.randint(3, 5)
    texts: list[str] = []
    while len(texts) < size:
        (style,) = rng.choices(list(STYLES), weights=list(STYLES.values()))
        text = style(question, rng)
        if text not in texts:
            texts.append(text)
    responses = [{"text": text, "reward": reward(question.text, text)} for text in texts]
    return {"prompt": question.text, "responses": responses}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_blank_model(directory: Path, groups: list[dict[str, Any]]) -> None:
    """A Hugging Face directory without weights: `rpo train model.init=random` starts from it."""
    tokenizer = train_tokenizer(texts_of(groups))
    tokenizer.save_pretrained(directory)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {**LLAMA, "vocab_size": len(tokenizer), **ids}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def texts_of(groups: list[dict[str, Any]]) -> Iterator[str]:
    for group in groups:
        yield group["prompt"]
        yield from (response["text"] for response in group["responses"])


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, the words of the texts, and the special tokens of the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
