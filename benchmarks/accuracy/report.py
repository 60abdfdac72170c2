"""Results as JSON and Markdown; run as a script, renews the section of benchmarks/README.md from the results kept."""

import json
from pathlib import Path
from typing import Any

import numpy

from benchmarks.accuracy.published import PUBLISHED, Figure
from benchmarks.environment import ROOT

__all__ = ["README", "markdown", "put_section"]

Result = dict[str, Any]

RESULTS = ROOT / "benchmarks" / "results" / "uci.json"
README = ROOT / "benchmarks" / "README.md"
MARKERS = ("<!-- uci -->", "<!-- /uci -->")

TABLES = {  # a run: its title, and what the published figures beside it are called
    "paper": ("The recipe of 2016, with its published drop rate and precision", ""),
    "ours": ("Our recipe against the best published Monte Carlo dropout", "best_"),
}


def markdown(results: Result) -> str:
    """Gives the tables: the 2016 recipe, ours against the best published, and what the intervals cover."""
    sets, env = results["sets"], results["environment"]
    parts = [
        "mean ± standard error over the published splits; log-likelihoods in nats a row, in the units of the target.",
        _table(sets, "paper"),
        _table(sets, "ours"),
        _coverage(sets),
        f"{_minutes(sets, 'seconds')} min of wall time, {_minutes(sets, 'train_seconds')} of them training, and "
        f"{_minutes(sets, 'processor_seconds')} min of processor time with {env['machine']['threads']} thread(s); "
        f"torch {env['versions']['torch']}, {env['machine']['processor']}, commit {env['commit']}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _minutes(sets: Result, what: str) -> str:
    return f"{sum(run[what] for one in sets.values() for run in one.values()) / 60:.1f}"


def _table(sets: Result, run: str) -> str:
    title, prefix = TABLES[run]
    rows = [f"**{title}**\n", "| set | RMSE published | RMSE here | log-likelihood published | here | passes |"]
    rows.append("|---|---|---|---|---|---|")
    for name, one in sets.items():
        if run in one:
            cells = [
                f"{_figure(getattr(PUBLISHED.get(name), prefix + kind, None))} | {_own(one[run][kind])}"
                for kind in ("rmse", "log_likelihood")
            ]
            rows.append(f"| {name} | {' | '.join(cells)} | {one[run]['passes']} |")
    return "\n".join(rows) if len(rows) > 3 else ""


def _figure(figure: Figure | None) -> str:
    return "-" if figure is None else f"{figure.mean:.3f} ± {figure.error:.3f}"


def _own(figure: Result) -> str:
    error = figure["standard_error"]
    return f"{figure['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _coverage(sets: Result) -> str:
    rows = [
        "**Share of test rows covered (mean width)**, passes only / with the noise of the head / split conformal\n",
        "| set | level | passes only | with noise | conformal | where chance puts conformal |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in sets.items():
        for level, at in one["ours"]["coverage"].items():
            cells = [f"{at[i]['covered']:.3f} ({_width(at[i])})" for i in ("normal", "predictive", "conformal")]
            low, high = at["band"]
            where = "" if low <= at["conformal"]["covered"] <= high else ": outside"
            rows.append(f"| {name} | {level} | {' | '.join(cells)} | {low:.3f} to {high:.3f}{where} |")
    return "\n".join(rows + _pooled(sets))


def _pooled(sets: Result) -> list[str]:
    """The mean over the sets, which are independent: so the squares of their bands' half widths add up."""
    rows = []
    for level in next(iter(sets.values()))["ours"]["coverage"]:
        cells = [one["ours"]["coverage"][level] for one in sets.values()]
        kinds = ("normal", "predictive", "conformal")
        means = [numpy.mean([cell[kind]["covered"] for cell in cells]) for kind in kinds]
        bands = numpy.array([cell["band"] for cell in cells])
        half = numpy.sqrt(numpy.square(numpy.diff(bands, axis=1) / 2).sum()) / len(cells)
        low, high = bands.mean() - half, bands.mean() + half
        where = "" if low <= means[2] <= high else ": outside"
        told = " | ".join(f"{mean:.3f}" for mean in means)
        rows.append(f"| mean of the sets | {level} | {told} | {low:.3f} to {high:.3f}{where} |")
    return rows


def _width(cell: Result) -> str:
    return "infinite" if cell["width"] is None else f"{cell['width']:.3g}"


def put_section(readme: Path, text: str, markers: tuple[str, str] = MARKERS) -> None:
    """Puts text between the markers of a README; adds them at its end, or the file, where they are missing."""
    old = readme.read_text(encoding="utf-8") if readme.is_file() else "# Benchmarks\n"
    begin, end = markers
    if begin not in old:
        old = old.rstrip("\n") + f"\n\n{begin}\n{end}\n"
    before, rest = old.split(begin, 1)
    readme.write_text(f"{before}{begin}\n{text}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    introduction = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    put_section(README, f"{introduction}\n{markdown(json.loads(RESULTS.read_text(encoding='utf-8')))}")
