"""The manifest of a store (PREFIX.json): what is in it, what made it, what was dropped on the way, checksums.

Small whatever the size of the store (no list per group), written last: a store without manifest does not open.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from rpo_megatron.data.indexed import PARTIAL, FileInfo
from rpo_megatron.errors import UserError

FORMAT = 1
"""Raised when a store of the older format can no longer be read."""

R = TypeVar("R")
REWARD = "reward"
"""Name of the column that the main manifest describes; every other is a sidecar with a manifest of its own."""
COLUMN_NAME = re.compile(r"[A-Za-z0-9_-]+")
RewardSource = Literal["given", "preference"]
"""`given`: rewards of the data. `preference`: pair data without rewards, where chosen counts 1 and rejected 0."""


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    path: str
    """Where the tokenizer lay when the store was made."""
    fingerprints: dict[str, str]
    """See tokenizer.tokenizer_fingerprints."""
    vocab_size: int
    """Added tokens included."""
    bos_id: int | None
    eos_id: int | None


@dataclass(frozen=True, kw_only=True)
class TemplateInfo:
    source: str
    """`none` (plain text), `tokenizer` (the tokenizer's own), or the path of the template file."""
    fingerprint: str
    """sha256 of the template's text; empty for `none`."""


NO_TEMPLATE = TemplateInfo(source="none", fingerprint="")


@dataclass(frozen=True, kw_only=True)
class LengthHistogram:
    """Counts per bucket of lengths in tokens; bucket b holds b/2 < length <= b, b a power of two."""

    prompt: dict[int, int]
    response: dict[int, int]
    total: dict[int, int]
    """A prompt with all its responses: what a group occupies in a packed row."""


@dataclass(frozen=True, kw_only=True)
class RewardStatistics:
    """Over all responses of the store."""

    source: RewardSource
    mean: float
    std: float
    min: float
    max: float
    all_equal: float
    """Share of groups whose rewards are all equal: these have nothing to prefer."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    format: int
    created_by: str
    tokenizer: TokenizerInfo
    template: TemplateInfo
    groups: int
    responses: int
    tokens: int
    max_length: int
    """Longest prompt + one response, in tokens."""
    responses_per_group: dict[int, int]
    """K -> number of groups with K responses."""
    lengths: LengthHistogram
    reward: RewardStatistics | None
    dropped: dict[str, int]
    """Reason -> how many responses (`response_...`) or whole groups (`group_...`) were left out for it."""
    boundary_merges: int
    """Responses whose first token would have swallowed the end of the prompt and were tokenized on their own."""
    files: dict[str, FileInfo]
    """Suffix (`bin`, `idx`, `reward.bin`, `reward.idx`) -> size and checksum of PREFIX.suffix."""


@dataclass(frozen=True, kw_only=True)
class ReferenceManifest:
    """PREFIX.ref_logp.json."""

    format: int
    tokens: str
    """`token_fingerprint` of the store that was scored."""
    identity: dict[str, str]
    """What made the numbers: fingerprints of weights, tokenizer, template and numerics."""
    files: dict[str, FileInfo]


@dataclass(frozen=True, kw_only=True)
class ColumnManifest:
    """PREFIX.column.NAME.json."""

    format: int
    tokens: str
    """`token_fingerprint` of the store that the column belongs to."""
    name: str
    statistics: RewardStatistics
    identity: dict[str, str]
    """What made the numbers; empty for a column of the input."""
    files: dict[str, FileInfo]


def write_record(record: Any, path: Path) -> None:
    """Write a dataclass as JSON: complete under its name, or not at all."""
    partial = Path(f"{path}{PARTIAL}")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    partial.replace(path)


def read_record(cls: type[R], path: Path) -> R:
    """Read what `write_record` wrote. Raises UserError if it is not valid JSON of this format version."""
    try:
        tree = msgspec.json.decode(path.read_bytes())
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            found = tree.get("format") if isinstance(tree, dict) else None
            raise UserError(f"{path}: format {found!r}; this program reads format {FORMAT}: prepare the data again")
        return msgspec.convert(tree, type=cls, strict=False)  # JSON has no integer keys: "4" -> 4
    except msgspec.MsgspecError as error:
        raise UserError(f"{path}: damaged: {error}. Copy it again from its source, or prepare the data again") from None


# ------------------------------------------------------------------------------------------------ statistics


@dataclass(kw_only=True)
class Statistics:
    """What a manifest counts, gathered group by group while a store is written."""

    groups: int = 0
    responses: int = 0
    tokens: int = 0
    max_length: int = 0
    responses_per_group: Counter[int] = field(default_factory=Counter)
    prompt: Counter[int] = field(default_factory=Counter)
    response: Counter[int] = field(default_factory=Counter)
    total: Counter[int] = field(default_factory=Counter)
    rewards: "RewardMoments" = field(default_factory=lambda: RewardMoments())

    def add(self, prompt_length: int, response_lengths: list[int], reward_K: np.ndarray | None) -> None:
        total = prompt_length + sum(response_lengths)
        self.groups += 1
        self.responses += len(response_lengths)
        self.tokens += total
        self.max_length = max(self.max_length, prompt_length + max(response_lengths))
        self.responses_per_group[len(response_lengths)] += 1
        self.prompt[bucket(prompt_length)] += 1
        self.response.update(map(bucket, response_lengths))
        self.total[bucket(total)] += 1
        if reward_K is not None:
            self.rewards.add(reward_K)

    def lengths(self) -> LengthHistogram:
        return LengthHistogram(prompt=_sorted(self.prompt), response=_sorted(self.response), total=_sorted(self.total))

    def sorted_responses_per_group(self) -> dict[int, int]:
        return _sorted(self.responses_per_group)


@dataclass(kw_only=True)
class RewardMoments:
    """Streaming mean and variance (Chan et al. 1983): a sum of squares would cancel for rewards far from 0."""

    groups: int = 0
    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    """Sum of squared deviations from the mean."""
    min: float = float("inf")
    max: float = float("-inf")
    all_equal: int = 0

    def add(self, reward_K: np.ndarray) -> None:
        values = reward_K.astype(np.float64)
        delta = float(values.mean()) - self.mean
        count = self.count + values.size
        self.square += float(values.var()) * values.size + delta**2 * self.count * values.size / count
        self.mean += delta * values.size / count
        self.count = count
        self.groups += 1
        self.min, self.max = min(self.min, float(values.min())), max(self.max, float(values.max()))
        self.all_equal += bool(values.min() == values.max())

    def statistics(self, source: RewardSource) -> RewardStatistics:
        std = (self.square / self.count) ** 0.5
        all_equal = self.all_equal / self.groups
        return RewardStatistics(source=source, mean=self.mean, std=std, min=self.min, max=self.max, all_equal=all_equal)


def bucket(length: int) -> int:
    """The smallest power of two that is not below `length` (1 for 0)."""
    return 1 << max(length - 1, 0).bit_length()


def _sorted(counts: Counter[int]) -> dict[int, int]:
    return dict(sorted(counts.items()))
