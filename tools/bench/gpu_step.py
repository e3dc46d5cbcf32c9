"""Whole training steps on one GPU, optimizer included: tokens per second, TFLOP/s, MFU, peak memory. NOT YET RUN there:
it was written where there was none.

    python -m tools.bench.gpu_step [--model 1b|8b-slice] [--responses 4] [--steps 5] [--results FILE.jsonl] [--tiny]

Random weights; groups of a prompt of 1,024 tokens and K responses of 512, packed into rows of up to 16,384 tokens, as
many as fill two rows with shared prompts (`--tiny`: a model and groups for any machine, to see it run). TFLOP/s count
what is computed: layers on every token, attention on the pairs that see one another, the output layer on scored tokens,
three times for the policy (four where its logits are made again) and once for a resident reference. MFU is against the
fastest matrix multiplication of this GPU, measured first; `real tok/s` counts every response with its prompt, as if
nothing were shared; `syncs` are the places where the host waits for the GPU in a step. `reference GiB` is what a
resident reference adds. A variant that this machine cannot run is listed with the reason.
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rpo_megatron.config import Fp8Config, KernelsConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from rpo_megatron.data.microbatch import MicroBatch
from rpo_megatron.data.rows import build_row
from rpo_megatron.data.store import Group
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.model.build import build, wrap
from rpo_megatron.model.precision import check_hardware, frozen, row_alignment
from rpo_megatron.model.shape import ModelShape, num_parameters, padded_vocab, read_shape
from rpo_megatron.objectives import objective
from rpo_megatron.training.forward import run_objective, to_device, with_reference_logps
from rpo_megatron.training.optimizer import build_optimizer
from tools.bench import gpu_common
from tools.bench.common import TINY, Data, Size, real_tokens, write_config

SIZES = {
    "8b-slice": Size(vocab=128256, hidden=4096, layers=6, heads=32, kv_heads=8, ffn=14336),
    "1b": Size(vocab=128256, hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192),
}
"""Six layers of Llama-3.1-8B with all of its vocabulary, because the whole does not fit; Llama-3.2-1B (untied)."""
LOSS = ObjectiveConfig(method="rpo_bwd", beta=0.01, eta=1.0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step's groups, and the longest row that they are packed into."""

    groups: list[Group]
    tokens_per_row: int

    @classmethod
    def of(cls, shape: ModelShape, *, responses: int, tiny: bool) -> "Work":
        prompt, response, tokens_per_row = (64, 32, 512) if tiny else (1024, 512, 16_384)
        count = 2 * (tokens_per_row // (prompt + responses * response))
        data = Data(groups=count, responses=responses, prompt=prompt, shortest=response, longest=response)
        ref_logp = np.full(responses, -1000.0, dtype=np.float32)
        groups = [replace(group, ref_logp=ref_logp) for group in data.make(vocab=shape.vocab_size)]
        return cls(groups=groups, tokens_per_row=tokens_per_row)

    def rows(self, *, share_prompt: bool, multiple: int) -> Iterator[MicroBatch]:
        first = self.groups[0]
        lengths = [response.size for response in first.responses]
        tokens = first.prompt.size * (1 if share_prompt else len(lengths)) + sum(lengths)
        each = max(1, self.tokens_per_row // tokens)
        for begin in range(0, len(self.groups), each):
            groups = self.groups[begin : begin + each]
            ids, draws = np.arange(len(groups)), np.zeros(len(groups))
            yield build_row(groups, ids=ids, draws=draws, multiple=multiple, share_prompt=share_prompt)


@dataclass(frozen=True, kw_only=True)
class Variant:
    fp8: Fp8Config = field(default_factory=Fp8Config)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    share_prompt: bool = True
    reference: str = "stored"


def variants() -> dict[str, Variant]:
    """The most telling first: what is last may find the time over."""
    te, tensorwise = KernelsConfig(layers="transformer_engine"), Fp8Config(recipe="tensorwise")
    merged = KernelsConfig(attention="merged")
    return {
        "bf16": Variant(),
        "fp8 tensorwise": Variant(fp8=tensorwise),
        "bf16, merged attention": Variant(kernels=merged),
        "fp8 tensorwise, merged attention": Variant(fp8=tensorwise, kernels=merged),
        "bf16, prompts not shared": Variant(share_prompt=False),
        "bf16, te attention, prompts not shared": Variant(kernels=KernelsConfig(attention="te"), share_prompt=False),
        "bf16, flex attention": Variant(kernels=KernelsConfig(attention="flex")),
        "bf16, triton log-probs": Variant(kernels=KernelsConfig(logprobs="triton")),
        "bf16, Transformer Engine layers": Variant(kernels=te),
        "bf16, resident reference": Variant(reference="resident"),
        "fp8 tensorwise, resident reference": Variant(fp8=tensorwise, reference="resident"),
        "fp8 tensorwise, resident reference in fp8": Variant(
            fp8=Fp8Config(recipe="tensorwise", reference_weights=True), reference="resident"
        ),
        "fp8 blockwise": Variant(fp8=Fp8Config(recipe="blockwise")),
        "fp8 delayed": Variant(fp8=Fp8Config(recipe="delayed")),
        "fp8 mxfp8": Variant(fp8=Fp8Config(recipe="mxfp8")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="1b")
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="measured; two more warm up")
    parser.add_argument("--first", type=int, help="measure only so many variants")
    gpu_common.options(parser)
    arguments = parser.parse_args()
    ranks = start(ParallelConfig())
    ceiling = gpu_common.matmul_ceiling()
    with tempfile.TemporaryDirectory() as directory:
        write_config(Path(directory), TINY if arguments.tiny else SIZES[arguments.model])
        shape = read_shape(directory)
    work = Work.of(shape, responses=arguments.responses, tiny=arguments.tiny)
    title = f"step: {arguments.model}, K={arguments.responses}, {num_parameters(shape) / 1e9:.2f} G parameters"
    table = gpu_common.table(title, arguments)
    table.row("fastest bf16 multiplication", lambda: {"TFLOP/s": ceiling / 1e12})
    for name, variant in list(variants().items())[: arguments.first]:
        table.row(
            name,
            lambda variant=variant: measure(variant, shape, work, ranks, ceiling, arguments.steps),  # type: ignore[misc]
        )
    stop()


def measure(
    variant: Variant, shape: ModelShape, work: Work, ranks: Groups, ceiling: float, steps: int
) -> dict[str, Any]:
    check_hardware(variant.fp8)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step, reference_bytes = prepare(variant, shape, work, ranks)
    seconds = statistics.median(gpu_common.seconds_of(step, warm_up=2, rounds=steps))
    resident = variant.reference == "resident"
    flop = executed_flop(shape, work.groups, share_prompt=variant.share_prompt, reference=resident)
    found = {
        "ms": seconds * 1e3,
        "real tok/s": round(real_tokens(work.groups) / seconds),
        "TFLOP/s": flop / seconds / 1e12,
        "MFU": flop / seconds / ceiling,
    }
    if ranks.device.type == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        found["syncs"] = waits(step)
    return found | ({"reference GiB": reference_bytes / 2**30} if resident else {})


def prepare(variant: Variant, shape: ModelShape, work: Work, ranks: Groups) -> tuple[Callable[[], None], int]:
    """(one training step, bytes on the GPU of the resident reference)."""
    before = _allocated()
    reference = None
    if variant.reference == "resident":
        fp8_weights = variant.fp8.reference_weights
        reference = random_model(shape, ranks, frozen(variant.fp8), variant.kernels, fp8_weights=fp8_weights)
    reference_bytes = _allocated() - before
    wrapped = wrap(random_model(shape, ranks, variant.fp8, variant.kernels))
    optimizer = build_optimizer(OptimizerConfig(lr=1e-6), wrapped, "bf16")
    loss = objective.build(LOSS)
    rows = list(work.rows(share_prompt=variant.share_prompt, multiple=row_alignment(variant.fp8)))

    def step() -> None:
        batches = [to_device(row, ranks.device) for row in rows]
        if reference is not None:
            batches = with_reference_logps(reference, batches)
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        run_objective(wrapped, batches, loss, train=True)
        optimizer.step()

    return step, reference_bytes


def random_model(
    shape: ModelShape, ranks: Groups, fp8: Fp8Config, kernels: KernelsConfig, *, fp8_weights: bool = False
) -> Any:
    """A model in bf16 with weights drawn on the device, the same in every call: on the host, a billion of them take a
    minute."""
    model = build(
        shape,
        precision="bf16",
        sequence_parallel=False,
        groups=ranks,
        kernels=kernels,
        fp8=fp8,
        fp8_weights=fp8_weights,
    )
    generator = torch.Generator(gpu_common.device()).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            shape, device = parameter.shape, gpu_common.device()
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            parameter.copy_(drawn * 0.02)
    return model


def waits(step: Callable[[], None]) -> int:
    """How often the host waits for the GPU in a step, as torch sees it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message).lower()]
    for place in sorted(set(places)):
        print(f"    waits at {place}, {places.count(place)} times", flush=True)
    return len(places)


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


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    main()
