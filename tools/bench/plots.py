"""The figures of the README from what benchmarks wrote."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tools.bench.common import words

Document = Mapping[str, Any]


def draw(documents: Mapping[str, Document], folder: Path) -> list[Path]:
    """A PNG for every document that there is a figure for."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, function in FIGURES.items():
        if name in documents:
            figure = function(documents[name])
            figure.savefig(folder / f"{name}.png", dpi=90, bbox_inches="tight")
            plt.close(figure)
            written.append(folder / f"{name}.png")
    return written


def step(document: Document) -> Any:
    """Real tokens per CPU second, and peak memory, of every variant."""
    results = document["results"]
    names = list(dict.fromkeys(name for result in results for name in result["cpu_seconds"]))
    nothing = float("nan")
    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(11, 0.6 + 0.28 * len(results) * len(names)), sharey=True, layout="constrained"
    )
    tokens = {
        name: [r["real_tokens"] / statistics.median(r["cpu_seconds"].get(name, [nothing])) for r in results]
        for name in names
    }
    _bars(speed, tokens, "prompt and response tokens per CPU second")
    _bars(
        memory, {name: [r["peak_mib"].get(name, nothing) for r in results] for name in names}, "peak MiB above weights"
    )
    labels = [f"V {words(r['vocab'])}\nK {r['responses']}\nprompt {r['prompt']}" for r in results]
    speed.set_yticks(range(len(results)), labels)
    speed.invert_yaxis()
    figure.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=len(names) // 2)
    return figure


def head(document: Document) -> Any:
    """CPU time over ours, and peak memory beyond the weight's gradient, of every variant."""
    results = document["results"]
    names = list(dict.fromkeys(name for result in results for name in result["cpu_seconds"]))
    figure, (time, memory) = plt.subplots(
        1, 2, figsize=(11, 0.6 + 0.25 * len(results) * len(names)), sharey=True, layout="constrained"
    )
    medians = [{name: statistics.median(s) for name, s in result["cpu_seconds"].items()} for result in results]
    nothing = float("nan")
    _bars(time, {n: [m.get(n, nothing) / m["ours"] for m in medians] for n in names}, "CPU time over ours")
    beyond = {n: [r["peak_mib"].get(n, nothing) - r["weight_gradient_mib"] for r in results] for n in names}
    _bars(memory, beyond, "peak MiB beyond the weight's gradient")
    memory.set_xscale("log")
    labels = [f"{r['rows']} rows\nV {words(r['vocab'])}\n{r['precision']}, TP {r['ranks']}" for r in results]
    time.set_yticks(range(len(results)), labels)
    time.invert_yaxis()
    figure.legend(*time.get_legend_handles_labels(), loc="outside upper center", ncols=(len(names) + 1) // 2)
    return figure


def shared_prompt(document: Document) -> Any:
    """How much faster over how many fewer tokens."""
    results = document["results"]
    figure, axes = plt.subplots(figsize=(5, 4))
    for vocab in dict.fromkeys(result["vocab"] for result in results):
        mine = [result for result in results if result["vocab"] == vocab]
        axes.plot(
            *zip(*((r["tokens"], r["faster"]) for r in mine), strict=True), "o", label=f"vocabulary {words(vocab)}"
        )
    most = max(result["tokens"] for result in results)
    axes.plot([1, most], [1, most], "k-", linewidth=0.5, label="all of it")
    axes.plot([1, most], [0.85, 0.85 * most], "k:", linewidth=0.5, label="85 %")
    axes.set(xlabel="fewer tokens, K(P + R) / (P + KR)", ylabel="times faster")
    axes.legend()
    return figure


def growth(document: Document) -> Any:
    """CPU time and memory over each quantity, both axes logarithmic."""
    results = document["results"]
    quantities = list(dict.fromkeys(result["quantity"] for result in results))
    rows = -(-len(quantities) // 4)
    figure, panels = plt.subplots(rows, 4, figsize=(11, 2.6 * rows), squeeze=False, layout="constrained")
    for axes in panels.flat[len(quantities) :]:
        axes.remove()
    for axes, quantity in zip(panels.flat, quantities, strict=False):
        mine = [result for result in results if result["quantity"] == quantity]
        values = [result["value"] for result in mine]
        for what, label in (("cpu_seconds", "CPU s, all ranks"), ("peak_mib", "peak MiB, largest rank")):
            axes.loglog(values, [result[what] for result in mine], "o-", label=label)
        axes.set_xticks(values, [words(value) for value in values])
        axes.minorticks_off()
        axes.set_title(quantity)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _bars(axes: Axes, values: Mapping[str, list[float]], label: str) -> None:
    """A group of horizontal bars for each position, a bar for each name."""
    height = 0.8 / len(values)
    for number, (name, widths) in enumerate(values.items()):
        offsets = [position - 0.4 + (number + 0.5) * height for position in range(len(widths))]
        axes.barh(offsets, widths, height, label=name)
    axes.set_xlabel(label)


FIGURES = {"step": step, "head": head, "shared_prompt": shared_prompt, "growth": growth}
