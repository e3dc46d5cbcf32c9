"""What groups take up and cost: by hand, and against a count of every product."""

import numpy as np
import pytest

from rpo_megatron.data.cost import CostModel, Sizes, sizes_of, transformer_cost

PROMPT_G, COUNT_G, RESPONSE_S = np.array([100, 7]), np.array([2, 3]), np.array([10, 30, 1, 2, 3])


def sizes(cost: CostModel, *, share_prompt: bool) -> Sizes:
    return sizes_of(PROMPT_G, COUNT_G, RESPONSE_S, cost=cost, share_prompt=share_prompt)


def test_sizes_by_hand() -> None:
    """Catches a cost that forgets the attention to a shared prompt, counts the prompt for every response, scores the
    prompt, or mixes up the groups."""
    cost = CostModel(per_pair=1.0, per_scored=1000.0)
    repeated = sizes(cost, share_prompt=False)
    assert repeated.tokens_G.tolist() == [240, 27]
    assert repeated.cost_G.tolist() == [240 + 110**2 + 130**2 + 40_000, 27 + 8**2 + 9**2 + 10**2 + 6000]
    shared = sizes(cost, share_prompt=True)
    assert shared.tokens_G.tolist() == [140, 13]
    assert shared.cost_G.tolist() == [
        140 + 100**2 + (110**2 - 100**2) + (130**2 - 100**2) + 40_000,
        13 + 7**2 + (8**2 - 7**2) + (9**2 - 7**2) + (10**2 - 7**2) + 6000,
    ]


def test_costs_are_whole_numbers() -> None:
    """Catches fractions: their sums depend on the order, and two ranks might disagree on a plan and wait for ever."""
    found = sizes(CostModel(per_pair=1 / 3, per_scored=1 / 7), share_prompt=True)
    assert found.cost_G.dtype == found.tokens_G.dtype == np.int64


def test_a_transformer_by_counting() -> None:
    """Catches a product left out or counted twice: forward and backward multiplications of a prompt of 5 and responses
    of 3 and 2 tokens, one by one, in a model with 2 layers."""
    layers, hidden, ffn, heads, kv_heads, head_dim, vocab = 2, 12, 20, 4, 2, 5, 31
    weights = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * ffn
    total = 3.0 * layers * weights * (5 + 3 + 2)
    for context, segment in ((0, 5), (5, 3), (5, 2)):
        squares = (context + segment) ** 2 - context**2  # keys seen, halved by causality: flash skips the other half
        total += layers * (2 + 5) * heads * head_dim * squares / 2
    total += 4 * hidden * vocab * (3 + 2)
    cost = transformer_cost(
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        query_width=heads * head_dim,
        key_width=kv_heads * head_dim,
        output_width=vocab,
    )
    pairs = 5**2 + (8**2 - 5**2) + (7**2 - 5**2)
    ours = 10 + cost.per_pair * pairs + cost.per_scored * 5
    assert ours * 3 * layers * weights == pytest.approx(total)


def test_a_value_head_costs_nothing() -> None:
    """Catches a reward model that is planned as if it had an output layer."""
    cost = transformer_cost(layers=1, hidden=8, ffn=8, query_width=8, key_width=8, output_width=0)
    assert cost.per_scored == 0
    assert cost.per_pair > 0
