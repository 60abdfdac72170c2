"""Renews the throughput section of benchmarks/README.md, and its plots, from the results kept.

Run it with ``python -m benchmarks.throughput.report``.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.report import README, put_section
from benchmarks.environment import ROOT
from benchmarks.throughput.check import ANSWER
from benchmarks.throughput.networks import NETWORKS
from benchmarks.throughput.scaling import exponent

__all__ = ["MARKERS", "RESULTS", "section"]

Result = dict[str, Any]

RESULTS = ROOT / "benchmarks" / "results"
MARKERS = ("<!-- throughput -->", "<!-- /throughput -->")
COLUMNS = {  # a way and what its column is called; a forced one stands in its plain one's column
    "mcdrop bf16": "bf16", "mcdrop tf32": "tf32", "mcdrop compiled": "compiled", "loop": "loop", "baal": "baal",
    "torch-uncertainty": "torch-uncertainty", "repeat": "repeat", "vmap": "vmap", "onnxruntime": "onnxruntime",
}  # fmt: skip


def section(folder: Path) -> str:
    """Gives the section from the results in a folder; those that are not there are left out."""
    parts = [(Path(__file__).parent / "README.md").read_text(encoding="utf-8").rstrip("\n")]
    for name, write in (
        ("throughput", main_tables), ("throughput-error", error_table), ("throughput-scaling", scaling_table),
        ("throughput-gpu", main_tables),
    ):  # fmt: skip
        path = folder / f"{name}.json"
        if path.is_file():
            parts.append(write(json.loads(path.read_text(encoding="utf-8"))))
            if (folder / f"{name}.png").is_file():
                parts.append(f"![{name}](results/{name}.png)")
    return "\n\n".join(parts) + "\n"


def main_tables(found: Result) -> str:
    """Gives the headline, the table of all cases, what is no answer and why, and the memory."""
    env, total, device = found["environment"], found["summary"], found["device"]
    machine = env["machine"]["processor"] if device == "cpu" else device
    peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in found["peaks"].items())
    peers = ", ".join(f"{name} {version}" for name, version in found["peers"].items()) or "no other library installed"
    lines = [
        f"**{machine}**, {env['machine']['threads']} thread(s), torch {env['versions']['torch']}, {peers}, commit "
        f"{env['commit']}. Largest matrix product: {peaks} GFLOP/s."
        + (f" Copies: {found['copied_per_second'] / 1e9:,.0f} GB/s." if "copied_per_second" in found else "")
    ]
    if total["cases_with_a_peer"]:
        lines.append(
            f"Beside the faster peer of each case, mcdrop is {total['geometric_mean_of_peer_ratio']:.1f} times as fast "
            f"in the geometric mean of {total['cases_with_a_peer']} cases, and {total['smallest_peer_ratio']:.2f} "
            f"times in the worst; beside the plain loop {total['smallest_loop_ratio']:.2f} times in the worst."
        )
    return "\n\n".join([*lines, _cases(found["cases"]), _no_answers(found["cases"]), _memory(found["cases"])]).rstrip(
        "\n"
    )


def _cases(cases: list[Result]) -> str:
    used = {name: title for name, title in COLUMNS.items() if any(_times(case, name) != "-" for case in cases)}
    titles = "".join(f" {title} |" for title in used.values())
    rows = ["Milliseconds of mcdrop, and how many times as long every other way takes (* forced):\n"]
    rows.append(f"| network | rows | passes | mcdrop ms | row passes a second | share of limit | best peer |{titles}")
    rows.append("|---" * (7 + len(used)) + "|")
    for case in cases:
        ours = case["ways"]["mcdrop"]
        told = "- | - | -"
        if ours["status"] == ANSWER:
            told = f"{ours['milliseconds']:.3g} | {ours['row_passes_per_second']:,.0f} | {ours['share_of_limit']:.2f}"
        peer = f"**{case['peer_ratio']:.3g}**" if case["peer_ratio"] else "-"
        others = "".join(f" {_times(case, name)} |" for name in used)
        rows.append(f"| {case['network']} | {case['rows']} | {case['passes']} | {told} | {peer} |{others}")
    rows.append("\n" + "; ".join(f"{name}: {network.title}" for name, network in NETWORKS.items()) + ".")
    return "\n".join(rows)


def _times(case: Result, name: str) -> str:
    for key, mark in ((name, ""), (f"{name} forced", "*")):
        times = case["ways"].get(key, {}).get("times_mcdrop")
        if times:
            return f"{times:.3g}{mark}"
    return "-"


def _no_answers(cases: list[Result]) -> str:
    """Lists what was tried and is no answer; what was left out on purpose is in the JSON."""
    found: dict[str, list[str]] = {}
    for case in cases:
        for name, way in case["ways"].items():
            if way["status"] != ANSWER and not way["status"].startswith("skipped"):
                where = f"{case['network']} {case['rows']}x{case['passes']}"
                found.setdefault(f"{name}, {way['status']}", []).append(where)
    lines = [f"- {what} ({', '.join(where)})" for what, where in found.items()]
    return "\n".join(["No answers:\n", *lines]) if lines else "Every way that ran gave an answer."


def _memory(cases: list[Result]) -> str:
    lines = ["Most memory above the network ready to run, in MB, each in a process of its own:\n"]
    for case in cases:
        held = {name: way["peak_mb"] for name, way in case["ways"].items() if "peak_mb" in way}
        if held:
            told = ", ".join(f"{name} {megabytes:.0f}" for name, megabytes in held.items())
            lines.append(f"- {case['network']}, {case['rows']} rows, {case['passes']} passes: {told}")
    return "\n".join(lines) if len(lines) > 1 else ""


def error_table(found: Result) -> str:
    """Gives the time to a given error."""
    lines = [
        f"**Time to a standard error of {found['target']:.0%} of the spread** ({found['network']}): independent passes "
        f"need {found['passes_independent']} (measured error with these: {found['error_of_independent']:.2%}).\n",
        "| rows | way | passes | ms | times the first |\n|---|---|---|---|---|",
    ]
    for batch in found["batches"]:
        for name, way in batch["ways"].items():
            told = f"{way['milliseconds']:.3g} | {way['times_mcdrop']:.3g}" if way["status"] == ANSWER else "- | -"
            lines.append(f"| {batch['rows']} | {name} | {way['passes']} | {told} |")
    return "\n".join(lines)


def scaling_table(found: Result) -> str:
    """Gives the ends of each series, and the power by which time grows in its last step."""
    lines = [
        "**How time and memory grow** (M2; passes at 256 rows, rows at 100 passes, width at 32 rows and 100 passes):\n"
    ]
    lines.append(
        "| grows | from | to | s | MB above the network | power of time at the end |\n|---|---|---|---|---|---|"
    )
    for name, points in found["series"].items():
        ends = points[0], points[-1]
        power = exponent([point[name] for point in points], [point["seconds"] for point in points])
        told = [" to ".join(f"{end[what]:.3g}" for end in ends) for what in ("seconds", "peak_mb")]
        lines.append(f"| {name} | {ends[0][name]} | {ends[1][name]} | {' | '.join(told)} | {power:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from benchmarks.throughput.plots import draw_all  # needs matplotlib, which the tables do not

    draw_all(RESULTS)
    put_section(README, section(RESULTS), MARKERS)
