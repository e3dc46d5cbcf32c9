"""Log-probabilities of the output layer alone, forward and backward: CPU time and extra memory, by vocabulary.

    python -m tools.bench.head [OUTPUT.json] [--short | --tiny]

N rows of hidden states (responses of 128 tokens), an output layer's weight, and the DPO loss of the responses in pairs
without a reference, because Liger's chunked loss has the loss built in. All variants must agree on the gradients of the
hidden states and of the weight. Memory is the peak above what they are given; the weight's gradient, which every
variant makes, is part of it.

ours           rpo_megatron's token_logprobs: tiles, of which backward finds 32 MiB and makes the others again
ours_kept      the same with room for all logits (kernels.keep_logits_mib)
plain          its oracle: all logits
megatron       megatron-core's vocab_parallel_cross_entropy on all logits
trl            TRL's chunked function, with the statistics that its DPO trainer asks for
trl_lean       the same, log-probabilities only
liger          Liger's chunked DPO loss, as shipped (compiled), and liger_eager without compiling
cut_ce         cut-cross-entropy, impl="torch_compile": its path for devices without its Triton kernels

Ratios are to ours. With two ranks the weight is split along the vocabulary (gloo; one thread each); CPU time is the sum
over the ranks, memory that of the larger. A variant that cannot run here is listed with the reason.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import Axis, Groups, start
from rpo_megatron.model.logprobs import choose_kept, plain_logprobs, token_logprobs
from rpo_megatron.model.vocab import VocabShard
from tools.bench import processes
from tools.bench.common import Report, close, in_turns, main, print_table, ratio, words

BETA = 0.1
RESPONSE = 128
"""Tokens per response; N / RESPONSE responses, the first half of which are the chosen ones."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
SINGLE = ("ours", "ours_kept", "plain", "megatron", "trl", "trl_lean", "liger", "liger_eager", "cut_ce")
SPLIT = ("ours", "ours_kept", "plain", "megatron")
LogProbs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [N, H], weight [V, H], labels [N]) -> [N]."""


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    vocab: int
    precision: str
    ranks: int = 1
    hidden: int = 512


@dataclass(frozen=True, kw_only=True)
class Given:
    """What all variants of a case get; the weight is this rank's shard."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    label_N: torch.Tensor

    @classmethod
    def draw(cls, case: Case, rank: int) -> "Given":
        torch.manual_seed(0)
        dtype = DTYPES[case.precision]
        hidden_NH = torch.randn(case.rows, case.hidden).to(dtype)
        weight_VH = (torch.randn(case.vocab, case.hidden) * 0.05).to(dtype).chunk(case.ranks)[rank].clone()
        return cls(
            hidden_NH=hidden_NH.requires_grad_(),
            weight_VH=weight_VH.requires_grad_(),
            label_N=torch.randint(case.vocab, (case.rows,)),
        )

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.hidden_NH.grad is not None
        assert self.weight_VH.grad is not None
        return self.hidden_NH.grad, self.weight_VH.grad

    def forget(self) -> None:
        self.hidden_NH.grad = self.weight_VH.grad = None


MODES = {
    "full": (
        [
            Case(rows=rows, vocab=vocab, precision=precision)
            for precision in DTYPES
            for vocab in (32000, 128256)
            for rows in (1024, 4096)
        ]
        + [Case(rows=4096, vocab=vocab, precision="fp32", ranks=2) for vocab in (32000, 128256)],
        7,
    ),
    "short": (
        [
            Case(rows=1024, vocab=32000, precision="bf16"),
            Case(rows=1024, vocab=128256, precision="fp32"),
            Case(rows=512, vocab=128256, precision="fp32", ranks=2),
        ],
        3,
    ),
    "tiny": (
        [Case(rows=512, vocab=640, precision="fp32", hidden=32, ranks=ranks) for ranks in (1, 2)],
        2,
    ),
}


def benchmark(mode: str) -> Report:
    cases, rounds = MODES[mode]
    results = [measure(case, rounds) for case in cases]
    return Report(
        name="head",
        title="Log-probabilities of the output layer, forward and backward: CPU time over that of ours",
        settings={"mode": mode, "rounds": rounds},
        results=results,
        summary=[summary(result) for result in results],
    )


def measure(case: Case, rounds: int) -> dict[str, Any]:
    names = SINGLE if case.ranks == 1 else SPLIT
    num_threads = 2 if case.ranks == 1 else 1
    by_rank = processes.run(time_all, case, names, rounds, ranks=case.ranks, num_threads=num_threads)
    _, unavailable = by_rank[0]
    running = [name for name in names if name not in unavailable]
    seconds = {
        name: [sum(times) for times in zip(*(rank[0][name] for rank in by_rank), strict=True)] for name in running
    }
    peaks = {name: max(processes.run(peak, case, name, ranks=case.ranks, num_threads=num_threads)) for name in running}
    gradient_mib = case.vocab // case.ranks * case.hidden * DTYPES[case.precision].itemsize / processes.MIB
    rows = [
        {
            "variant": name,
            "cpu_seconds": statistics.median(seconds[name]),
            "times_ours": str(ratio(seconds[name], seconds["ours"])),
            "peak_mib": peaks[name],
            "beyond_gradient": peaks[name] - gradient_mib,
        }
        for name in running
    ]
    print_table(f"{case.rows} rows, vocabulary {case.vocab}, {case.precision}, {case.ranks} rank(s)", rows)
    for name, reason in unavailable.items():
        print(f"{name}: {reason}", flush=True)
    found = {"cpu_seconds": seconds, "peak_mib": peaks, "weight_gradient_mib": gradient_mib, "unavailable": unavailable}
    return {**asdict(case), **found}


def time_all(case: Case, names: tuple[str, ...], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """CPU seconds of this rank in each round by variant, and why some cannot run; in every rank's process."""
    ranks = start(ParallelConfig(tensor=case.ranks))
    given = Given.draw(case, ranks.tp.rank)
    run_once("plain", given, case, ranks)
    wanted = [gradient.clone() for gradient in given.gradients()]
    steps, unavailable = {}, {}
    for name in names:
        try:
            run_once(name, given, case, ranks)
        except Exception as error:  # whatever a peer does on a machine that it was not made for
            unavailable[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        for found, target, of in zip(given.gradients(), wanted, ("hidden states", "weight"), strict=True):
            close(found, target, relative=TOLERANCE[case.precision], what=f"{name}: gradient of the {of}")
        steps[name] = partial(run_once, name, given, case, ranks)
    return in_turns(steps, rounds=rounds), unavailable


def peak(case: Case, name: str) -> float:
    """MiB of a variant above what it is given, after a first call on few rows."""
    ranks = start(ParallelConfig(tensor=case.ranks))
    given = Given.draw(case, ranks.tp.rank)
    few = Case(
        rows=2 * RESPONSE, vocab=256 * case.ranks, precision=case.precision, ranks=case.ranks, hidden=case.hidden
    )
    run_once(name, Given.draw(few, ranks.tp.rank), few, ranks)
    given.forget()
    return processes.Peak.start().of(partial(run_once, name, given, case, ranks))


def run_once(name: str, given: Given, case: Case, ranks: Groups) -> None:
    given.forget()
    if name.startswith("liger"):
        loss = liger_loss(given, compiled=name == "liger")
    else:
        logp_N = VARIANTS[name](case, ranks.tp)(given.hidden_NH, given.weight_VH, given.label_N)
        chosen, rejected = logp_N.float().view(-1, RESPONSE).sum(1).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
    loss.backward()
    if case.ranks > 1:  # as megatron's layers do; part of every variant's work
        torch.distributed.all_reduce(given.gradients()[0], group=ranks.tp.group)


def _ours(case: Case, tp: Axis, *, keep_mib: int | None = None) -> LogProbs:
    keep_bytes = choose_kept(keep_mib, "tiles", torch.device("cpu"))
    return lambda hidden, weight, label: token_logprobs(hidden, _shard(case, tp, weight), label, keep_bytes=keep_bytes)


def _plain(case: Case, tp: Axis) -> LogProbs:
    return lambda hidden, weight, label: plain_logprobs(hidden, _shard(case, tp, weight), label)


def _shard(case: Case, tp: Axis, weight: torch.Tensor) -> VocabShard:
    return VocabShard(weight_VH=weight, vocab_size=case.vocab, tp=tp)


def _megatron(case: Case, tp: Axis) -> LogProbs:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return lambda hidden, weight, label: -vocab_parallel_cross_entropy(F.linear(hidden, weight), label)


def _trl(case: Case, tp: Axis, *, lean: bool) -> LogProbs:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = () if lean else ("entropy", "mean_logits", "is_top1")

    def logps(hidden: torch.Tensor, weight: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        given = hidden, weight, None, label, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        logp_N: torch.Tensor = ChunkedLogProbFunction.apply(*given)[0]
        return logp_N

    return logps


def _cut_ce(case: Case, tp: Axis) -> LogProbs:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, label: (
        -linear_cross_entropy(hidden, weight, label, reduction="none", impl="torch_compile")
    )


def liger_loss(given: Given, *, compiled: bool) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)
    responses = given.hidden_NH.view(-1, RESPONSE, given.hidden_NH.shape[1])
    answer: torch.Tensor = loss(given.weight_VH, responses, given.label_N.view(-1, RESPONSE))[0]
    return answer


VARIANTS: dict[str, Callable[[Case, Axis], LogProbs]] = {
    "ours": _ours,
    "ours_kept": partial(_ours, keep_mib=2**20),
    "plain": _plain,
    "megatron": _megatron,
    "trl": partial(_trl, lean=False),
    "trl_lean": partial(_trl, lean=True),
    "cut_ce": _cut_ce,
}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """A row of the README's table. Memory is MiB beyond the weight's gradient."""
    seconds, peaks = result["cpu_seconds"], result["peak_mib"]
    row = {name: result[name] for name in ("rows", "precision", "ranks")} | {"vocabulary": words(result["vocab"])}
    for name in SINGLE[1:]:
        row[name] = str(ratio(seconds[name], seconds["ours"])) if name in seconds else "-"
    for name in ("ours", "ours_kept", "plain"):
        row[f"memory: {name}"] = peaks[name] - result["weight_gradient_mib"]
    return row


if __name__ == "__main__":
    main(__doc__, benchmark)
