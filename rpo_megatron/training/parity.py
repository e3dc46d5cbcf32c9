"""Does transformers compute from an exported directory what our model computes? `rpo export ... verify=true`

1. A few random texts, two responses to each prompt, in one packed row.
2. Our model, in fp32 whatever the weights' precision, gives each response's log-probability (a reward model its value),
   under whatever layout runs.
3. The first process opens the directory with transformers in fp32 and does the same, one text at a time.
4. The largest difference must be rounding: LIMIT.

The first process needs memory for the whole model in fp32.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rpo_megatron.data.rows import build_row
from rpo_megatron.data.store import Group
from rpo_megatron.distributed import Groups, gather_objects, on_leader
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import Model
from rpo_megatron.model.shape import Head, ModelShape
from rpo_megatron.objectives.responses import Responses
from rpo_megatron.training.forward import run_responses, to_device

PROMPTS = 4
LONGEST = 48
"""Tokens of a prompt, and of a response, at most."""
SMALLEST_TOKEN = 3
"""Below are, as a rule, tokens for padding and the beginning and end of a text."""
LIMIT = 1e-4
"""Of the largest number."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What both made of the same texts."""

    ours: np.ndarray
    theirs: np.ndarray

    @property
    def difference(self) -> float:
        return float(np.abs(self.ours - self.theirs).max())

    @property
    def limit(self) -> float:
        return LIMIT * float(np.abs(self.theirs).max())

    def __str__(self) -> str:
        return (
            f"largest difference to transformers {self.difference:.1e} over {self.ours.size} responses of up to "
            f"{np.abs(self.theirs).max():.4g} (limit {self.limit:.1e})"
        )


def verify(model: Model, directory: str, groups: Groups) -> Parity:
    """Compare `model`, in fp32, with the Hugging Face `directory` that was made from it, on all ranks.

    Raises UserError when they differ by more than rounding.
    """
    texts = _texts(model.shape)
    ours = _our_numbers(model, texts, groups)
    theirs = on_leader(lambda: _their_numbers(directory, texts, head=model.shape.head))
    parity = Parity(ours=ours, theirs=theirs)
    if not parity.difference <= parity.limit:
        raise UserError(f"'{directory}': {parity}; do not use the files, and report this with the model's config.json")
    return parity


def _texts(shape: ModelShape) -> list[Group]:
    rng = np.random.default_rng(0)
    longest = min(LONGEST, shape.max_positions // 2)

    def tokens() -> np.ndarray:
        return rng.integers(SMALLEST_TOKEN, shape.vocab_size, size=rng.integers(1, longest + 1))

    return [Group(prompt=tokens(), responses=[tokens(), tokens()], reward=None, ref_logp=None) for _ in range(PROMPTS)]


def _our_numbers(model: Model, texts: list[Group], groups: Groups) -> np.ndarray:
    number = np.arange(len(texts))
    row = build_row(texts, ids=number, draws=np.zeros(len(texts)), multiple=groups.tp.size, share_prompt=True)
    answers = run_responses(model, [to_device(row, groups.device)], _number)
    found = [answer for part in gather_objects([answer.cpu().numpy() for answer in answers]) for answer in part]
    return found[0].flatten().astype(np.float64)


def _number(responses: Responses) -> torch.Tensor:
    number = responses.logp_GK if responses.value_GK is None else responses.value_GK
    assert number is not None
    return number


def _their_numbers(directory: str, texts: list[Group], *, head: Head) -> np.ndarray:
    import transformers

    kind = "AutoModelForSequenceClassification" if head == "value" else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32).eval()
    score = _value if head == "value" else _logp
    with torch.no_grad():
        return np.array([score(model, text.prompt, response) for text in texts for response in text.responses])


def _logp(model: Any, prompt: np.ndarray, response: np.ndarray) -> float:
    tokens = torch.from_numpy(np.concatenate([prompt, response]))[None]
    logp_1TV = model(tokens).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logp_1TV.gather(-1, tokens[:, len(prompt) :, None]).sum())


def _value(model: Any, prompt: np.ndarray, response: np.ndarray) -> float:
    return float(model(torch.from_numpy(np.concatenate([prompt, response]))[None]).logits.item())
