"""Times passes: ``python -m benchmarks.throughput [--quick] [--only M1,M3] [--device cuda] [--json OUT]``.

``--leave-out compiled,memory`` saves minutes, and so do shorter samples: ``--sample 0.02 --each 0.5``.

All ways run the same network on the same rows in turn, mean and variance included in the time of each. What a way gives
is checked before it is timed: a spread of zero, or a wrong one, is named and not counted as an answer. Libraries that
are not installed are named too.
"""

import argparse
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.throughput.apart import measured_apart
from benchmarks.throughput.cases import CASES, MEMORY_CASES, MEMORY_WAYS, Case
from benchmarks.throughput.check import ANSWER
from benchmarks.throughput.measure import Effort, measure
from benchmarks.throughput.networks import NETWORKS
from benchmarks.throughput.peak import copied_per_second, products
from benchmarks.throughput.peers import versions

__all__ = ["main", "summary"]

Result = dict[str, Any]

LEFT_OUT = ("compiled", "memory")


def summary(cases: Sequence[Result]) -> Result:
    """Gives the geometric mean of the ratios to the best peer, and the smallest to it and to the plain loop."""
    peer = [case["peer_ratio"] for case in cases if case["peer_ratio"]]
    loop = [case["loop_ratio"] for case in cases if case["loop_ratio"]]
    return {
        "cases": len(cases),
        "cases_with_a_peer": len(peer),
        "geometric_mean_of_peer_ratio": math.exp(sum(map(math.log, peer)) / len(peer)) if peer else None,
        "smallest_peer_ratio": min(peer, default=None),
        "smallest_loop_ratio": min(loop, default=None),
    }


def told(case: Result) -> str:
    """Gives the lines of one case: ours, then every other way as times ours or by its status."""
    head = f"{case['network']}  {case['rows']} rows  {case['passes']} passes  limit {case['limit_ms']:.3g} ms"
    lines = [head]
    for name, way in case["ways"].items():
        said = way["status"]
        if said == ANSWER:
            times = "" if way["times_mcdrop"] is None else f"x{way['times_mcdrop']:<8.3g}"
            said = (
                f"{way['milliseconds']:10.3f} ms  {times} {way['share_of_limit']:6.1%} of its limit  "
                f"first call {way['first_call_ms']:.0f} ms  {way['rounds']} rounds  {way['mode']}"
            )
        lines.append(f"    {name:26} {said}")
    return "\n".join(lines)


def with_memory(cases: Sequence[Result], device: str, threads: int) -> None:
    """Adds the peak memory of the main ways to the cases that it is measured in."""
    for case in cases:
        if Case(case["network"], case["rows"], case["passes"]) in MEMORY_CASES:
            for name in MEMORY_WAYS:
                way = case["ways"][name]
                if way["status"] == ANSWER:
                    asked = {"way": name, "mode": way["mode"], "device": device, "threads": threads}
                    found = measured_apart(case["network"], case["rows"], case["passes"], **asked)
                    way["peak_mb"] = found["peak_mb"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cases, prints them as they come, and keeps them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description="Times passes.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the smallest case of each network, in two short rounds")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, such as M1,M3")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=float, default=0.1, help="seconds that a sample lasts at least")
    parser.add_argument("--each", type=float, default=2.5, help="seconds that all samples of a way last at most")
    parser.add_argument("--leave-out", default="", help="compiled, memory, or both with a comma")
    given = parser.parse_args(arguments)
    names = _listed(parser, "network", given.only, NETWORKS)
    left_out = _listed(parser, "part", given.leave_out, LEFT_OUT)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    torch.set_num_threads(given.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 for every way, and tf32 one of its own
    effort = Effort(2, 0.02, 0.5) if given.quick else Effort(given.rounds, given.sample, given.each)
    found: list[Result] = []
    largest = products(given.device)
    fastest = {name: product.operations / product.seconds for name, product in largest.items()}
    print("  ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in fastest.items()), flush=True)
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    about: Result = {"environment": environment(), "peers": versions(), "device": device, "peaks": fastest}
    if given.device == "cuda":
        about["copied_per_second"] = copied_per_second(given.device)
    for case in [case for case in CASES if case.network in names]:
        if given.quick and any(one["network"] == case.network for one in found):
            continue
        case = replace(case, compiled=case.compiled and "compiled" not in left_out)
        found.append(measure(case, device=given.device, effort=effort, products=largest))
        print(told(found[-1]), flush=True)
        _keep(given.json, about, found)  # what was measured before an interruption is measured
    if not given.quick and "memory" not in left_out:
        with_memory(found, given.device, given.threads)
    print(json.dumps(summary(found), indent=1))
    _keep(given.json, about, found)


def _listed(parser: argparse.ArgumentParser, what: str, given: str, known: Collection[str]) -> list[str]:
    """Gives the names of a list with commas; an unknown one ends the run."""
    names = [name for name in given.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown {what} {unknown[0]}; there are: {', '.join(known)}")
    return names


def _keep(path: Path | None, about: Result, found: list[Result]) -> None:
    """Writes the figures beside the file, and renames."""
    if path is not None:
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps({**about, "summary": summary(found), "cases": found}, indent=1) + "\n")
        beside.replace(path)


if __name__ == "__main__":
    main()
