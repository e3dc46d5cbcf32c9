"""What all benchmarks share: random models and groups, timing in turns, and the report as a table and as JSON."""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rpo_megatron.data.store import Group

T = TypeVar("T")
PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "datasets",
    "tokenizers",
    "numpy",
)
"""Whose versions go into the report, where they are installed."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a Llama with untied embeddings."""

    vocab: int
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 1408


TINY = Size(vocab=256, hidden=32, layers=2, heads=4, kv_heads=2, ffn=64)
"""Runs in a moment; its figures mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Groups of one kind: prompts of one length, responses with lengths uniform between two bounds."""

    groups: int
    responses: int
    prompt: int
    shortest: int = 64
    longest: int = 256

    def make(self, *, vocab: int, seed: int = 0) -> list[Group]:
        """Random tokens. Rewards fall from the first response of a group to its last."""
        rng = np.random.default_rng(seed)
        return [
            Group(
                prompt=rng.integers(3, vocab, self.prompt),
                responses=[rng.integers(3, vocab, n) for n in rng.integers(self.shortest, self.longest + 1, k)],
                reward=-np.arange(k, dtype=np.float32),
                ref_logp=None,
            )
            for k in [self.responses] * self.groups
        ]


def write_config(directory: Path, size: Size) -> dict[str, Any]:
    """config.json of a Hugging Face directory, and what is in it."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return config


def write_model(directory: Path, size: Size, *, seed: int) -> Path:
    """A Hugging Face directory with random fp32 weights, drawn and written by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**write_config(directory, size))).float().save_pretrained(directory)
    return directory


def words(vocab: int) -> str:
    """A vocabulary's size, for people."""
    return f"{vocab // 1000}k" if vocab >= 1000 else str(vocab)


def real_tokens(groups: Sequence[Group]) -> int:
    """Tokens of every response with its prompt: what a step is for, however it lays them out."""
    return sum(group.prompt.size + response.size for group in groups for response in group.responses)


def in_turns(variants: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round, in an order drawn anew for each (the same on all ranks). Callers have
    run every variant once before, to check that they do the same work."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in random.Random(number).sample(list(variants), len(variants)):
            seconds[name].append(cpu_seconds(variants[name])[0])
    return seconds


def cpu_seconds(function: Callable[[], T]) -> tuple[float, T]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of a quantity over the rounds of a run."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}]"


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """How many times faster, round by round."""
    return Spread.of([a / b for a, b in zip(slower, faster, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a benchmark found."""

    name: str
    title: str
    settings: dict[str, Any]
    results: list[dict[str, Any]]
    """Everything that was measured."""
    summary: list[dict[str, Any]]
    """What of it goes into the README: the rows of a table, which have the same columns."""

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "benchmark": self.name,
            "command": " ".join(
                [f"python -m tools.bench.{self.name}", *(f for f in sys.argv[1:] if f.startswith("--"))]
            ),
            "machine": machine(),
            "versions": versions(),
            **{key: value for key, value in asdict(self).items() if key != "name"},
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """The class of machine, without its name."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    model = {key.strip(): value.strip() for key, value in fields.items()}.get("model name", platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory), "system": platform.system()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows have the columns of the first."""
    print(f"\n{title}")
    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)), flush=True)


def cell(value: Any) -> str:
    """A value in a table: floats with three significant digits."""
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}"


def close(found: torch.Tensor, wanted: torch.Tensor, *, relative: float, what: str) -> None:
    """Raises RuntimeError where two variants that should do the same work did not."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    if not error <= relative:
        raise RuntimeError(f"{what}: differs by {error:.1e} (relative), more than {relative:.0e}: nothing to compare")


def arguments(doc: str | None) -> argparse.Namespace:
    """The command line that all benchmarks have: `output` (a Path or None) and `mode` (full, short or tiny)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="where to write the figures as JSON")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--short", dest="mode", action="store_const", const="short", help="minutes instead of hours")
    modes.add_argument("--tiny", dest="mode", action="store_const", const="tiny", help="seconds; only to see it run")
    parser.set_defaults(mode="full")
    return parser.parse_args()


def main(doc: str | None, benchmark: Callable[[str], Report]) -> None:
    """Run a benchmark from the command line."""
    given = arguments(doc)
    began = time.monotonic()
    report = benchmark(given.mode)
    print_table(report.title, report.summary)
    print(f"{time.monotonic() - began:.0f} s")
    if given.output:
        report.write(given.output)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
