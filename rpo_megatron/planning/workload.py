"""What the groups of a store ask of a model on average, from lengths alone.

A store's manifest holds the exact number of tokens, groups and responses, and histograms of lengths in powers of two.
Inside a bucket lengths are taken as spread evenly, then all are scaled so that their sum is the exact one; prompts and
responses are taken as independent. Given lengths need no such assumption. Per group with a prompt of c tokens and
responses of s_1 .. s_K tokens:

    tokens   c + sum s           with a shared prompt; sum (c + s) without
    pairs    c^2 + sum ((c + s)^2 - c^2) ;  sum (c + s)^2        causal attention: twice its query-key pairs
    scored   sum s
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rpo_megatron.data.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Means over groups."""

    source: str
    """In words: where the lengths come from."""
    tokens: float
    pairs: float
    scored: float
    repeated_tokens: float
    """Of a row that repeats the prompt for each response: what `tokens` is compared with."""
    responses: float
    longest: int
    """Tokens of the longest group in a row, or a bound on it."""


def given_lengths(*, prompt: int, response: int, responses: int, share_prompt: bool) -> Workload:
    """Every group has `responses` responses of one length."""
    lengths = f"prompts of {prompt:,} tokens, {responses} responses of {response:,}"
    return _workload(
        lengths,
        prompt=(float(prompt), float(prompt) ** 2),
        response=(float(response), float(response) ** 2),
        responses=responses,
        longest=(prompt if share_prompt else prompt * responses) + response * responses,
        share_prompt=share_prompt,
    )


def manifest_lengths(manifest: Manifest, *, prefix: str, share_prompt: bool) -> Workload:
    """Those of a store."""
    prompt, response = _moments(manifest.lengths.prompt), _moments(manifest.lengths.response)
    responses = manifest.responses / manifest.groups
    scale = manifest.tokens / (manifest.groups * (prompt[0] + responses * response[0]))
    most, longest = max(manifest.responses_per_group), max(manifest.lengths.total)
    repeated = most * manifest.max_length
    return _workload(
        f"{prefix}: {manifest.groups:,} groups, {responses:.1f} responses each, {manifest.tokens:,} tokens",
        prompt=(prompt[0] * scale, prompt[1] * scale**2),
        response=(response[0] * scale, response[1] * scale**2),
        responses=responses,
        longest=min(longest, repeated) if share_prompt else repeated,
        share_prompt=share_prompt,
    )


def _workload(
    source: str,
    *,
    prompt: tuple[float, float],
    response: tuple[float, float],
    responses: float,
    longest: int,
    share_prompt: bool,
) -> Workload:
    """From mean and mean square of lengths."""
    (mean_c, square_c), (mean_s, square_s) = prompt, response
    tokens = mean_c + responses * mean_s
    repeated = responses * (mean_c + mean_s)
    pairs = responses * (2 * mean_c * mean_s + square_s) + (1 if share_prompt else responses) * square_c
    return Workload(
        source=source,
        tokens=tokens if share_prompt else repeated,
        pairs=pairs,
        scored=responses * mean_s,
        repeated_tokens=repeated,
        responses=responses,
        longest=longest,
    )


def _moments(histogram: Mapping[int, int]) -> tuple[float, float]:
    """Mean and mean square of lengths that are spread evenly over (b/2, b] in each bucket b: 3b/4 and 7b^2/12."""
    count = sum(histogram.values())
    mean = sum(n * (1.0 if b == 1 else 0.75 * b) for b, n in histogram.items()) / count
    square = sum(n * (1.0 if b == 1 else 7 * b * b / 12) for b, n in histogram.items()) / count
    return mean, square
