"""Training in bf16 and in every FP8 recipe from the same start on the same data, with a frozen reference beside it: how
far the policy is from its reference before the first step, and how the loss falls. NOT YET RUN on a GPU.

    python -m tools.bench.gpu_curves [--steps 120] [--results FILE.jsonl] [--tiny]

RPO on groups of random tokens with random rewards, which a model can only learn by heart. `step 0` is the mean
difference per token between the log-probabilities of policy and reference, which are the same weights: in bf16 it is 0,
else what the precision itself is worth; `to bf16` the same between the policy and one in bf16. `off` is how far the
mean loss of the last tenth of the steps is from the bf16 curve's, as a share of where that began.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rpo_megatron.config import Fp8Config, KernelsConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from rpo_megatron.data.rows import build_row
from rpo_megatron.data.store import Group
from rpo_megatron.distributed import Groups, start, stop
from rpo_megatron.model.build import wrap
from rpo_megatron.model.precision import check_hardware, frozen, row_alignment
from rpo_megatron.model.shape import ModelShape, read_shape
from rpo_megatron.objectives import objective
from rpo_megatron.training.forward import Batch, run_logps, run_objective, to_device, with_reference_logps
from rpo_megatron.training.optimizer import build_optimizer
from tools.bench import gpu_common
from tools.bench.common import TINY, Data, Size, write_config
from tools.bench.gpu_step import random_model

SIZE = Size(vocab=32000, hidden=1024, layers=8, heads=16, kv_heads=8, ffn=2816)
LOSS = ObjectiveConfig(method="rpo_bwd", beta=0.05, eta=1.0)
FP8: dict[str, Fp8Config] = {
    "bf16": Fp8Config(),
    "fp8 tensorwise": Fp8Config(recipe="tensorwise"),
    "fp8 tensorwise, reference in fp8": Fp8Config(recipe="tensorwise", reference_weights=True),
    "fp8 blockwise": Fp8Config(recipe="blockwise"),
    "fp8 delayed": Fp8Config(recipe="delayed"),
    "fp8 mxfp8": Fp8Config(recipe="mxfp8"),
    "fp8 tensorwise, ends in bf16": Fp8Config(recipe="tensorwise", bf16_layers=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    gpu_common.options(parser)
    arguments = parser.parse_args()
    ranks = start(ParallelConfig())
    with tempfile.TemporaryDirectory() as directory:
        write_config(Path(directory), TINY if arguments.tiny else SIZE)
        shape = read_shape(directory)
    groups = make_groups(shape, tiny=arguments.tiny)
    table = gpu_common.table(f"training: {arguments.steps} steps, {LOSS.method}", arguments)
    bf16: list[float] = []
    for name, fp8 in {"Transformer Engine in bf16": None, **FP8}.items():

        def measure(fp8: Fp8Config | None = fp8) -> dict[str, Any]:
            check_hardware(fp8 or Fp8Config())
            kernels = KernelsConfig(layers="transformer_engine" if fp8 is None else "auto")
            run = Run(shape, groups, ranks, fp8 or Fp8Config(), kernels)
            before, to_bf16 = run.differences()
            curve, seconds = run.train(arguments.steps)
            if not bf16:
                bf16.extend(run.bf16_curve(arguments.steps))
            tail = max(1, len(curve) // 10)
            off = abs(float(np.mean(curve[-tail:]) - np.mean(bf16[-tail:]))) / bf16[0]
            shown = [curve[i] for i in np.linspace(0, len(curve) - 1, 7).astype(int)]
            return {
                "step 0": before,
                "to bf16": to_bf16,
                "loss": " ".join(f"{loss:.4f}" for loss in shown),
                "off": off,
                "ms": seconds * 1e3,
            }

        table.row(name, measure)
    stop()


def make_groups(shape: ModelShape, *, tiny: bool) -> list[Group]:
    prompt, response, count = (16, 8, 4) if tiny else (128, 96, 32)
    data = Data(groups=count, responses=4, prompt=prompt, shortest=response // 2, longest=response)
    rng = np.random.default_rng(1)
    return [replace(group, reward=rng.random(4).astype(np.float32)) for group in data.make(vocab=shape.vocab_size)]


class Run:
    """A policy and its reference in one precision, drawn alike in all."""

    def __init__(
        self, shape: ModelShape, groups: list[Group], ranks: Groups, fp8: Fp8Config, kernels: KernelsConfig
    ) -> None:
        self.shape, self.groups, self.ranks = shape, groups, ranks
        self.policy = random_model(shape, ranks, fp8, kernels)
        self.reference = random_model(shape, ranks, frozen(fp8), kernels, fp8_weights=fp8.reference_weights)
        self.rows = self._rows(row_alignment(fp8))

    def _rows(self, multiple: int) -> list[Batch]:
        each, options = 8, {"multiple": multiple, "share_prompt": True}
        cut = [self.groups[i : i + each] for i in range(0, len(self.groups), each)]
        rows = [build_row(part, ids=np.arange(len(part)), draws=np.zeros(len(part)), **options) for part in cut]  # type: ignore[arg-type]
        return [to_device(row, self.ranks.device) for row in rows]

    def differences(self) -> tuple[float, float]:
        """Mean difference per token of the policy's log-probabilities from the reference's, and from bf16's."""
        policy = per_token(self.policy, self.rows)
        plain = random_model(self.shape, self.ranks, Fp8Config(), KernelsConfig())
        others = per_token(self.reference, self.rows), per_token(plain, self._rows(1))
        return tuple(float((policy - other).abs().mean()) for other in others)  # type: ignore[return-value]

    def train(self, steps: int) -> tuple[list[float], float]:
        """(loss of each step, median seconds of a step)."""
        rows = with_reference_logps(self.reference, self.rows)
        model = wrap(self.policy)
        optimizer = build_optimizer(OptimizerConfig(lr=3e-5), model, "bf16")
        loss, curve = objective.build(LOSS), []

        def step() -> None:
            model.zero_grad_buffer()
            optimizer.zero_grad()
            total, count = run_objective(model, rows, loss, train=True)["loss"]
            optimizer.step()
            curve.append(float(total) / float(count))

        times = gpu_common.seconds_of(step, warm_up=0, rounds=steps)
        return curve, statistics.median(times)

    def bf16_curve(self, steps: int) -> list[float]:
        """Of our own layers, to compare with."""
        return Run(self.shape, self.groups, self.ranks, Fp8Config(), KernelsConfig()).train(steps)[0]


def per_token(model: Any, rows: list[Batch]) -> torch.Tensor:
    """Mean log-probability per token of every response."""
    logps = run_logps(model, rows)
    return torch.cat([(logp / row.length_GK)[row.valid_GK] for logp, row in zip(logps, rows, strict=True)])


if __name__ == "__main__":
    main()
