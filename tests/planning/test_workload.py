"""What groups ask of a model: by hand, and against lengths drawn at random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_megatron.data.manifest import NO_TEMPLATE, LengthHistogram, Manifest, TokenizerInfo
from rpo_megatron.planning.workload import given_lengths, manifest_lengths


def test_given_lengths_by_hand() -> None:
    """A prompt of 10 and 3 responses of 4 tokens. Shared: 22 tokens, 10^2 + 3 (14^2 - 10^2) = 388 pairs; repeated: 42
    tokens, 3 x 14^2 = 588 pairs. Catches a prompt that is counted for each response, or attention without it."""
    shared = given_lengths(prompt=10, response=4, responses=3, share_prompt=True)
    assert (shared.tokens, shared.pairs, shared.scored, shared.repeated_tokens) == (22, 388, 12, 42)
    assert shared.longest == 22
    repeated = given_lengths(prompt=10, response=4, responses=3, share_prompt=False)
    assert (repeated.tokens, repeated.pairs, repeated.scored, repeated.repeated_tokens) == (42, 588, 12, 42)
    assert repeated.longest == 42


def bucket(length: int) -> int:
    return 1 << max(length - 1, 0).bit_length()


def manifest(prompt_G: np.ndarray, response_GK: np.ndarray) -> Manifest:
    def histogram(lengths: np.ndarray) -> dict[int, int]:
        buckets = [bucket(int(length)) for length in lengths.ravel()]
        return {b: buckets.count(b) for b in sorted(set(buckets))}

    total_G = prompt_G + response_GK.sum(1)
    return Manifest(
        format=1,
        created_by="a test",
        tokenizer=TokenizerInfo(path="none", fingerprints={}, vocab_size=10, bos_id=None, eos_id=None),
        template=NO_TEMPLATE,
        groups=len(prompt_G),
        responses=response_GK.size,
        tokens=int(total_G.sum()),
        max_length=int((prompt_G + response_GK.max(1)).max()),
        responses_per_group={response_GK.shape[1]: len(prompt_G)},
        lengths=LengthHistogram(prompt=histogram(prompt_G), response=histogram(response_GK), total=histogram(total_G)),
        reward=None,
        dropped={},
        boundary_merges=0,
        files={},
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), mean=st.integers(30, 2000), responses=st.integers(2, 6), share_prompt=st.booleans())
def test_histogram_against_lengths(seed: int, mean: int, responses: int, share_prompt: bool) -> None:
    """Tokens are exact; scored tokens and pairs, which depend on where in its bucket a length is, come within 15 % for
    lengths of gamma distributions. Catches moments of the wrong bucket bounds."""
    rng = np.random.default_rng(seed)
    prompt_G = 1 + rng.gamma(3.0, mean / 3, size=2000).astype(int)
    response_GK = 1 + rng.gamma(2.0, mean / 4, size=(2000, responses)).astype(int)
    work = manifest_lengths(manifest(prompt_G, response_GK), prefix="p", share_prompt=share_prompt)
    whole_GK = prompt_G[:, None] + response_GK
    pairs_G = (whole_GK**2).sum(1) - (share_prompt * (responses - 1)) * prompt_G**2
    tokens_G = prompt_G + response_GK.sum(1) if share_prompt else whole_GK.sum(1)
    assert work.tokens == pytest.approx(tokens_G.mean(), rel=1e-9 if share_prompt else 0.15)
    assert work.scored == pytest.approx(response_GK.sum(1).mean(), rel=0.15)
    assert work.pairs == pytest.approx(pairs_G.mean(), rel=0.15)
    assert work.longest >= tokens_G.max()
    assert work.responses == responses
