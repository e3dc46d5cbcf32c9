"""EXPO's two bandit experiments (arXiv 2506.07492), with the objectives of rpo_megatron: two minutes on two cores.

    python examples/expo_bandits/run.py [OUTPUT_DIRECTORY]

Interpolation: one prompt, pi* = [.6, .3, .1], pi_ref = [.4, .4, .2]. With a strong regulariser every method ends at
    the reference. With a weak one a method should end at pi*, the policy that agrees with the labels.
Preservation: two prompts. On the good one the reference is optimal and should be kept, whatever lambda; on the bad one
    it is not and should be improved.
"""

import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bandits


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One experiment, as in the authors' notebooks. Arrays are [P, A]."""

    optimal: np.ndarray
    reference: np.ndarray
    lambdas: list[float]
    draws: int
    seed: int
    batch_size: int
    methods: dict[str, tuple[int, float]]
    """Epochs and learning rate."""


SETTINGS = {
    "interpolation": Setting(
        optimal=np.array([[0.6, 0.3, 0.1]]),
        reference=np.array([[0.4, 0.4, 0.2]]),
        lambdas=[1e-5, 100.0],
        draws=300,
        seed=100,
        batch_size=20,
        methods={"dpo": (1000, 1e-3), "ipo": (1000, 1e-3), "f_dpo": (3000, 1e-3), "expo": (1000, 5e-4)},
    ),
    "preservation": Setting(
        optimal=np.array([[0.6, 0.3, 0.1], [0.6, 0.2, 0.2]]),
        reference=np.array([[0.6, 0.3, 0.1], [0.4, 0.2, 0.4]]),
        lambdas=[math.exp(x) for x in range(-5, 6)],
        draws=200,
        seed=99,
        batch_size=1,
        methods={"dpo": (50, 1e-3), "ipo": (50, 1e-3), "f_dpo": (100, 1e-3), "expo": (200, 5e-4)},
    ),
}
COLOURS = ("#31688e", "#35b779", "#c9b035")
TITLES = {"dpo": "DPO", "ipo": "IPO", "f_dpo": "f-DPO (JSD)", "expo": "EXPO"}
WEAK = {"dpo": (0.994, 0.006, 0.0), "ipo": (1.0, 0.0, 0.0), "f_dpo": (1.0, 0.0, 0.0), "expo": (0.610, 0.292, 0.099)}
STRONG = (0.403, 0.400, 0.197)
GOOD = {
    "dpo": (0.765, 0.516, 0.062, 0.0),
    "ipo": (0.779, 0.170, 0.003, 0.0),
    "f_dpo": (1.719, 0.936, 0.131, 0.0),
    "expo": (0.0047, 0.0040, 0.0018, 0.0),
}
BAD = {
    "dpo": (0.691, 0.448, 0.020, 0.033),
    "ipo": (0.705, 0.129, 0.017, 0.035),
    "expo": (0.0053, 0.0027, 0.0007, 0.034),
}
"""What the authors' notebooks give. They print no numbers: these are from a run of them that agreed with their figures.
WEAK, STRONG: policies at lambda = 1e-5 and 100. GOOD, BAD: KL(pi* || pi) / 3 at log lambda = SHOWN."""
SHOWN = (-5, -2, 0, 5)


def main() -> None:
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/expo_bandits")
    began = time.perf_counter()
    policies = run_all()
    interpolation = {method: policies["interpolation", method][:, 0] for method in TITLES}
    distances = {method: distance(policies["preservation", method]) for method in TITLES}
    print("\n".join(interpolation_table(interpolation)))
    print("\n".join(preservation_table(distances)))
    print(f"\n{time.perf_counter() - began:.0f} s")
    draw(output, interpolation, distances)


def run_all() -> dict[tuple[str, str], np.ndarray]:
    """(experiment, method) -> policies [L, P, A]; the longest tasks first, two at a time."""
    tasks = [(experiment, method) for experiment in ("preservation", "interpolation") for method in reversed(TITLES)]
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), **one_thread) as pool:
        return dict(zip(tasks, pool.map(run_one, *zip(*tasks, strict=True)), strict=True))


def run_one(experiment: str, method: str, *, shorter: int = 1) -> np.ndarray:
    """Policies [L, P, A] of one method; `shorter` divides the number of epochs."""
    setting = SETTINGS[experiment]
    epochs, lr = setting.methods[method]
    pairs = bandits.draw_pairs(setting.optimal, draws=setting.draws, seed=setting.seed)
    return bandits.train(
        bandits.LOSSES[method](),
        pairs,
        setting.reference,
        setting.lambdas,
        epochs=max(1, epochs // shorter),
        batch_size=setting.batch_size,
        lr=lr,
    )


def distance(policies_LPA: np.ndarray) -> np.ndarray:
    """KL(pi* || pi) / 3, the measure of the paper's figure: [L, P]."""
    optimal_PA = SETTINGS["preservation"].optimal
    return (optimal_PA * np.log(optimal_PA / policies_LPA)).sum(axis=-1) / bandits.ARMS


# ------------------------------------------------------------------------------------------------ tables


def interpolation_table(policies: dict[str, np.ndarray]) -> list[str]:
    lines = ["", "Interpolation: policy over the three arms (pi* = .6 .3 .1, pi_ref = .4 .4 .2)", ""]
    lines.append(f"{'':12} {'lambda = 1e-5':>18} {'notebook':>18}   {'lambda = 100':>18} {'notebook':>18}")
    for method, policy_LA in policies.items():
        cells = [_policy(row) for row in (policy_LA[0], WEAK[method], policy_LA[1], STRONG)]
        lines.append(f"{TITLES[method]:12} {cells[0]:>18} {cells[1]:>18}   {cells[2]:>18} {cells[3]:>18}")
    return lines


def preservation_table(distances: dict[str, np.ndarray]) -> list[str]:
    lines = []
    names = ("good prompt: the reference is optimal, keep it", "bad prompt: the reference is not, improve it")
    for prompt, (name, notebook) in enumerate(zip(names, (GOOD, BAD), strict=True)):
        reference = distance(SETTINGS["preservation"].reference[None])[0, prompt]
        lines += ["", f"Preservation, {name}: KL(pi* || pi) / 3 (of the reference itself: {reference:.4f})", ""]
        lines.append(f"{'log lambda':12} " + "   ".join(f"{x:>7} {'notebook':>9}" for x in SHOWN))
        for method, distance_LP in distances.items():
            theirs = notebook.get(method)
            cells = [
                f"{distance_LP[x + 5, prompt]:7.4f} {'-' if theirs is None else format(theirs[i], '.4f'):>9}"
                for i, x in enumerate(SHOWN)
            ]
            lines.append(f"{TITLES[method]:12} " + "   ".join(cells))
    return lines


def _policy(values: np.ndarray | tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


# ------------------------------------------------------------------------------------------------ figures


def draw(output: Path, interpolation: dict[str, np.ndarray], distances: dict[str, np.ndarray]) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("agg")
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("interpolation", interpolation_figure(interpolation)),
        ("preservation", preservation_figure(distances)),
    ):
        figure.savefig(output / f"{name}.png", dpi=150)
        print(output / f"{name}.png")


def interpolation_figure(policies: dict[str, np.ndarray]) -> Any:
    from matplotlib import pyplot as plt

    setting = SETTINGS["interpolation"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for run, axis in enumerate(axes):
        bars = {"pi*": setting.optimal[0]} | {TITLES[method]: policies[method][run] for method in policies}
        bars |= {"reference": setting.reference[0]}
        for arm in range(bandits.ARMS):
            axis.bar(
                [i + (arm - 1) * 0.27 for i in range(len(bars))],
                [policy_A[arm] for policy_A in bars.values()],
                width=0.25,
                color=COLOURS[arm],
                label=f"arm {arm + 1}",
            )
        axis.set_xticks(range(len(bars)), list(bars))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(("weak", "strong")[run] + f" regulariser, lambda = {setting.lambdas[run]:g}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def preservation_figure(distances: dict[str, np.ndarray]) -> Any:
    from matplotlib import pyplot as plt

    logs = [math.log(value) for value in SETTINGS["preservation"].lambdas]
    references = distance(SETTINGS["preservation"].reference[None])[0]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for prompt, axis in enumerate(axes):
        for method, distance_LP in distances.items():
            heavy = 2.4 if method == "expo" else 1.3
            axis.plot(logs, distance_LP[:, prompt], marker="o", markersize=3, linewidth=heavy, label=TITLES[method])
        axis.axhline(references[prompt], color="grey", linestyle="--", linewidth=1, label="reference")
        axis.set_title(("good prompt: pi_ref = pi*", "bad prompt: pi_ref differs from pi*")[prompt], fontsize=10)
        axis.set_xlabel("log lambda")
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.set_ylim(bottom=-1e-3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL(pi* || pi) / 3")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
