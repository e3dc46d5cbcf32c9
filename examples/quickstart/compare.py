"""Step 8 of the quickstart: what two models answer to held-out prompts, and what the run measured.

    python examples/quickstart/compare.py BEFORE AFTER --store PREFIX --run RUN_DIR [--judged]

1. Take prompts from the held-out store: the very tokens that training saw.
2. Sample an answer of each model to each prompt, at temperature 1. Both are plain Hugging Face models here.
3. With --judged, let judge.py give every answer its reward; exit with 1 if the mean reward has not risen.
"""

import argparse
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import judge
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rpo_megatron.data.store import Store
from rpo_megatron.model.shape import read_shape

NUM_JUDGED, NUM_ASKED, NUM_SHOWN = 128, 16, 3
"""How many prompts are asked, with and without a judge, and how many answers are printed."""
NEW_TOKENS = 64
SEED = 1
LEAST_GAIN = 0.1
"""Of the mean reward, in [0, 1]. Its standard error is about 0.03: less might be chance."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    prompts: list[list[int]]
    """Token ids, of different lengths."""
    stops: list[int]
    """Tokens that end the answers of the data."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the answers of two models to held-out prompts.")
    parser.add_argument("before", help="Hugging Face directory")
    parser.add_argument("after", help="Hugging Face directory")
    parser.add_argument("--store", required=True, help="PREFIX of the held-out store")
    parser.add_argument("--run", required=True, type=Path, help="run directory, whose evaluations are shown")
    parser.add_argument("--judged", action="store_true", help="the prompts are questions that judge.py knows")
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    longest = read_shape(arguments.before).max_positions - NEW_TOKENS
    questions = read_questions(arguments.store, limit=NUM_JUDGED if arguments.judged else NUM_ASKED, longest=longest)
    prompts = decode(arguments.before, questions.prompts)
    before, after = ask(arguments.before, questions), ask(arguments.after, questions)
    table = evaluations(arguments.run / "metrics.jsonl")
    if not arguments.judged:
        print_samples(prompts, before, after)
        print_table(table)
        return 0
    rewards_before, rewards_after = rewards(prompts, before), rewards(prompts, after)
    print_samples(prompts, label(before, rewards_before), label(after, rewards_after))
    gained = [mean(rewards_before), mean(rewards_after)]
    perfect = [mean([float(reward == 1.0) for reward in column]) for column in (rewards_before, rewards_after)]
    print_table({**table, "reward": gained, "perfect answers": perfect})
    print(f"\nreward: the judge's (judge.py), mean over one answer to each of {len(prompts)} questions")
    return verdict(*gained)


# ------------------------------------------------------------------------------------------------ asking


def read_questions(prefix: str, *, limit: int, longest: int) -> Questions:
    """The first `limit` prompts of at most `longest` tokens."""
    store = Store.open(prefix)
    groups = [store.group(i) for i in range(len(store))]
    prompts = [group.prompt.tolist() for group in groups if group.prompt.size <= longest]
    stops = {int(response[-1]) for group in groups for response in group.responses}
    return Questions(prompts=prompts[:limit], stops=sorted(stops))


def ask(model_dir: str, questions: Questions) -> list[str]:
    """One sampled answer to each prompt, all in one batch, padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    width = max(map(len, questions.prompts))
    padding = questions.stops[0]
    inputs = torch.tensor([[padding] * (width - len(ids)) + ids for ids in questions.prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in questions.prompts])
    torch.manual_seed(SEED)
    outputs = model.generate(
        inputs,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # transformers would take the 50 most likely tokens only
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=questions.stops,
        pad_token_id=padding,
    )
    return decode(model_dir, outputs[:, width:].tolist())


def decode(model_dir: str, rows: list[list[int]]) -> list[str]:
    return AutoTokenizer.from_pretrained(model_dir).batch_decode(rows, skip_special_tokens=True)


def rewards(prompts: list[str], answers: list[str]) -> list[float]:
    return [judge.reward(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def evaluations(metrics: Path) -> dict[str, list[float]]:
    """Loss, accuracy and margin on the held-out store: before the first step and after the last."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    valid = [record for record in records if record["kind"] == "valid"]
    return {name: [valid[0][name], valid[-1][name]] for name in ("loss", "accuracy", "margin")}


# ------------------------------------------------------------------------------------------------ telling


def print_samples(prompts: list[str], before: list[str], after: list[str]) -> None:
    differing = [row for row in zip(prompts, before, after, strict=True) if row[1] != row[2]]
    print(f"\nThe two differ on {len(differing)} of {len(prompts)} held-out prompts (at temperature 1). The first:")
    for prompt, old, new in differing[:NUM_SHOWN]:
        print()
        for title, text in (("", prompt), ("before", old), ("after", new)):
            short = textwrap.shorten(text, 400, placeholder=" ...")
            print(textwrap.fill(short, 110, initial_indent=f"  {title:<8}", subsequent_indent=" " * 10))


def print_table(rows: dict[str, list[float]]) -> None:
    print(f"\n  {'on held-out prompts':<20}{'before':>10}{'after':>10}")
    for name, (before, after) in rows.items():
        print(f"  {name:<20}{round(before, 3) + 0.0:>10.3f}{round(after, 3) + 0.0:>10.3f}")  # + 0.0: no -0.000


def label(answers: list[str], rewards: list[float]) -> list[str]:
    return [f"[{reward:.1f}] {answer}" for answer, reward in zip(answers, rewards, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def verdict(before: float, after: float) -> int:
    if after < before + LEAST_GAIN:
        print(f"FAILED: the reward went from {before:.3f} to {after:.3f}; it should rise by at least {LEAST_GAIN}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
