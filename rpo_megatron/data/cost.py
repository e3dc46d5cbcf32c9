"""What groups take up and what they cost, from their lengths alone: what packing plans with.

The unit of cost is what one token costs in the layers' matrix multiplications. Three things add up:

    tokens    every token of the row, a shared prompt once
    pairs     (c + s)^2 - c^2 for a segment of s tokens that also attends to c tokens of a prompt: causal attention,
              twice its query-key pairs
    scored    response tokens: only they reach the output layer

Sums are sums of integers, so that every rank, on whatever processor, computes the same numbers and with them the same
plan. Shapes: G groups, S responses of all of them, one group after the other.
"""

from dataclasses import dataclass

import numpy as np

LAYERS_BACKWARD = 2.0
ATTENTION_BACKWARD = 2.5
"""Flash attention recomputes the scores of its two products: five products backward."""
OUTPUT_BACKWARD = 3.0
"""Logits are never kept: computed again, then the gradients of hidden states and weights."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Of one training step; moves the balance between ranks and rows, never a result."""

    per_pair: float
    """Of a unit of `pairs`, in tokens."""
    per_scored: float
    """Of a scored token, on top of its share as a token, in tokens."""


def transformer_cost(
    *, layers: int, hidden: int, ffn: int, query_width: int, key_width: int, output_width: int
) -> CostModel:
    """Of a decoder with gated feed-forward layers. `query_width` and `key_width`: heads (of keys and values: kv heads)
    times their size. `output_width`: the vocabulary, or 0 without an output layer."""
    token = layers * 2 * hidden * (2 * query_width + 2 * key_width + 3 * ffn) * (1 + LAYERS_BACKWARD)
    pair = layers * 2 * query_width * (1 + ATTENTION_BACKWARD)
    scored = 2 * hidden * output_width * (1 + OUTPUT_BACKWARD)
    return CostModel(per_pair=pair / token, per_scored=scored / token)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of groups, before they are packed."""

    tokens_G: np.ndarray
    """int64. What a group takes up in a row."""
    cost_G: np.ndarray
    """int64. What it costs, in tokens."""


def sizes_of(
    prompt_length_G: np.ndarray,
    num_responses_G: np.ndarray,
    response_length_S: np.ndarray,
    *,
    cost: CostModel,
    share_prompt: bool,
) -> Sizes:
    """Of groups (each with at least one response) whose responses share one copy of the prompt, or have one each."""
    starts_G = np.cumsum(num_responses_G) - num_responses_G
    whole_S = np.repeat(prompt_length_G, num_responses_G) + response_length_S
    scored_G = np.add.reduceat(response_length_S, starts_G)
    pairs_G = np.add.reduceat(whole_S * whole_S, starts_G)
    copies_G = num_responses_G
    if share_prompt:  # each response leaves out the square of the prompt, which is computed once
        pairs_G = pairs_G - (num_responses_G - 1) * prompt_length_G**2
        copies_G = np.ones_like(num_responses_G)
    tokens_G = copies_G * prompt_length_G + scored_G
    cost_G = np.rint(tokens_G + cost.per_pair * pairs_G + cost.per_scored * scored_G)
    return Sizes(tokens_G=tokens_G, cost_G=cost_G.astype(np.int64))
