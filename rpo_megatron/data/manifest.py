"""The manifest of a store (PREFIX.json): what is in it, what made it, what was dropped on the way, checksums.

Small whatever the size of the store (no list per group), written last: a store without manifest does not open.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from rpo_megatron.data.batch import starts
from rpo_megatron.data.indexed import FileInfo
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import write_text_atomically

FORMAT = 1
"""Raised when a store of the older format can no longer be read."""

R = TypeVar("R")
REWARD = "reward"
"""Name of the column that the main manifest describes; every other is a sidecar with a manifest of its own."""
COLUMN_NAME = re.compile(r"[A-Za-z0-9_-]+")
POWERS = 1 << np.arange(62, dtype=np.int64)
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
    text = msgspec.json.format(msgspec.json.encode(record), indent=1).decode()
    write_text_atomically(path, text + "\n")


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
    """What a manifest counts, gathered while a store is written. Shapes as in batch.py."""

    groups: int = 0
    responses: int = 0
    tokens: int = 0
    max_length: int = 0
    responses_per_group: dict[int, int] = field(default_factory=dict)
    prompt: dict[int, int] = field(default_factory=dict)
    response: dict[int, int] = field(default_factory=dict)
    total: dict[int, int] = field(default_factory=dict)
    rewards: "RewardMoments" = field(default_factory=lambda: RewardMoments())

    def add(self, length_S: np.ndarray, num_responses_G: np.ndarray, reward_R: np.ndarray | None) -> None:
        """Count groups (at least one): the lengths of each one's prompt and responses, end to end."""
        prompt_S = np.zeros(length_S.size, dtype=bool)
        first_G = starts(num_responses_G + 1)
        prompt_S[first_G] = True
        prompt_G, response_R = length_S[first_G].astype(np.int64), length_S[~prompt_S].astype(np.int64)
        first_response_G = starts(num_responses_G)
        self.groups += num_responses_G.size
        self.responses += response_R.size
        self.tokens += int(length_S.sum())
        longest_G = prompt_G + np.maximum.reduceat(response_R, first_response_G)
        self.max_length = max(self.max_length, int(longest_G.max()))
        _count(self.responses_per_group, num_responses_G)
        _count(self.prompt, bucket(prompt_G))
        _count(self.response, bucket(response_R))
        _count(self.total, bucket(prompt_G + np.add.reduceat(response_R, first_response_G)))
        if reward_R is not None:
            self.rewards.add(reward_R, num_responses_G)

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

    def add(self, reward_R: np.ndarray, num_responses_G: np.ndarray) -> None:
        """Count groups (at least one), the rewards of their responses end to end."""
        first_G = starts(num_responses_G)
        lowest_G, highest_G = np.minimum.reduceat(reward_R, first_G), np.maximum.reduceat(reward_R, first_G)
        values = reward_R.astype(np.float64)
        delta = float(values.mean()) - self.mean
        count = self.count + values.size
        self.square += float(values.var()) * values.size + delta**2 * self.count * values.size / count
        self.mean += delta * values.size / count
        self.count = count
        self.groups += num_responses_G.size
        self.min, self.max = min(self.min, float(lowest_G.min())), max(self.max, float(highest_G.max()))
        self.all_equal += int((lowest_G == highest_G).sum())

    def statistics(self, source: RewardSource) -> RewardStatistics:
        std = (self.square / self.count) ** 0.5
        all_equal = self.all_equal / self.groups
        return RewardStatistics(source=source, mean=self.mean, std=std, min=self.min, max=self.max, all_equal=all_equal)


def bucket(length: np.ndarray) -> np.ndarray:
    """The smallest powers of two that are not below the lengths (1 for 0)."""
    return 1 << np.searchsorted(POWERS, length).astype(np.int64)


def _count(counts: dict[int, int], values: np.ndarray) -> None:
    found, times = np.unique(values, return_counts=True)
    for value, number in zip(found.tolist(), times.tolist(), strict=True):
        counts[value] = counts.get(value, 0) + number


def _sorted(counts: dict[int, int]) -> dict[int, int]:
    return dict(sorted(counts.items()))
