"""One run in a process of its own, for the memory it takes above that of the network ready to run.

``measured_apart`` starts it; it prints JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT
from benchmarks.throughput.clock import Sample, sampled
from benchmarks.throughput.networks import NETWORKS, wide_network
from benchmarks.throughput.setting import Setting
from benchmarks.throughput.ways import WAYS

__all__ = ["measured_apart"]

REPEAT_BELOW = 1.0  # seconds; a longer run is timed the first time, with its masks drawn in it
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measured_apart(network: str, rows: int, passes: int, **more: object) -> dict[str, float]:
    """Gives seconds, busy and peak_mb of one run; more: way, mode, width, device and threads."""
    asked = [f"--{name}={value}" for name, value in more.items() if value is not None]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.throughput.apart", network, str(rows), str(passes)]
    done = subprocess.run([*command, *asked], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status(name: str) -> float:
    """Gives a line of the process's status in MB: VmRSS now, VmHWM at most since the last ``_forget``."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def _held(device: str) -> float:
    """Forgets the largest so far, and gives the MB held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    _CLEAR.write_text("5")
    return _status("VmRSS")


def _most(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM")


def main() -> None:
    """Prepares one way, runs it, and prints seconds and the most memory above what it held before."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput.apart")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("rows", type=int)
    parser.add_argument("passes", type=int)
    parser.add_argument("--way", default="mcdrop", choices=WAYS)
    parser.add_argument("--mode", default="")
    parser.add_argument("--width", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(json.dumps(_measured(given)))


def _measured(given: Any) -> dict[str, float]:
    network = wide_network(given.width) if given.width else NETWORKS[given.network]
    net, x = network.made().to(given.device), network.rows(given.rows).to(given.device)
    modes = WAYS[given.way](Setting(network, net, x, given.passes))
    run = modes.get(given.mode) or next(iter(modes.values()))
    held = _held(given.device)
    samples: list[Sample] = []
    while not samples or (sum(sample.seconds for sample in samples) < REPEAT_BELOW and len(samples) < 4):
        samples.append(sampled(lambda: run(0)))
    best = min(samples, key=lambda sample: sample.seconds)
    return {"seconds": best.seconds, "busy": best.busy, "peak_mb": _most(given.device) - held}


if __name__ == "__main__":
    main()
