"""CPU time of a training step's forward and backward without shared prompts, over that with them.

    python -m tools.bench.shared_prompt [OUTPUT.json] [--short | --tiny]

The two layouts take turns on the same groups and weights (method sft: no reference). `tokens` is how many fewer tokens
a row has with sharing, K (P + R) / (P + K R); `share` is how much of that the clock sees.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from tools.bench import ours
from tools.bench.common import (
    TINY,
    Data,
    Report,
    Size,
    close,
    in_turns,
    main,
    ratio,
    threads,
    words,
    write_model,
)
from tools.bench.ours import Trainer

THREADS = 2
GRID = [(k, prompt) for k in (2, 4, 8) for prompt in (64, 256, 1024)]
MODES = {
    "full": ([Size(vocab=32000), Size(vocab=128256)], GRID, 7),
    "short": ([Size(vocab=32000)], [(2, 256), (4, 256), (8, 64), (8, 1024)], 3),
    "tiny": ([TINY], [(3, 9)], 2),
}


def benchmark(mode: str) -> Report:
    sizes, grid, rounds = MODES[mode]
    with threads(THREADS):
        results = [result for size in sizes for result in measure(size, grid, rounds)]
    summary = [
        {
            "vocabulary": words(result["vocab"]),
            "K": result["responses"],
            "prompt": result["prompt"],
            "fewer tokens": result["tokens"],
            "faster": str(ratio(*result["cpu_seconds"].values())),
            "of the tokens' ratio": f"{result['share']:.0%}",
        }
        for result in results
    ]
    return Report(
        name="shared_prompt",
        title="Shared prompts: how many times faster than computing them for every response",
        settings={"sizes": [asdict(size) for size in sizes], "rounds": rounds, "threads": THREADS},
        results=results,
        summary=summary,
    )


def measure(size: Size, grid: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        policy = ours.load(write_model(Path(folder), size, seed=0), start(ParallelConfig()))
    trainer = Trainer.of(policy, ours.SFT)
    results = [measure_one(trainer, size, k, prompt, rounds) for k, prompt in grid]
    stop()
    return results


def measure_one(trainer: Trainer, size: Size, responses: int, prompt: int, rounds: int) -> dict[str, Any]:
    kind = Data(groups=1, responses=responses, prompt=prompt)
    groups = kind.make(vocab=size.vocab)
    batches = {shared: ours.batch_of(groups, share_prompt=shared) for shared in (False, True)}
    steps: dict[str, Callable[[], object]] = {
        name: partial(trainer.backward, [batches[shared]]) for name, shared in (("repeated", False), ("shared", True))
    }
    gradients = []
    for step in steps.values():
        step()
        gradients.append(trainer.output_gradient().clone())
    close(*gradients, relative=1e-4, what="output layer's gradient with and without shared prompts")
    seconds = in_turns(steps, rounds=rounds)
    print(f"vocabulary {size.vocab}, K {responses}, prompt {prompt}: {seconds}", flush=True)
    tokens = {shared: batch.row.tokens_1T.numel() for shared, batch in batches.items()}
    fewer, faster = tokens[False] / tokens[True], ratio(seconds["repeated"], seconds["shared"])
    return {
        "vocab": size.vocab,
        **asdict(kind),
        "tokens": fewer,
        "faster": faster.median,
        "lowest": faster.low,
        "highest": faster.high,
        "share": faster.median / fewer,
        "cpu_seconds": seconds,
    }


if __name__ == "__main__":
    main(__doc__, benchmark)
