"""Times passes: ``python -m benchmarks.throughput [--json OUT] [--repeats N]``. Statistics are part of the time.

Three ways run the same network on the same rows in turn: mcdrop, the plain loop over passes with torch's own dropout,
and the flip of ``nn.Dropout`` on rows repeated in memory, as most libraries do it. Medians, and ratios within a round.
What a way gives is checked: a spread of zero is named, not timed as if it were an answer.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mcdrop
from benchmarks.accuracy.report import environment
from benchmarks.throughput.networks import NETWORKS
from mcdrop.engine import PassPlan

CASES = [(1, 100), (32, 100), (256, 20)]  # rows, passes
Spread = tuple[Tensor, Tensor]


def draws_on(net: nn.Module) -> None:
    """Everything in training but batch norm: what a careful user's own loop does."""
    net.train()
    for module in net.modules():
        module.training = module.training and not isinstance(module, nn.modules.batchnorm._NormBase)


def flip(net: nn.Module) -> None:
    """Every nn.Dropout on, the rest in eval."""
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.training = True


def loop(net: nn.Module, x: Tensor, passes: int) -> Spread:
    """Pass after pass with torch's own dropout."""
    draws_on(net)
    outputs = torch.stack([net(x) for _ in range(passes)])
    return outputs.mean(0), outputs.var(0)


def repeated(net: nn.Module, x: Tensor, passes: int) -> Spread:
    """All passes at once, on rows repeated in memory."""
    flip(net)
    outputs = net(x.repeat(passes, *(1,) * (x.dim() - 1))).unflatten(0, (passes, len(x)))
    return outputs.mean(0), outputs.var(0)


def ways(net: nn.Module, x: Tensor, passes: int) -> dict[str, Callable[[], Spread]]:
    """The three ways; mcdrop is wrapped and has its masks before the clock starts, as in a service."""
    model, plan = mcdrop.wrap(net.eval(), example=x), PassPlan(passes)

    def ours() -> Spread:
        result = mcdrop.sample(model, x, plan)
        return torch.from_numpy(result.mean), torch.from_numpy(result.variance)

    return {"mcdrop": ours, "loop": lambda: loop(net, x, passes), "repeat": lambda: repeated(net, x, passes)}


def timed(run: Callable[[], Spread]) -> tuple[float, Spread]:
    """Gives seconds, and what was timed."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def measure(name: str, rows: int, passes: int, repeats: int) -> dict[str, Any]:
    """Gives milliseconds and ratios of one case; one round is not counted."""
    net, make = NETWORKS[name]()
    found = ways(net, make(rows), passes)
    with torch.no_grad():
        rounds = [{way: timed(run) for way, run in found.items()} for _ in range(repeats + 1)][1:]
    ours = [one["mcdrop"][0] for one in rounds]
    case: dict[str, Any] = {"network": name, "rows": rows, "passes": passes, "ways": {}}
    for way in found:
        seconds = [one[way][0] for one in rounds]
        spread = float(rounds[-1][way][1][1].double().mean().sqrt())
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
        case["ways"][way] = {
            "milliseconds": statistics.median(seconds) * 1e3,
            "times_mcdrop": statistics.median(ratios),
            "std": spread,
        }
    return case


def main() -> None:
    """Runs all cases and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description="Times passes on the CPU.")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.manual_seed(0)
    cases = []
    print(f"{'network':12} {'rows':>5} {'passes':>6} {'mcdrop ms':>10} {'loop':>8} {'repeat':>8}   (times mcdrop)")
    for name in NETWORKS:
        for rows, passes in CASES:
            case = measure(name, rows, passes, given.repeats)
            cases.append(case)
            found = case["ways"]
            told = {way: f"{one['times_mcdrop']:.1f}" if one["std"] > 0 else "0 spread" for way, one in found.items()}
            ours = found["mcdrop"]["milliseconds"]
            print(f"{name:12} {rows:5} {passes:6} {ours:10.2f} {told['loop']:>8} {told['repeat']:>8}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"environment": environment(), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
