"""The GPU kernels of the output layer and of attention beside plain torch: milliseconds, TFLOP/s, memory, and how exact
they are. NOT YET RUN: it was written where there was no GPU.

    python -m tools.bench.gpu_kernels head|attention|tiles [--rows 4096] [--results FILE.jsonl] [--tiny]

`head`: log-probabilities and their backward in bf16: all logits materialised, tiles by torch (model/vocab.py), tiles by
Triton, Liger's kernel if it is installed; and the bare matrix multiplications, which nothing can be faster than.
TFLOP/s count the four multiplications of a backward that makes the logits again (three where they are kept). `error` is
that of the gradient of the hidden states from fp32's, relative, over that of all logits in bf16: 1 is as good.

`attention`: forward and backward, over groups of one prompt and four responses, prompts shared or not, by every
implementation. TFLOP/s count the pairs of tokens that see one another, so that the two layouts differ in work; compare
milliseconds. `error` is that of the query's gradient from fp32's, over that of torch's attention per segment.

`tiles`: the tiles by Triton in other sizes, to choose the constants of model/triton_logprobs.py by.

Each figure is the median of ten.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import Axis, start, stop
from rpo_megatron.model import triton_logprobs
from rpo_megatron.model.attention import ATTENTION, AttentionName
from rpo_megatron.model.flex import build_mask
from rpo_megatron.model.logprobs import token_logprobs
from rpo_megatron.model.row import Segments
from rpo_megatron.model.vocab import VocabShard
from tools.bench import gpu_common
from tools.bench.gpu_common import Table, kernel

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
"""Of Llama-3.1-8B."""
RESPONSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["head", "attention", "tiles"])
    parser.add_argument("--rows", type=int, default=4096, help="scored tokens")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--response", type=int, default=512, help="tokens")
    parser.add_argument("--groups", type=int, default=5, help="groups of a row of attention")
    gpu_common.options(parser)
    arguments = parser.parse_args()
    start(ParallelConfig())  # megatron's device, also where there is no GPU
    head = Head(num_rows=arguments.rows, hidden_size=arguments.hidden, vocab_size=arguments.vocab)
    lengths = {name: getattr(arguments, name) for name in ("prompt", "response", "groups")}
    if arguments.tiny:
        head, lengths = Head(num_rows=32, hidden_size=64, vocab_size=512), {"prompt": 16, "response": 8, "groups": 2}
    if arguments.what == "attention":
        measure_attention(arguments, **lengths)
    else:
        {"head": measure_head, "tiles": measure_tiles}[arguments.what](arguments, head)
    stop()


@dataclass(frozen=True, kw_only=True)
class Head:
    """Sizes of an output layer and of what it is applied to."""

    num_rows: int
    hidden_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"{self.num_rows} tokens, hidden {self.hidden_size}, vocabulary {self.vocab_size}"

    @property
    def flop(self) -> float:
        """Of one matrix multiplication."""
        return 2.0 * self.num_rows * self.hidden_size * self.vocab_size

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """hidden [N, H], weight [V, H], labels [N], gradients [N]."""
        device = gpu_common.device()
        generator = torch.Generator(device).manual_seed(0)
        hidden_NH, weight_VH = (
            torch.randn(size, self.hidden_size, generator=generator, device=device, dtype=torch.bfloat16)
            for size in (self.num_rows, self.vocab_size)
        )
        label_N = torch.randint(0, self.vocab_size, (self.num_rows,), generator=generator, device=device)
        grad_N = torch.rand(self.num_rows, generator=generator, device=device)
        return hidden_NH, weight_VH.mul_(self.hidden_size**-0.5), label_N, grad_N


def measure_head(arguments: argparse.Namespace, head: Head) -> None:
    hidden_NH, weight_VH, label_N, grad_N = head.tensors()
    leaves = hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    shard = VocabShard(weight_VH=leaves[1], vocab_size=head.vocab_size, tp=Axis(rank=0, size=1, group=None))

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

    def both(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(), leaves, grad_N)

    exact_NH = exact_gradient(head)
    table = gpu_common.table(f"output layer: {head}", arguments)
    table.row("bare multiplications", lambda: kernel(matmuls, flop=4 * head.flop))
    own = float((both(plain)[0].float() - exact_NH).norm())

    def row(name: str, function: Callable[[], torch.Tensor], *, products: int) -> None:
        def measure() -> dict[str, Any]:
            error = float((both(function)[0].float() - exact_NH).norm()) / own
            return kernel(lambda: both(function), flop=products * head.flop) | {"error": error}

        table.row(name, measure)

    row("all logits", plain, products=3)
    row("tiles, torch", lambda: token_logprobs(leaves[0], shard, label_N), products=4)
    table.row("tiles, triton", lambda: triton_row(head, exact_NH, own))
    table.row("tiles, triton, forward", lambda: kernel(triton_runs(head)[0], flop=head.flop))
    row("liger", liger, products=4)


def exact_gradient(head: Head) -> torch.Tensor:
    """Of the hidden states, in fp32, a part of the tokens at a time."""
    hidden_NH, weight_VH, label_N, grad_N = head.tensors()
    parts = []
    for rows in torch.arange(head.num_rows, device=hidden_NH.device).split(512):
        logits_RV = hidden_NH[rows].float() @ weight_VH.float().T
        by_logits_RV = -logits_RV.softmax(-1)
        by_logits_RV[torch.arange(len(rows), device=rows.device), label_N[rows]] += 1
        parts.append((by_logits_RV * grad_N[rows, None]) @ weight_VH.float())
    return torch.cat(parts)


def triton_row(head: Head, exact_NH: torch.Tensor, own: float) -> dict[str, Any]:
    both = triton_runs(head)[1]
    error = float((both().float() - exact_NH).norm()) / own
    return kernel(both, flop=4 * head.flop) | {"error": error}


def triton_runs(head: Head) -> tuple[Callable[[], Any], Callable[[], torch.Tensor]]:
    """(forward, forward and backward); the weight's gradient has a place already, as in training."""
    hidden_NH, weight_VH, label_N, grad_N = head.tensors()
    total_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
    options: Any = {"num_words": head.vocab_size, "softcap": None}

    def forward() -> tuple[torch.Tensor, ...]:
        return triton_logprobs.forward_statistics(hidden_NH, weight_VH, label_N, **options)

    def both() -> torch.Tensor:
        max_N, sum_N, _ = forward()
        return triton_logprobs.backward(
            grad_N, hidden_NH, weight_VH, label_N, max_N, sum_N, **options, grad_weight_VH=total_VH
        )

    return forward, both


def measure_tiles(arguments: argparse.Namespace, head: Head) -> None:
    table = gpu_common.table(f"tiles by triton, rows x MiB of logits: {head}", arguments)
    for rows, size in itertools.product((2048, 4096, 1024), (64, 128, 32, 256)):
        triton_logprobs.TILE_ROWS = rows
        triton_logprobs.FORWARD_BYTES = triton_logprobs.BACKWARD_BYTES = size * 2**20
        table.row(f"{rows} x {size}, forward", lambda: kernel(triton_runs(head)[0], flop=head.flop))
        table.row(f"{rows} x {size}, both", lambda: kernel(triton_runs(head)[1], flop=4 * head.flop))


def measure_attention(arguments: argparse.Namespace, *, prompt: int, response: int, groups: int) -> None:
    title = f"attention: {groups} groups of a prompt of {prompt} and {RESPONSES} responses of {response}"
    table = gpu_common.table(title, arguments)
    shared = [prompt, *[response] * RESPONSES] * groups
    step = RESPONSES + 1
    borders = [-1 if i % step == 0 else i - i % step for i in range(len(shared))]
    unshared = [prompt + response] * (RESPONSES * groups)
    measure_layout(table, "shared", Segments(lengths=shared, prompts=borders), ["sdpa", "merged", "flex"])
    alone = Segments(lengths=unshared, prompts=[-1] * len(unshared))
    measure_layout(table, "unshared", alone, ["sdpa", "merged", "flex", "te"])


def measure_layout(table: Table, layout: str, segments: Segments, names: list[AttentionName]) -> None:
    lengths, prompts, device = segments.lengths, segments.prompts, gpu_common.device()
    seen = sum(n * n / 2 + (n * lengths[p] if p >= 0 else 0) for n, p in zip(lengths, prompts, strict=True))
    flop = 3.5 * 4 * HEADS * HEAD_SIZE * seen  # the backward multiplies five times where the forward does twice
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(sum(lengths), 1, heads, HEAD_SIZE, generator=generator, device=device, dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )

    def gradients(name: AttentionName, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key, value)]
        output = ATTENTION[name](*inputs, segments, scale=HEAD_SIZE**-0.5)
        return torch.autograd.grad(output, inputs, grad.to(dtype))

    exact = gradients("sdpa", torch.float32)[0]
    segments.masks.clear()
    own = float((gradients("sdpa")[0].float() - exact).norm())

    def measure(name: AttentionName) -> dict[str, Any]:
        error = float((gradients(name)[0].float() - exact).norm()) / own
        return kernel(lambda: gradients(name), flop=flop) | {"error": error}

    for name in names:
        table.row(f"{layout}, {name}", partial(measure, name))
    table.row(f"{layout}, mask of flex, made on the host", lambda: mask_time(segments))


def mask_time(segments: Segments) -> dict[str, Any]:
    """Milliseconds on the host, once per row."""
    began = time.perf_counter()
    build_mask(segments.lengths, segments.prompts, device=gpu_common.device())
    return {"ms": (time.perf_counter() - began) * 1e3}


if __name__ == "__main__":
    main()
