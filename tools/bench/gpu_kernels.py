"""The GPU kernels of the output layer and of attention beside plain torch: milliseconds, TFLOP/s, memory. NOT YET RUN:
it was written where there was no GPU.

    python -m tools.bench.gpu_kernels [--rows 4096] [--hidden 4096] [--vocab 128256] [--prompt 1024] [--response 512]

1. Output layer, log-probabilities and their backward in bf16, on one GPU: all logits materialised, tiles by torch
   (model/vocab.py), tiles by Triton, Liger's kernel if it is installed; and the bare matrix multiplications, which
   nothing can be faster than. TFLOP/s count the four multiplications of a backward that makes the logits again (three
   where they are kept).
2. The same tiles by Triton in other sizes, to choose the constants of model/triton_logprobs.py by.
3. Attention, forward and backward, over groups of one prompt and four responses: prompts shared or not, a call per
   segment or FlexAttention. TFLOP/s count the pairs of tokens that see one another, so that the two layouts differ in
   work; compare milliseconds.

Each figure is the median of ten. Ends with status 2 where there is no GPU.
"""

import argparse
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rpo_megatron.distributed import Axis
from rpo_megatron.model import triton_logprobs
from rpo_megatron.model.attention import segment_attention
from rpo_megatron.model.flex import build_mask, flex_attention
from rpo_megatron.model.logprobs import token_logprobs
from rpo_megatron.model.row import Segments
from rpo_megatron.model.vocab import VocabShard

WARM_UP, ROUNDS = 3, 10
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
"""Of Llama-3.1-8B."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="scored tokens")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--response", type=int, default=512, help="tokens")
    parser.add_argument("--groups", type=int, default=5, help="groups of a row of attention")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    head = Head(num_rows=arguments.rows, hidden_size=arguments.hidden, vocab_size=arguments.vocab)
    measure_head(head)
    measure_tiles(head)
    measure_attention(prompt=arguments.prompt, response=arguments.response, groups=arguments.groups)
    return 0


def table(title: str) -> None:
    print(f"\n{title}\n{'':<28} {'ms':>8} {'TFLOP/s':>8} {'MiB':>8}")


def report(name: str, run: Callable[[], Any], *, flop: float) -> None:
    """Median time on the GPU, and the most memory that a run takes beyond what was there before."""
    try:
        for _ in range(WARM_UP):
            run()
    except torch.OutOfMemoryError:
        print(f"{name:<28} {'out of memory':>26}", flush=True)
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    ms = statistics.median(times)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    print(f"{name:<28} {ms:>8.2f} {flop / ms / 1e9:>8.0f} {memory:>8.0f}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Head:
    """Sizes of an output layer and of what it is applied to."""

    num_rows: int
    hidden_size: int
    vocab_size: int

    @property
    def flop(self) -> float:
        """Of one matrix multiplication."""
        return 2.0 * self.num_rows * self.hidden_size * self.vocab_size

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """hidden [N, H], weight [V, H], labels [N], gradients [N]."""
        generator = torch.Generator("cuda").manual_seed(0)
        hidden_NH, weight_VH = (
            torch.randn(size, self.hidden_size, generator=generator, device="cuda", dtype=torch.bfloat16)
            for size in (self.num_rows, self.vocab_size)
        )
        label_N = torch.randint(0, self.vocab_size, (self.num_rows,), generator=generator, device="cuda")
        grad_N = torch.rand(self.num_rows, generator=generator, device="cuda")
        return hidden_NH, weight_VH.mul_(self.hidden_size**-0.5), label_N, grad_N


def measure_head(head: Head) -> None:
    hidden_NH, weight_VH, label_N, grad_N = head.tensors()
    leaves = hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    tp = Axis(rank=0, size=1, group=None)
    shard = VocabShard(weight_VH=leaves[1], vocab_size=head.vocab_size, tp=tp)

    def matmuls() -> None:
        logits_NV = hidden_NH @ weight_VH.T
        torch.mm(hidden_NH, weight_VH.T, out=logits_NV)
        torch.mm(logits_NV, weight_VH)
        torch.mm(logits_NV.T, hidden_NH)

    def plain() -> torch.Tensor:
        return F.linear(*leaves).float().log_softmax(-1).gather(1, label_N[:, None])[:, 0]

    def liger() -> torch.Tensor:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

        nll_N: torch.Tensor = LigerFusedLinearScaledCrossEntropyFunction.apply(*leaves, label_N)
        return -nll_N

    def with_backward(function: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(), leaves, grad_N)

    table(f"output layer, {head}")
    report("bare multiplications", matmuls, flop=4 * head.flop)
    report("all logits", with_backward(plain), flop=3 * head.flop)
    report("tiles, torch", with_backward(lambda: token_logprobs(leaves[0], shard, label_N)), flop=4 * head.flop)
    forward, both = triton_runs(head)
    report("tiles, triton", both, flop=4 * head.flop)
    report("tiles, triton, forward", forward, flop=head.flop)
    if importlib.util.find_spec("liger_kernel") is not None:
        report("liger", with_backward(liger), flop=4 * head.flop)


def triton_runs(head: Head) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward, forward and backward); the weight's gradient has a place already, as in training."""
    hidden_NH, weight_VH, label_N, grad_N = head.tensors()
    total_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
    options: Any = {"num_words": head.vocab_size, "softcap": None}

    def forward() -> torch.Tensor:
        return triton_logprobs.forward_statistics(hidden_NH, weight_VH, label_N, **options)

    def both() -> torch.Tensor:
        max_N, sum_N, _ = forward()
        return triton_logprobs.backward(
            grad_N, hidden_NH, weight_VH, label_N, max_N, sum_N, **options, grad_weight_VH=total_VH
        )

    return forward, both


def measure_tiles(head: Head) -> None:
    chosen = triton_logprobs.TILE_ROWS, triton_logprobs.FORWARD_BYTES, triton_logprobs.BACKWARD_BYTES
    table("tiles by triton, rows x MiB of logits")
    for rows, size in itertools.product((1024, 2048, 4096), (16, 32, 64, 128, 256)):
        triton_logprobs.TILE_ROWS = rows
        triton_logprobs.FORWARD_BYTES = triton_logprobs.BACKWARD_BYTES = size * 2**20
        forward, both = triton_runs(head)
        report(f"{rows} x {size}, forward", forward, flop=head.flop)
        report(f"{rows} x {size}, both", both, flop=4 * head.flop)
    triton_logprobs.TILE_ROWS, triton_logprobs.FORWARD_BYTES, triton_logprobs.BACKWARD_BYTES = chosen


def measure_attention(*, prompt: int, response: int, groups: int) -> None:
    responses = 4
    shared = [prompt, *[response] * responses] * groups
    borders = [-1 if i % (responses + 1) == 0 else i - i % (responses + 1) for i in range(len(shared))]
    unshared = [prompt + response] * (responses * groups)
    table(f"attention, {groups} groups of a prompt of {prompt} and {responses} responses of {response}")
    for layout, lengths, prompts in (("shared", shared, borders), ("unshared", unshared, [-1] * len(unshared))):
        seen = sum(n * n / 2 + (n * lengths[p] if p >= 0 else 0) for n, p in zip(lengths, prompts, strict=True))
        flop = 3.5 * 4 * HEADS * HEAD_SIZE * seen  # the backward multiplies five times where the forward does twice
        query, key, value, grad = (
            torch.randn(sum(lengths), 1, heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )
        began = time.perf_counter()
        mask = build_mask(lengths, prompts, device=torch.device("cuda"))
        print(f"{layout + ', FlexAttention mask':<28} {(time.perf_counter() - began) * 1e3:>8.2f} (once per row)")
        segments = Segments(lengths=lengths, prompts=prompts)
        for name, attend in (
            ("per segment", lambda q, k, v, s=segments: segment_attention(q, k, v, s, scale=HEAD_SIZE**-0.5)),
            ("FlexAttention", lambda q, k, v, m=mask: flex_attention(q, k, v, m, scale=HEAD_SIZE**-0.5)),
        ):
            inputs = query, key, value

            def run(attend: Callable[..., torch.Tensor] = attend, inputs: Any = inputs, grad: Any = grad) -> Any:
                return torch.autograd.grad(attend(*inputs), inputs, grad.detach())

            report(f"{layout}, {name}", run, flop=flop)


if __name__ == "__main__":
    sys.exit(main())
