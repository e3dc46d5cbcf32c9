"""Text to tokens on disk, and back: `rpo prepare` and `Store.group` beside what others do with the same texts.

    python -m tools.bench.preprocess [OUTPUT.json] [--short | --tiny] [--trl PYTHON]

A group is a prompt and four responses; the tokenizer is a byte-level BPE of 32,000 tokens with Llama 3's
pre-tokenization, trained here. Every way runs in a new process for each measurement, in an order drawn anew for each
round, one at a time. CPU seconds (user and system, children included) of a small input are taken off those of a larger
one, so that start-up does not count; verifying the fast tokenizer is part of the start-up. The larger input of each
way is so large that the difference is of about two seconds at the least. The ways (preprocess_peers.py; `megatron` and
`megatron, fast` are stand-ins for scripts that are not packaged):

    rpo, fast and megatron, fast   with gigatoken, where it is installed
    rpo, normal                    with the tokenizers library, as the others
    datasets.map, megatron, and with --trl TRL's preparation in an interpreter that has it

Texts are those of $RPO_SHARED/data (or ../shared/data) where there is one, else the quickstart's; they are repeated,
with other responses each time, until there are enough.
"""

import argparse
import gzip
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rpo_megatron.data import fast
from rpo_megatron.data.parts import LLAMA_3
from tools.bench.common import Report, Spread, print_table, ratio

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "tools" / "bench" / "preprocess_peers.py"
RESPONSES = 4
VOCAB = 32000
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


@dataclass(frozen=True, kw_only=True)
class Mode:
    rounds: int
    size: float
    """Of the inputs, in those of `ways_of`."""
    index: int
    """Groups of the store that has no text."""


MODES = {
    "full": Mode(rounds=5, size=2, index=10_000_000),
    "short": Mode(rounds=2, size=1, index=1_000_000),
    "tiny": Mode(rounds=1, size=0.02, index=2000),
}
Command = Callable[[str, str, str], list[str]]
"""Of input, output and tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Way:
    name: str
    kind: str
    """Which layout of the rows it reads."""
    sizes: tuple[int, int]
    """Groups of the small and of the larger input."""
    command: Command


def benchmark(mode: str, *, trl: str | None) -> Report:
    given = MODES[mode]
    ways = ways_of(given.size, trl=trl)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        groups = list(islice(real_groups(work), max(max(way.sizes) for way in ways)))
        write_tokenizer(work / "tokenizer", groups)
        for kind, count in {(way.kind, count) for way in ways for count in way.sizes}:
            write_rows(source_of(work, kind, count), kind, groups[:count])
        prepared = [prepare_rate(way, seconds) for way, seconds in in_rounds(work, ways, given.rounds).items()]
        if fast.is_installed():
            check_equal(work, *ways[:2])
        reads = read_rates(work, ways, given.rounds)
        built = run_index(work, given.index)
    return Report(
        name="preprocess",
        title="Groups prepared, and read, per CPU second",
        settings={
            "mode": mode,
            "responses": RESPONSES,
            "text": "real" if shared_data() else "generated",
            "sizes": {way.name: way.sizes for way in ways},
            "bytes_per_group": statistics.mean(sum(len(text.encode()) for text in group) for group in groups[:1000]),
            "left_out": [f"{name}: {reason}" for name, reason in left_out(trl).items()],
        },
        results=[*prepared, *reads, built],
        summary=[row(result, prepared[0]) for result in prepared] + [row(result, reads[0]) for result in reads],
    )


# ------------------------------------------------------------------------------------------------ texts


def shared_data() -> list[Path]:
    folder = Path(os.environ.get("RPO_SHARED", ROOT.parent / "shared")) / "data"
    return sorted(folder.glob("*.jsonl.gz"))


def real_groups(work: Path) -> Iterator[list[str]]:
    """A prompt and four of its responses, without end."""
    if files := shared_data():
        rows = [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    else:
        command = [sys.executable, "examples/quickstart/make_data.py", str(work / "quickstart")]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (work / "quickstart" / "train.jsonl").open(encoding="utf-8")]
    rng = random.Random(0)
    enough = [item for item in rows if len(item["responses"]) >= RESPONSES]
    for item in cycle(enough):
        yield [item["prompt"], *(response["text"] for response in rng.sample(item["responses"], RESPONSES))]


def write_tokenizer(directory: Path, groups: list[list[str]]) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator({text for group in groups for text in group}, trainer)
    PreTrainedTokenizerFast(tokenizer_object=library, eos_token=SPECIAL[1]).save_pretrained(directory)


LAYOUTS: dict[str, Callable[[list[str]], list[dict[str, Any]]]] = {
    "groups": lambda group: [
        {"prompt": group[0], "responses": [{"text": text, "reward": i} for i, text in enumerate(group[1:])]}
    ],
    "columns": lambda group: [{"prompt": group[0], **{f"response_{i}": text for i, text in enumerate(group[1:])}}],
    "pairs": lambda group: [
        {"prompt": group[0], "chosen": group[i], "rejected": group[i + 1]} for i in range(1, RESPONSES, 2)
    ],
}


def write_rows(path: Path, kind: str, groups: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for group in groups:
            file.writelines(json.dumps(row) + "\n" for row in LAYOUTS[kind](group))


# ------------------------------------------------------------------------------------------------ measuring


def ways_of(size: float, *, trl: str | None) -> list[Way]:
    """Those with the fast tokenizer have a thousand rows at the least, on which ours verifies it."""

    def way(name: str, kind: str, command: Command, *, small: int = 200, large: int) -> Way:
        return Way(name=name, kind=kind, sizes=(round(small * size), round(large * size)), command=command)

    ways = [
        way("rpo, fast", "groups", ours("always"), small=1200, large=90_000),
        way("rpo, normal", "groups", ours("never"), large=16_000),
        way("datasets.map", "columns", peer("datasets_map"), large=2600),
        way("megatron", "columns", peer("megatron"), large=3200),
        way("megatron, fast", "columns", peer("megatron_fast"), small=1200, large=140_000),
        way("trl", "pairs", peer("trl", trl or ""), large=2000),
    ]
    return [way for way in ways if way.name not in left_out(trl)]


def left_out(trl: str | None) -> dict[str, str]:
    """Why, by the name of the way."""
    reasons = {} if trl else {"trl": "no --trl PYTHON given"}
    if not fast.is_installed():
        reasons |= dict.fromkeys(("rpo, fast", "megatron, fast"), "gigatoken is not installed")
    return reasons


def ours(fast_tokenizer: str) -> Command:
    return lambda source, output, tokenizer: [
        *(sys.executable, "-m", "rpo_megatron", "prepare", f"input={source}", f"output_prefix={output}"),
        *(f"tokenizer={tokenizer}", "workers=1", "duplicate=keep", f"fast_tokenizer={fast_tokenizer}"),
    ]


def peer(name: str, python: str = sys.executable) -> Command:
    return lambda source, output, tokenizer: [python, str(PEERS), name, source, output, tokenizer]


def cpu_seconds(command: Sequence[str]) -> tuple[float, str]:
    """Of a process with its children, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def source_of(work: Path, kind: str, count: int) -> Path:
    return work / f"{kind}-{count}.jsonl"


def output_of(work: Path, way: Way, number: int, count: int) -> Path:
    return work / f"{way.name.replace(', ', '-')}-{number}-{count}" / "prepared"


def in_rounds(work: Path, ways: list[Way], rounds: int) -> dict[Way, list[tuple[float, float]]]:
    """CPU seconds for the small and the larger input, in each round."""
    seconds: dict[Way, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in random.Random(number).sample(ways, len(ways)):
            small, large = (run(work, way, number, count) for count in way.sizes)
            seconds[way].append((small, large))
            print(f"round {number}, {way.name}: {small:.2f} s, {large:.2f} s", flush=True)
    return seconds


def run(work: Path, way: Way, number: int, count: int) -> float:
    source, output = source_of(work, way.kind, count), output_of(work, way, number, count)
    output.parent.mkdir()
    seconds, _ = cpu_seconds(way.command(str(source), str(output), str(work / "tokenizer")))
    if number:  # those of the first round are looked at
        shutil.rmtree(output.parent)
    return seconds


def prepare_rate(way: Way, seconds: list[tuple[float, float]]) -> dict[str, Any]:
    small, large = way.sizes
    rates = [(large - small) / (more - less) for less, more in seconds]
    startup = statistics.median(less for less, _ in seconds)
    return {"what": way.name, "cpu_seconds": seconds, "rates": rates, "startup": startup}


def check_equal(work: Path, auto: Way, off: Way) -> None:
    """Raises RuntimeError when the fast tokenizer wrote other tokens than the normal one does."""
    count = auto.sizes[0]
    output = work / "check"
    cpu_seconds(off.command(str(source_of(work, "groups", count)), str(output), str(work / "tokenizer")))
    fast = output_of(work, auto, 0, count)
    if Path(f"{output}.bin").read_bytes() != Path(f"{fast}.bin").read_bytes():
        raise RuntimeError("rpo, fast and rpo, normal write different tokens: nothing to compare")


def read_rates(work: Path, ways: list[Way], rounds: int) -> list[dict[str, Any]]:
    """From the larger outputs of the first round."""
    maker = {way.name: way for way in ways}
    made_by = {"read_store": ways[0], "read_arrow": maker["datasets.map"]}
    sources = {name: str(output_of(work, way, 0, way.sizes[1])) for name, way in made_by.items()}
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(rounds):
        for name in random.Random(number).sample(list(sources), len(sources)):
            _, printed = cpu_seconds([sys.executable, str(PEERS), name, sources[name], "-", "-"])
            rates[name].append(json.loads(printed.splitlines()[-1])["rate"])
    return [{"what": name.replace("_", " "), "rates": rates[name], "startup": math.nan} for name in sources]


def run_index(work: Path, groups: int) -> dict[str, Any]:
    """Time and memory of a store's index, and reads from it."""
    _, printed = cpu_seconds([sys.executable, str(PEERS), "index", str(groups), str(work / "index"), "-"])
    found = {"what": "index", **json.loads(printed.splitlines()[-2]), **json.loads(printed.splitlines()[-1])}
    print(f"index: {found}", flush=True)
    return found


def row(result: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Of the table."""
    rates = Spread.of(result["rates"])
    return {
        "way": result["what"],
        "groups per CPU second": rates.median,
        "lowest": rates.low,
        "highest": rates.high,
        "ours is faster by": ratio(ours["rates"], result["rates"]).median,
        "start-up, CPU seconds": result["startup"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter that can import trl")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--short", dest="mode", action="store_const", const="short", help="three minutes")
    modes.add_argument("--tiny", dest="mode", action="store_const", const="tiny", help="only to see it run")
    parser.set_defaults(mode="full")
    given = parser.parse_args()
    began = time.monotonic()
    report = benchmark(given.mode, trl=given.trl)
    print_table(report.title, report.summary)
    print("\n".join(f"left out: {reason}" for reason in report.settings["left_out"]))
    print(f"{time.monotonic() - began:.0f} s")
    if given.output:
        report.write(given.output)


if __name__ == "__main__":
    main()
