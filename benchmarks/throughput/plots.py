"""Plots of the results kept, beside them: speed of each way, and how time and memory grow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.throughput.check import ANSWER
from benchmarks.throughput.networks import NETWORKS

__all__ = ["draw_all"]

Result = dict[str, Any]

STYLES = {  # a way: its colour and marker
    "mcdrop": ("tab:red", "o"), "mcdrop bf16": ("tab:pink", "o"), "mcdrop tf32": ("tab:purple", "o"),
    "mcdrop compiled": ("tab:brown", "o"), "loop": ("black", "x"), "baal": ("tab:blue", "s"),
    "torch-uncertainty": ("tab:cyan", "D"), "repeat": ("gray", "+"), "vmap": ("tab:green", "^"),
    "onnxruntime": ("tab:orange", "v"),
}  # fmt: skip


def draw_all(folder: Path) -> list[Path]:
    """Draws a PNG beside each JSON of a folder that has a plot, and gives their paths."""
    drawn = []
    for name, draw in PLOTS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            figure = draw(json.loads(path.read_text(encoding="utf-8")))
            drawn.append(path.with_suffix(".png"))
            figure.savefig(drawn[-1], dpi=100, metadata={"Software": None})  # the same file from the same figures
    return drawn


def speeds(found: Result) -> Figure:
    """Gives rows times passes a second of each way, a panel for each network."""
    names = [name for name in NETWORKS if any(case["network"] == name for case in found["cases"])]
    figure = Figure(figsize=(13, 3.8 * ((len(names) + 2) // 3)), layout="constrained")
    for k, name in enumerate(names):
        axes = figure.add_subplot((len(names) + 2) // 3, min(3, len(names)), k + 1)
        cases = [case for case in found["cases"] if case["network"] == name]
        for way, (colour, marker) in STYLES.items():
            speed = [_speed(case, way) for case in cases]
            if any(speed):
                shown = [one or float("nan") for one in speed]
                axes.plot(range(len(cases)), shown, marker=marker, color=colour, label=way, linestyle=":", alpha=0.8)
        axes.set_yscale("log")
        axes.set_xticks(range(len(cases)), [f"{case['rows']}×{case['passes']}" for case in cases])
        axes.set_title(f"{name}: {NETWORKS[name].title}", fontsize=9)
        axes.set_xlabel("rows × passes")
        axes.set_ylabel("row passes a second")
        axes.grid(alpha=0.3)
    if names:
        handles = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    return figure


def _speed(case: Result, way: str) -> float | None:
    """Gives the speed of a way, or of its forced form where that stands in for it."""
    for key in (way, f"{way} forced"):
        one = case["ways"].get(key, {"status": ""})
        if one["status"] == ANSWER:
            return float(one["row_passes_per_second"])
    return None


def growth(found: Result) -> Figure:
    """Gives time and memory of each series, both logarithmic."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    whats = {"seconds": "seconds", "peak_mb": "MB above the network"}
    for row, (what, label) in enumerate(whats.items()):
        for k, (name, points) in enumerate(found["series"].items()):
            axes = figure.add_subplot(2, len(found["series"]), row * len(found["series"]) + k + 1)
            xs = [point[name] for point in points]
            ys = [max(point[what], 1e-3) for point in points]
            axes.loglog(xs, ys, "o-", color="tab:red")
            if what == "seconds":
                axes.loglog(xs, [ys[-1] * x / xs[-1] for x in xs], ":", color="gray", label="in proportion")
                axes.legend(fontsize=8)
            axes.set_xlabel(name)
            axes.set_ylabel(label)
            axes.grid(alpha=0.3, which="both")
    return figure


PLOTS: dict[str, Callable[[Result], Figure]] = {
    "throughput": speeds,
    "throughput-gpu": speeds,
    "throughput-scaling": growth,
}
