"""The quickstart: align a language model, from the first step to the last, in a few minutes on two CPU cores.

    python examples/quickstart/run.py
    python examples/quickstart/run.py --model DIR --data FILE     with a Hugging Face model and preference data of yours

1. Make preference data and a model without weights (or split your data in two).
2. Prepare the data: text to tokens.
3. Train a starting policy that imitates good and bad answers alike (or take your model).
4. Score: the starting policy's log-probability of every answer, RPO's reference.
5. Align it with RPO, split over two processes.
6. Evaluate it on the held-out questions.
7. Export it to a Hugging Face directory.
8. Ask it and the starting policy the held-out questions, and compare.

Steps 1 to 8 are commands, which are printed before they run and can be run alone.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from rpo_megatron.data.readers import Source
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import locked
from rpo_megatron.model.shape import read_shape

ROOT = Path(__file__).resolve().parents[2]
"""Where the commands run."""
HERE = Path("examples/quickstart")
WORK = Path("runs/quickstart")
"""The paths in the yaml files begin with it."""
MARKER = "made-by-quickstart"
"""A file in the directory of a quickstart: the next one may delete this directory."""
MOST_ROWS = 1000
"""Of data of yours: enough to see whether it works."""
PYTHON = "python" if shutil.which("python") == sys.executable else sys.executable


def main() -> None:
    arguments = parse_arguments()
    with alone_in(arguments.dir):
        quickstart(arguments, fresh_directory(arguments.dir))


def quickstart(arguments: argparse.Namespace, work: Path) -> None:
    print(f"$ cd {ROOT}")
    if arguments.model is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this small model is no faster on a GPU
        make_data(work)
        start = train_start(work, short=arguments.short)
        run = run_words("rpo.yaml", work, model=start, shorter="train.steps=140" if arguments.short else None)
    else:
        start = arguments.model
        split_data(arguments.data, work)
        prepare(work, tokenizer=start, max_length=min(1024, read_shape(start).max_positions))
        run = run_words("own.yaml", work, model=start, shorter="train.steps=10" if arguments.short else None)
    score(run)
    align(run, model=start)
    evaluate(run)
    export(work / "rpo", work / "aligned")
    compare(work, start, judged=arguments.model is None)
    say_goodbye(work, start)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Align a small language model from the first step to the last.")
    parser.add_argument("--model", type=seen_from_root, help="your Hugging Face model directory (with --data)")
    parser.add_argument("--data", type=seen_from_root, help="your preference data: .jsonl, .jsonl.gz, .parquet, ...")
    parser.add_argument("--dir", type=seen_from_root, default=WORK, help=f"where all files go (default {WORK})")
    parser.add_argument("--short", action="store_true", help="train less, for a smaller gain")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")
    return arguments


# ------------------------------------------------------------------------------------------------ the steps


def make_data(work: Path) -> None:
    shell(str(HERE / "make_data.py"), str(work))
    prepare(work, tokenizer=work / "blank", max_length=128)
    rpo("inspect", f"{work}/store/train", "examples=1")


def split_data(file: Path, work: Path) -> None:
    """The last tenth of the rows, but 8 to 200 of them, is held out."""
    rows = [row.decode() for row in islice(Source(str(file)), MOST_ROWS)]
    num_valid = min(200, max(8, len(rows) // 10))
    if len(rows) < 2 * num_valid:
        raise UserError(f"{file}: {len(rows)} rows are too few to train and to evaluate on; give at least 16")
    for name, part in {"train": rows[:-num_valid], "valid": rows[-num_valid:]}.items():
        lines = [json.dumps(row, default=str) + "\n" for row in part]
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"the first {len(rows)} rows of {file}: {len(rows) - num_valid} to train on, {num_valid} held out")


def prepare(work: Path, *, tokenizer: Path, max_length: int) -> None:
    for part in ("train", "valid"):
        words = [f"input={work}/{part}.jsonl", f"output_prefix={work}/store/{part}"]
        rpo("prepare", *words, f"tokenizer={tokenizer}", f"max_length={max_length}", "workers=1")


def train_start(work: Path, *, short: bool) -> Path:
    rpo("train", *run_words("sft.yaml", work, model=work / "blank", shorter="train.steps=350" if short else None))
    export(work / "sft", work / "start")
    return work / "start"


def score(run: list[str]) -> None:
    rpo("score", *run)


def align(run: list[str], *, model: Path) -> None:
    """Two processes hold half of every matrix each; if its heads cannot be halved, each holds a copy of the model."""
    import torch

    processes = 1 if torch.cuda.device_count() == 1 else 2
    tensor = math.gcd(processes, read_shape(model).num_kv_heads)
    rpo("train", *run, f"parallel.tensor={tensor}", processes=processes)


def evaluate(run: list[str]) -> None:
    """In one process: checkpoints and stored references do not depend on how many processes wrote them."""
    rpo("eval", *run)


def export(run_dir: Path, directory: Path) -> None:
    rpo("export", str(run_dir), f"save={directory}")


def compare(work: Path, start: Path, *, judged: bool) -> None:
    words = [str(start), f"{work}/aligned", "--store", f"{work}/store/valid", "--run", f"{work}/rpo"]
    shell(str(HERE / "compare.py"), *words, *(["--judged"] if judged else []))


def say_goodbye(work: Path, start: Path) -> None:
    print(f"\nAll of it is in {work}: the data, {work}/rpo (checkpoints, metrics.jsonl, tensorboard), and the aligned")
    print(f"model as a Hugging Face directory, {work}/aligned; what it began as is {start}. What to try next:")
    file = "rpo.yaml" if start == work / "start" else "own.yaml"
    other = run_words(file, work, model=start, shorter=None)
    other = [word for word in other if not word.startswith("run_dir=")]
    words = [PYTHON, "-m", "rpo_megatron", "train", *other, "objective.method=rpo_sqloo", f"run_dir={work}/sqloo"]
    print(f"  another objective   {shlex.join(words)}")
    print(f"  all objectives      {PYTHON} -m rpo_megatron methods")
    print("  your model, data    make quickstart MODEL=directory DATA=file.jsonl")


# ------------------------------------------------------------------------------------------------ how they run


def run_words(file: str, work: Path, *, model: Path, shorter: str | None) -> list[str]:
    """The yaml file and what differs from it; its own paths are those of the default --dir."""
    words = [str(HERE / file)]
    if work != WORK or file == "own.yaml":
        words += [f"run_dir={work}/{'sft' if file == 'sft.yaml' else 'rpo'}", f"model.path={model}"]
        words += [f"data.train={work}/store/train", f"data.valid={work}/store/valid"]
    return words if shorter is None else [*words, shorter]


def rpo(*words: str, processes: int = 1) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    shell(*(launcher if processes > 1 else []), "-m", "rpo_megatron", *words, threads=2 // processes)


def shell(*words: str, threads: int = 2) -> None:
    """Run Python with `words`; end the quickstart if that fails."""
    print(f"\n$ {shlex.join([PYTHON, *words])}", flush=True)
    began = time.perf_counter()
    # PASSIVE: threads that wait by spinning cost others, and themselves, most of a busy machine.
    threading = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    code = subprocess.run([sys.executable, *words], cwd=ROOT, env={**os.environ, **threading}).returncode
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    if code:
        sys.exit(f"quickstart: the last command failed with exit code {code}")


def seen_from_root(path: str) -> Path:
    absolute = Path(path).resolve()
    return absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """A second quickstart would delete the directory of one that is running."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory.with_name(f".{directory.name}.lock")):
            yield
    except BlockingIOError:
        raise UserError(f"--dir: another quickstart is running in '{directory}'; give another one") from None


def fresh_directory(directory: Path) -> Path:
    """Empty, and deleted only if a quickstart made it."""
    if directory.exists():
        if not (directory / MARKER).is_file():
            raise UserError(f"--dir: '{directory}' exists and is not of a quickstart; give another one")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / MARKER).touch()
    return directory


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        main()
    except UserError as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
