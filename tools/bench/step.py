"""A whole training step through megatron-core against TRL's DPO, and against plain torch: CPU time and peak memory.

    python -m tools.bench.step [OUTPUT.json] [--short | --tiny]

1. Two random Llamas, policy and reference, on disk, and one step's groups of K responses to a prompt.
2. Every variant makes one step on them: batches put together, the reference's pass (live) or its stored numbers,
   forward and backward. The optimizer's update, the same for all, is left out. They must agree: log-probabilities of
   every response, and where the losses are the same (K = 2, plain torch), the loss and the output layer's gradient.
3. They take turns, in an order drawn anew for every round. Ratios are taken round by round.
4. Those whose memory the table shows make one step of 8 responses, each in a process of its own, for its peak above the
   weights.

ours_stored    shared prompts, stored reference: what we recommend
ours_live      shared prompts, the reference's pass in every step
ours_unshared  the same with every prompt computed K times
plain_stored   the mathematics of ours_stored in plain torch (plain_step.py)
trl_default    TRL as it is, on a CPU
trl_compact    the same, skipping positions without a label, as TRL does on a GPU
trl_stored     the same with precompute_ref_log_probs
trl_pairwise   the same, one pair at a time: the least padding
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from rpo_megatron.config import ParallelConfig
from rpo_megatron.data.store import Group
from rpo_megatron.distributed import start, stop
from tools.bench import ours, processes
from tools.bench.common import (
    TINY,
    Data,
    Report,
    Size,
    Spread,
    close,
    in_turns,
    main,
    print_table,
    ratio,
    real_tokens,
    threads,
    words,
    write_model,
)
from tools.bench.ours import Trainer
from tools.bench.plain_step import PlainLlama, pack
from tools.bench.plain_step import step as plain_step

THREADS = 2
OURS = ("ours_stored", "ours_live", "ours_unshared", "plain_stored")
BEST = ("trl_stored", "trl_pairwise")
THEIRS = ("trl_default", "trl_compact", *BEST)
HAS_TRL = importlib.util.find_spec("trl") is not None
VARIANTS = (*OURS, *THEIRS) if HAS_TRL else OURS
Answer = tuple[float, torch.Tensor]
"""(loss, gradient of the output layer's weight)."""
Step = Callable[..., Answer]
"""Of the groups, with the reference's stored log-probabilities, which live variants leave alone."""


LEAN = tuple(name for name in VARIANTS if name in ("ours_stored", "plain_stored", "trl_pairwise"))
"""Where the others would take minutes a step."""
LEAN_PEAKS = tuple(name for name in VARIANTS if name in (*LEAN, "trl_stored"))
PEAKS = tuple(name for name in VARIANTS if name in (*LEAN_PEAKS, "trl_default"))
PEAK_RESPONSES = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    size: Size
    data: Data
    rounds: int
    names: tuple[str, ...] = VARIANTS
    peaks: tuple[str, ...] = PEAKS
    """Variants whose memory is measured, in a step of PEAK_RESPONSES."""


def data(responses: int, prompt: int, *, per_step: int) -> Data:
    """As many groups as make `per_step` responses."""
    return Data(groups=max(1, per_step // responses), responses=responses, prompt=prompt)


SMALL, LARGE = Size(vocab=32000), Size(vocab=128256)
TINY_DATA = Data(groups=2, responses=2, prompt=6, shortest=3, longest=9)
MODES = {
    "full": [
        Case(size=size, data=data(k, prompt, per_step=8), rounds=7)
        for size in (SMALL, LARGE)
        for k in (2, 4, 8)
        for prompt in (256, 1024)
    ],
    "short": [
        Case(size=SMALL, data=data(4, 256, per_step=4), rounds=2),
        Case(size=SMALL, data=data(8, 1024, per_step=8), rounds=2, names=LEAN, peaks=LEAN_PEAKS),
        Case(size=LARGE, data=data(4, 256, per_step=4), rounds=2),
    ],
    "tiny": [
        Case(size=TINY, data=TINY_DATA, rounds=2),
        Case(size=TINY, data=TINY_DATA, rounds=1, names=LEAN),
    ],
}


def benchmark(mode: str) -> Report:
    cases = MODES[mode]
    if not HAS_TRL:
        print("without TRL, which is not installed here: `make bench-env`")
    results = []
    for size, of_size in groupby(cases, key=lambda case: case.size):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "policy", size, seed=0)
            write_model(Path(folder) / "reference", size, seed=1)
            results += [measure(Path(folder), case) for case in of_size]
    settings = {"cases": [asdict(case) for case in cases], "threads": THREADS}
    return Report(
        name="step",
        title="A training step: CPU time and peak memory above the weights, over those of ours",
        settings=settings,
        results=results,
        summary=[summary(result) for result in results],
    )


def measure(folder: Path, case: Case) -> dict[str, Any]:
    size, kind, names = case.size, case.data, case.names
    groups = kind.make(vocab=size.vocab)
    # First, while the machine's memory is all there: a step of each variant in its own process.
    large = replace(kind, groups=max(1, PEAK_RESPONSES // kind.responses)).make(vocab=size.vocab)
    peaks = {name: processes.run(peak, folder, size, name, large, num_threads=THREADS)[0] for name in case.peaks}
    with threads(THREADS), variants(folder, size, groups, names) as steps:
        seconds = in_turns(steps, rounds=case.rounds)
    tokens = real_tokens(groups)
    rows = [
        {
            "variant": name,
            "tokens_per_cpu_second": Spread.of([tokens / s for s in seconds[name]]).median,
            "times_ours": str(ratio(seconds[name], seconds["ours_stored"])),
            "peak_mib": peaks.get(name, "-"),
            "peak_over_ours": peaks[name] / peaks["ours_stored"] if name in peaks else "-",
        }
        for name in names
    ]
    print_table(f"vocabulary {size.vocab}, K {kind.responses}, prompt {kind.prompt}: {tokens} tokens a step", rows)
    return {
        "vocab": size.vocab,
        **asdict(kind),
        "real_tokens": tokens,
        "cpu_seconds": seconds,
        "peak_mib": peaks,
    }


@contextmanager
def variants(
    folder: Path, size: Size, groups: list[Group], names: Sequence[str]
) -> Iterator[dict[str, Callable[[], object]]]:
    """These variants in one process, after they were seen to agree on the groups."""
    ranks = start(ParallelConfig())
    policy, reference = (ours.load(folder / name, ranks) for name in ("policy", "reference"))
    policy_GK, reference_GK = (ours.logps(model, groups) for model in (policy, reference))
    stored = ours.with_stored_reference(groups, reference_GK)
    steps = our_steps(Trainer.of(policy, ours.LOSS), reference, PlainLlama(folder / "policy", size))
    if HAS_TRL:
        steps |= their_steps(folder, stored, policy_GK, reference_GK)
    steps = {name: steps[name] for name in names}
    check(steps, stored)
    yield {name: partial(step, stored) for name, step in steps.items()}
    stop()


def our_steps(trainer: Trainer, reference: Any, plain: PlainLlama) -> dict[str, Step]:
    def mine(groups: list[Group], **options: Any) -> Answer:
        return ours.mean_loss(trainer.step(groups, **options)), trainer.output_gradient()

    def plainly(groups: list[Group]) -> Answer:
        loss = plain_step(plain, groups)
        assert plain.head.grad is not None
        return loss, plain.head.grad

    return {
        "ours_stored": mine,
        "ours_live": partial(mine, reference=reference),
        "ours_unshared": partial(mine, reference=reference, share_prompt=False),
        "plain_stored": plainly,
    }


def their_steps(
    folder: Path, groups: list[Group], policy_GK: torch.Tensor, reference_GK: torch.Tensor
) -> dict[str, Step]:
    """TRL's. Raises RuntimeError where its log-probabilities are not ours."""
    from tools.bench.trl_peer import TRL, pairs_of

    peer = TRL(folder / "policy", folder / "reference")
    for mine, of_reference in ((policy_GK, False), (reference_GK, True)):
        found = peer.logps(pairs_of(groups), of_reference=of_reference)
        close(found.flatten(), mine.flatten(), relative=1e-4, what="log-probabilities of TRL and ours")

    def theirs(groups: list[Group], *, compact: bool, stored: bool, pairwise: bool = False) -> Answer:
        pairs = pairs_of(groups)
        loss = peer.step(pairs, compact=compact, stored=stored, pairs_per_batch=1 if pairwise else len(pairs))
        return loss, peer.model.lm_head.weight.grad

    return {
        "trl_default": partial(theirs, compact=False, stored=False),
        "trl_compact": partial(theirs, compact=True, stored=False),
        "trl_stored": partial(theirs, compact=True, stored=True),
        "trl_pairwise": partial(theirs, compact=True, stored=True, pairwise=True),
    }


def check(steps: Mapping[str, Step], groups: list[Group]) -> None:
    """Run every variant once. Raises RuntimeError where two of one loss do not agree."""
    loss, gradient = steps["ours_stored"](groups)
    gradient = gradient.clone()
    same = steps if len(groups[0].responses) == 2 else OURS
    for name, step in steps.items():
        found, by_weight = step(groups)
        if name in same:
            close(torch.tensor(found), torch.tensor(loss), relative=1e-4, what=f"loss of {name} and ours_stored")
            # ours is padded to a multiple of 128
            mine = gradient[: len(by_weight)]
            close(by_weight, mine, relative=1e-3, what=f"output layer's gradient of {name} and ours_stored")


def peak(folder: Path, size: Size, name: str, groups: list[Group]) -> float:
    """MiB above the weights of one step of a variant, after a look at all weights; in a process of its own."""
    groups = ours.with_stored_reference(groups, torch.zeros(len(groups), len(groups[0].responses)))
    if name.startswith("trl"):
        return peak_of_trl(folder, name, groups)
    if name == "plain_stored":
        plain = PlainLlama(folder / "policy", size)
        with torch.no_grad():
            plain.response_logps(pack(groups[:1]))
        return processes.Peak.start().of(lambda: plain_step(plain, groups))
    ranks = start(ParallelConfig())
    policy, reference = (ours.load(folder / model, ranks) for model in ("policy", "reference"))
    ours.logps(policy, groups[:1])
    before = processes.Peak.start()  # our gradient buffers count, because the others' gradients do
    trainer = Trainer.of(policy, ours.LOSS)
    live = {} if name == "ours_stored" else {"reference": reference}
    return before.of(lambda: trainer.step(groups, share_prompt=name != "ours_unshared", **live))


def peak_of_trl(folder: Path, name: str, groups: list[Group]) -> float:
    from tools.bench.trl_peer import TRL, pairs_of

    peer, pairs = TRL(folder / "policy", folder / "reference"), pairs_of(groups)
    for of_reference in (False, True):
        peer.logps(pairs[:1], of_reference=of_reference)
    per_batch = 1 if name == "trl_pairwise" else len(pairs)
    return processes.Peak.start().of(
        lambda: peer.step(pairs, compact=name != "trl_default", stored=name in BEST, pairs_per_batch=per_batch)
    )


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """A row of the README's table; "-" where a variant was not measured."""
    seconds, peaks = result["cpu_seconds"], result["peak_mib"]

    def over(slower: str, faster: str) -> str:
        return str(ratio(seconds[slower], seconds[faster])) if {slower, faster} <= seconds.keys() else "-"

    def memory(name: str) -> float | str:
        return peaks[name] / peaks["ours_stored"] if name in peaks else "-"

    row = {"vocabulary": words(result["vocab"]), "K": result["responses"], "prompt": result["prompt"]}
    if HAS_TRL:
        fastest = min((name for name in BEST if name in seconds), key=lambda name: Spread.of(seconds[name]).median)
        row |= {
            "TRL's default / ours": over("trl_default", "ours_stored"),
            "both with stored reference: TRL's best / ours": over(fastest, "ours_stored"),
            "both live: TRL's default / ours": over("trl_default", "ours_live"),
            "both live: TRL's best / ours": over("trl_compact", "ours_live"),
            "memory: TRL's default / ours": memory("trl_default"),
            "memory: TRL's best / ours": memory("trl_stored"),
            "memory: TRL, a pair at a time / ours, all at once": memory("trl_pairwise"),
        }
    return row | {"ours / plain torch": over("ours_stored", "plain_stored")}


if __name__ == "__main__":
    main(__doc__, benchmark)
