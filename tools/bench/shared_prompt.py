"""CPU time of a training step's forward and backward without shared prompts, over that with them, in one run.

    python tools/bench/shared_prompt.py [OUTPUT.json]

A Llama of hidden size 512, 8 layers, 8 heads with 4 of keys and values, vocabulary 8,192, fp32, two threads; groups of
K responses of 64 to 256 tokens. The two layouts take turns on the same groups and weights. `tokens` is how many fewer
tokens a row has with sharing, K (P + R) / (P + K R); `share` is how much of that the clock sees. CPU time, because it
hardly changes when something else runs on the machine.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rpo_megatron import cpu

cpu.enable()

from rpo_megatron.config import ObjectiveConfig, ParallelConfig
from rpo_megatron.data.rows import build_row
from rpo_megatron.data.store import Group
from rpo_megatron.distributed import start, stop
from rpo_megatron.model.build import build, wrap
from rpo_megatron.model.shape import read_shape
from rpo_megatron.model.weights import load_random
from rpo_megatron.objectives import objective
from rpo_megatron.training.forward import run_objective, to_device

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
ROUNDS = 5


def main() -> None:
    torch.set_num_threads(2)
    groups = start(ParallelConfig())
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        shape = read_shape(directory)
    policy = build(shape, precision="fp32", sequence_parallel=False, groups=groups)
    load_random(policy, 0, groups)
    model = wrap(policy)
    sft = objective.build(ObjectiveConfig(method="sft", responses="all"))
    print(f"{'K':>3} {'prompt':>7} {'tokens':>8} {'faster':>8} {'lowest':>8} {'highest':>8} {'share':>7}")
    results = []
    for num_responses in (2, 4, 8):
        for prompt_length in (64, 256, 1024):
            result = measure(model, sft, num_responses=num_responses, prompt_length=prompt_length)
            results.append(result)
            print(
                f"{num_responses:>3} {prompt_length:>7} {result['tokens']:>8.2f} {result['faster']:>8.2f} "
                f"{result['lowest']:>8.2f} {result['highest']:>8.2f} {result['faster'] / result['tokens']:>7.0%}",
                flush=True,
            )
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"config": CONFIG, "torch": torch.__version__, "results": results}))
    stop()


def measure(model: Any, loss: objective.Objective, *, num_responses: int, prompt_length: int) -> dict[str, float]:
    """Medians over rounds in which both layouts run, one after the other."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(64, 256, num_responses).astype(int)
    group = Group(
        prompt=rng.integers(3, 8000, prompt_length),
        responses=[rng.integers(3, 8000, n) for n in lengths],
        reward=None,
        ref_logp=None,
    )
    rows = {
        shared: build_row([group], ids=np.array([0]), draws=np.zeros(1), multiple=1, share_prompt=shared)
        for shared in (False, True)
    }
    batches = {shared: to_device(row, torch.device("cpu")) for shared, row in rows.items()}
    ratios = []
    for round_number in range(ROUNDS + 1):
        seconds = {}
        for shared, batch in batches.items():
            model.zero_grad_buffer()
            began = time.process_time()
            run_objective(model, [batch], loss, train=True)
            seconds[shared] = time.process_time() - began
        if round_number:  # the first warms up
            ratios.append(seconds[False] / seconds[True])
    return {
        "responses": num_responses,
        "prompt": prompt_length,
        "tokens": rows[False].tokens_T.size / rows[True].tokens_T.size,
        "faster": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


if __name__ == "__main__":
    main()
