"""The data path of large runs, simulated: which groups, which rank, which row, from synthetic lengths and no tokens.

    python tools/bench/data_path.py [--short] [OUTPUT.json]

Groups have lognormal lengths with a long tail: a prompt, K responses that share it; the longest are cut at 8,192
tokens. Costs are those of an 8-billion-parameter Llama. For each machine, means over a few steps:

    plan        CPU time to choose a step's groups out of 10 million and plan it, on every rank alike, in ms; the
                loader does it while the step before is computed
    rows        per rank and step; `fewest` is what the tokens of the step need at least
    useful      share of the computed tokens that is not padding
    imbalance   work of the busiest rank over the mean; `bound` is the least possible: no group is split
    uneven      the same for a rank's costliest row, for which a pipeline waits
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np

from rpo_megatron.data import sampler
from rpo_megatron.data.cost import CostModel, sizes_of, transformer_cost
from rpo_megatron.data.packing import pack

LLAMA_8B = {
    "layers": 32,
    "hidden": 4096,
    "ffn": 14336,
    "query_width": 4096,
    "key_width": 1024,
    "output_width": 128256,
}
MACHINES = [  # data-parallel ranks, groups per step, responses, tokens per row
    (1, 64, 2, 8192),
    (8, 64, 4, 8192),
    (8, 128, 4, 16384),
    (16, 256, 2, 8192),
    (64, 512, 4, 8192),
    (64, 512, 8, 16384),
    (512, 4096, 4, 16384),
    (1024, 8192, 4, 16384),
    (4096, 16384, 4, 16384),
    (4096, 16384, 2, 8192),
    (4096, 65536, 4, 16384),
]
STORE = 10_000_000
LONGEST = 8192
MULTIPLE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="write the numbers here, as JSON")
    parser.add_argument("--short", action="store_true", help="small machines, two steps each")
    arguments = parser.parse_args()
    machines = [machine for machine in MACHINES if machine[0] <= 64] if arguments.short else MACHINES
    print("   dp  groups   K  budget | plan ms |  rows fewest |  useful | imbalance  bound | uneven")
    results = []
    for dp_size, groups_per_step, num_responses, budget in machines:
        steps = 2 if arguments.short else max(3, 20 // max(1, dp_size // 64))
        result = simulate(dp_size, groups_per_step, num_responses, budget, num_steps=steps)
        results.append(result)
        print(
            f"{dp_size:>5} {groups_per_step:>7} {num_responses:>3} {budget:>7} | {result['plan_ms']:>7.1f} | "
            f"{result['rows']:>5.2f} {result['fewest_rows']:>6.2f} | {result['useful']:>7.2%} | "
            f"{result['imbalance']:>9.3f} {result['bound']:>6.3f} | {result['uneven']:>6.3f}",
            flush=True,
        )
    if arguments.output:
        arguments.output.write_text(json.dumps({"model": LLAMA_8B, "numpy": np.__version__, "results": results}))


def simulate(
    dp_size: int, groups_per_step: int, num_responses: int, budget: int, *, num_steps: int
) -> dict[str, float]:
    cost = transformer_cost(**LLAMA_8B)
    steps = [_step(step, dp_size, groups_per_step, num_responses, budget, cost) for step in range(num_steps)]
    means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
    return {"dp": dp_size, "groups": groups_per_step, "responses": num_responses, "budget": budget, **means}


def _step(
    step: int, dp_size: int, groups_per_step: int, num_responses: int, budget: int, cost: CostModel
) -> dict[str, float]:
    began = time.process_time()
    ids = sampler.group_ids(STORE, seed=0, consumed=step * groups_per_step, count=groups_per_step)
    chosen = time.process_time() - began
    prompt_G, response_S = _lengths(ids, num_responses)
    count_G = np.full(groups_per_step, num_responses)
    began = time.process_time()
    sizes = sizes_of(prompt_G, count_G, response_S, cost=cost, share_prompt=True)
    packed = pack(sizes, budget=budget, dp_size=dp_size, multiple=MULTIPLE)
    planned = time.process_time() - began
    balance, costs = packed.balance, sizes.cost_G
    rows = [[int(costs[row].sum()) for row in rank] for rank in packed.ranks]
    return {
        "plan_ms": 1000 * (chosen + planned),
        "rows": len(rows[0]),
        "fewest_rows": math.ceil(np.minimum(sizes.tokens_G, budget).sum() / (dp_size * budget)),
        "useful": balance.useful_tokens / balance.row_tokens,
        "imbalance": balance.max_cost / balance.mean_cost,
        "bound": max(1.0, int(costs.max()) / balance.mean_cost),
        "uneven": float(np.mean([max(rank) * len(rank) / sum(rank) for rank in rows if sum(rank)])),
    }


def _lengths(ids: np.ndarray, num_responses: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the groups `ids`: prompts, median 256, and their responses, median 300."""
    rng = np.random.default_rng(int(ids[0]))
    prompt_G = np.clip(rng.lognormal(math.log(256), 0.8, ids.size), 8, LONGEST // 4)
    response_GK = np.clip(rng.lognormal(math.log(300), 0.8, (ids.size, num_responses)), 1, LONGEST // 2)
    return prompt_G.astype(np.int64), response_GK.astype(np.int64).ravel()


if __name__ == "__main__":
    main()
