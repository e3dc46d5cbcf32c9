"""Whole training steps on one GPU, optimizer included: tokens per second, TFLOP/s, MFU, peak memory. NOT YET RUN there:
it was written where there was none.

    python -m tools.bench.gpu_step [OUTPUT.json] [--model 1b|8b-slice|tiny] [--responses 4] [--steps 6]

Random weights; groups of a prompt of 1,024 tokens and K responses of 512 (`tiny`: of 64 and 32, on any machine, to see
it run). TFLOP/s count what is computed: layers on every token, attention on the pairs that see one another, the output
layer on scored tokens, three times for the policy (four where its logits are made again) and once for a resident
reference. MFU is against the fastest matrix multiplication of this GPU, measured first; `real tok/s` counts every
response with its prompt, as if nothing were shared. A variant that this machine cannot run is listed with the reason.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rpo_megatron.config import Fp8Config, KernelsConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from rpo_megatron.data.rows import build_row
from rpo_megatron.data.store import Group
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.model.build import ScoringModel, build, wrap
from rpo_megatron.model.precision import check_hardware, row_alignment
from rpo_megatron.model.shape import ModelShape, num_parameters, padded_vocab, read_shape
from rpo_megatron.model.weights import load_random
from rpo_megatron.objectives import objective
from rpo_megatron.training.forward import run_objective, to_device, with_reference_logps
from rpo_megatron.training.optimizer import build_optimizer
from tools.bench.common import TINY, Report, Size, print_table, write_config

SIZES = {
    "1b": Size(vocab=128256, hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192),
    "8b-slice": Size(vocab=128256, hidden=4096, layers=8, heads=32, kv_heads=8, ffn=14336),
    "tiny": TINY,
}
"""Llama-3.2-1B (untied); eight layers of Llama-3.1-8B with all of its vocabulary, because the whole does not fit."""
LOSS = ObjectiveConfig(method="rpo_bwd", beta=0.01, eta=1.0)
TOKENS_PER_ROW = 16_384


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    fp8: Fp8Config = field(default_factory=Fp8Config)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    share_prompt: bool = True
    reference: str = "stored"


def variants() -> list[Variant]:
    te = KernelsConfig(layers="transformer_engine")
    recipes = ("delayed", "tensorwise", "blockwise", "mxfp8")
    return [
        Variant(name="bf16"),
        Variant(name="bf16, prompts not shared", share_prompt=False),
        Variant(name="bf16, resident reference", reference="resident"),
        Variant(name="bf16, FlexAttention", kernels=KernelsConfig(attention="flex")),
        Variant(name="bf16, Triton log-probs", kernels=KernelsConfig(logprobs="triton")),
        Variant(name="bf16, Transformer Engine", kernels=te),
        *(Variant(name=f"fp8 {recipe}", fp8=Fp8Config(recipe=recipe)) for recipe in recipes),  # type: ignore[arg-type]
        Variant(
            name="fp8 tensorwise, resident reference in fp8",
            fp8=Fp8Config(recipe="tensorwise", reference_weights=True),
            reference="resident",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--model", choices=SIZES, default="1b")
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="measured; two more warm up")
    arguments = parser.parse_args()
    ranks = start(ParallelConfig())
    ceiling = matmul_ceiling(ranks.device)
    print(f"fastest bf16 matrix multiplication: {ceiling / 1e12:.0f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        write_config(Path(directory), SIZES[arguments.model])
        shape = read_shape(directory)
    groups = make_groups(shape, responses=arguments.responses, tiny=arguments.model == "tiny")
    title = f"{arguments.model}, K={arguments.responses}, {num_parameters(shape):,} parameters, one training step"
    results = [measure(variant, shape, groups, ranks, ceiling, steps=arguments.steps) for variant in variants()]
    print_table(title, [{key: result.get(key, "") for key in results[0]} for result in results])
    settings = {"ceiling_tflops": ceiling / 1e12, **vars(arguments), "output": str(arguments.output)}
    if arguments.output:
        Report(name="gpu_step", title=title, settings=settings, results=results, summary=results).write(
            arguments.output
        )
    stop()


def make_groups(shape: ModelShape, *, responses: int, tiny: bool) -> list[Group]:
    """As many as fill a row without sharing."""
    prompt, response = (64, 32) if tiny else (1024, 512)
    count = 2 if tiny else max(1, TOKENS_PER_ROW // (responses * (prompt + response)))
    rng = np.random.default_rng(0)
    return [
        Group(
            prompt=rng.integers(3, shape.vocab_size, prompt),
            responses=[rng.integers(3, shape.vocab_size, response) for _ in range(responses)],
            reward=rng.random(responses).astype(np.float32),
            ref_logp=np.full(responses, -1000.0, dtype=np.float32),
        )
        for _ in range(count)
    ]


def measure(
    variant: Variant, shape: ModelShape, groups: list[Group], ranks: Groups, ceiling: float, *, steps: int
) -> dict[str, Any]:
    try:
        check_hardware(variant.fp8)
        step = prepare(variant, shape, groups, ranks)
        times = timed(step, steps=steps, device=ranks.device)
    except Exception as error:  # the other variants are measured all the same
        return {"variant": variant.name, "note": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
    seconds = statistics.median(times)
    flop = executed_flop(shape, groups, share_prompt=variant.share_prompt, reference=variant.reference == "resident")
    real = sum(group.prompt.size + tokens.size for group in groups for tokens in group.responses)
    memory = torch.cuda.max_memory_allocated() / 2**30 if ranks.device.type == "cuda" else float("nan")
    return {
        "variant": variant.name,
        "ms": seconds * 1e3,
        "real tok/s": round(real / seconds),
        "TFLOP/s": flop / seconds / 1e12,
        "MFU": flop / seconds / ceiling,
        "peak GiB": memory,
        "note": "",
    }


def prepare(variant: Variant, shape: ModelShape, groups: list[Group], ranks: Groups) -> Callable[[], None]:
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def model(*, fp8_weights: bool) -> ScoringModel:
        made = build(
            shape,
            precision="bf16",
            sequence_parallel=False,
            groups=ranks,
            kernels=variant.kernels,
            fp8=variant.fp8,
            fp8_weights=fp8_weights,
        )
        load_random(made, 0, ranks)
        return made

    wrapped = wrap(model(fp8_weights=False))
    optimizer = build_optimizer(OptimizerConfig(lr=1e-6), wrapped, "bf16")
    resident = variant.reference == "resident"
    reference = model(fp8_weights=variant.fp8.reference_weights) if resident else None
    loss = objective.build(LOSS)
    row = build_row(
        groups,
        ids=np.arange(len(groups)),
        draws=np.zeros(len(groups)),
        multiple=row_alignment(variant.fp8),
        share_prompt=variant.share_prompt,
    )

    def step() -> None:
        batches = [to_device(row, ranks.device)]
        if reference is not None:
            batches = with_reference_logps(reference, batches)
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        run_objective(wrapped, batches, loss, train=True)
        optimizer.step()

    return step


def timed(step: Callable[[], None], *, steps: int, device: torch.device) -> list[float]:
    times = []
    for number in range(steps + 2):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        if number >= 2:
            times.append(time.perf_counter() - began)
    return times


def executed_flop(shape: ModelShape, groups: list[Group], *, share_prompt: bool, reference: bool) -> float:
    """Multiplications and additions of a step's matrix products."""
    tokens = pairs = scored = 0.0
    for group in groups:
        prompt, lengths = float(group.prompt.size), [float(response.size) for response in group.responses]
        scored += sum(lengths)
        if share_prompt:
            tokens += prompt + sum(lengths)
            pairs += prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in lengths)
        else:
            tokens += sum(prompt + n for n in lengths)
            pairs += sum((prompt + n) ** 2 / 2 for n in lengths)
    output = padded_vocab(shape) * shape.hidden_size
    body = num_parameters(shape) - 2 * shape.vocab_size * shape.hidden_size
    forward = 2 * body * tokens + 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
    head = 2 * output * scored
    return (3 + reference) * forward + (4 + reference) * head


def matmul_ceiling(device: torch.device) -> float:
    """FLOP/s of the fastest of a few large bf16 multiplications."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (512,):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        times = timed(lambda a=a, b=b: torch.mm(a, b), steps=10, device=device)  # type: ignore[misc]
        best = max(best, 2 * size**3 / min(times))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
