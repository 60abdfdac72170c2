"""Time to a given error: ``python -m benchmarks.throughput.error [--json OUT]``.

How long until the mean over passes has a standard error of 2 % of the spread of one pass? Independent passes need 2500
of them, whatever the network. Balanced masks and an exact last layer need fewer on a regression network, and how many
is measured here: by the error of many seeds against the mean of 200 000 passes. Then that many passes are timed.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.throughput.check import ANSWER, reference
from benchmarks.throughput.clock import median_ms, ratio
from benchmarks.throughput.measure import Effort, best_peer, take_turns
from benchmarks.throughput.networks import Network
from benchmarks.throughput.peers import versions
from benchmarks.throughput.prepare import Ready, prepared
from benchmarks.throughput.setting import Moments, Setting
from benchmarks.throughput.ways import EXACT, WAYS

__all__ = ["main", "passes_needed", "relative_error", "trained"]

TARGET = 0.02
INDEPENDENT = round(1 / TARGET**2)
TRUTH, CHUNK = 200_000, 2000
SEEDS, ROWS, STEPS = 40, 32, 2000
EFFORT = Effort(rounds=5, way_seconds=1.0)
OURS = (EXACT, "mcdrop")
OTHERS = ("loop", "baal", "torch-uncertainty", "repeat", "vmap")
NETWORK = Network(
    "MLP 8-50-50-1, dropout 0.1", lambda: trained(STEPS), (8,), 2 * 8 * 50, 2 * (50 * 50 + 50), 3200, 4 * 400
)


def trained(steps: int) -> nn.Module:
    """Gives a regression network trained for some steps on a made-up smooth function of eight inputs."""
    layers: list[nn.Module] = [nn.Linear(8, 50), nn.ReLU(), nn.Dropout(0.1), nn.Linear(50, 50), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(50, 1))
    x = torch.randn(1000, 8)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin() + 0.1 * torch.randn(1000, 1)
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        adam.zero_grad()
        nn.functional.mse_loss(net(x[rows]), y[rows]).backward()
        adam.step()
    return net


def truth_of(setting: Setting, passes: int, chunk: int) -> Moments:
    """Gives mean and variance of one pass, from many independent ones."""
    run = WAYS["repeat"](Setting(setting.network, setting.net, setting.x, chunk))[""]
    found = [run(seed) for seed in range(passes // chunk)]
    mean, variance = (torch.stack([one[k].double() for one in found]).mean(0) for k in range(2))
    return mean, variance


def relative_error(means: Sequence[Tensor], truth: Moments, passes: int) -> float:
    """Gives the root mean square error of means over rows and seeds, in spreads of one pass, less that of the truth."""
    errors = torch.stack([(mean.double() - truth[0]).square() / truth[1] for mean in means])
    return math.sqrt(max(0.0, float(errors.mean()) - 1 / passes))


def passes_needed(error_at: Callable[[int], float], target: float) -> int:
    """Gives the fewest passes whose error is at most the target, to five percent: by doubling, then by halving."""
    low, high = 2, 4
    while error_at(high) > target:
        low, high = high, 2 * high
    while high > max(low + 1, 1.05 * low):
        middle = (low + high) // 2
        low, high = (low, middle) if error_at(middle) <= target else (middle, high)
    return high


def errors_of(way: str, setting: Setting, truth: Moments, seeds: int) -> Callable[[int], float]:
    """Gives the function from passes to the relative error of a way."""

    def at(passes: int) -> float:
        run = next(iter(WAYS[way](Setting(setting.network, setting.net, setting.x, passes)).values()))
        return relative_error([run(seed)[0] for seed in range(seeds)], truth, TRUTH)

    return at


def timed(setting: Setting, needed: dict[str, int], effort: Effort) -> dict[str, Any]:
    """Gives milliseconds of each way with the passes that it needs, and how many times the first of ours."""
    checked = reference(setting)
    ready, ways = [], {}
    for name in (*needed, *OTHERS):
        passes = needed.get(name, INDEPENDENT)
        found = prepared(name, Setting(setting.network, setting.net, setting.x, passes), checked)
        ways[name] = {"status": found if isinstance(found, str) else ANSWER, "passes": passes}
        if isinstance(found, Ready):
            ready.append(found)
    wrong = {name: ways[name]["status"] for name in needed if ways[name]["status"] != ANSWER}
    if wrong:
        raise RuntimeError(f"no answer: {wrong}")
    take_turns(ready, effort)
    for way in ready:
        times = ratio(way.samples, ready[0].samples)
        ways[way.name] |= {"mode": way.mode, "milliseconds": median_ms(way.samples), "times_mcdrop": times}
    return ways


def main(arguments: Sequence[str] | None = None) -> None:
    """Finds the passes needed, times them, and keeps the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput.error")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, ROWS], help="batches to time; the last one is tried")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    net = NETWORK.made()
    setting = Setting(NETWORK, net, NETWORK.rows(ROWS), INDEPENDENT)
    truth = truth_of(setting, TRUTH, CHUNK)
    needed = {way: passes_needed(errors_of(way, setting, truth, SEEDS), TARGET) for way in OURS}
    independent = errors_of("repeat", setting, truth, SEEDS)(INDEPENDENT)
    print(f"passes needed: {needed}; {INDEPENDENT} independent ones leave {independent:.4f}", flush=True)
    batches = []
    for rows in given.rows:
        ways = timed(Setting(NETWORK, net, NETWORK.rows(rows), INDEPENDENT), needed, EFFORT)
        peer = best_peer(ways)
        batches.append({"rows": rows, "best_peer": peer, "ways": ways})
        print(json.dumps(batches[-1], indent=1), flush=True)
    if given.json:
        about = {"environment": environment(), "peers": versions(), "network": NETWORK.title, "target": TARGET}
        found = {"passes_needed": needed, "passes_independent": INDEPENDENT, "error_of_independent": independent}
        given.json.write_text(json.dumps({**about, **found, "batches": batches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
