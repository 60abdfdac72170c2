"""How time and memory grow: ``python -m benchmarks.throughput.scaling [--json OUT]``.

One wide network with passes, rows and width one at a time. Each point is a process of its own, so that its memory is
its own: the most that it held above the network ready to run.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.throughput.apart import measured_apart

__all__ = ["SERIES", "exponent", "main"]

SERIES: dict[str, list[dict[str, int]]] = {  # 10 000 passes of 256 rows take most of a minute
    "passes": [{"rows": 256, "passes": passes, "width": 1024} for passes in (100, 300, 1000, 3000, 10_000)],
    "rows": [{"rows": rows, "passes": 100, "width": 1024} for rows in (1, 4, 16, 64, 256, 1024)],
    "width": [{"rows": 32, "passes": 100, "width": width} for width in (64, 128, 256, 512, 1024, 2048, 4096)],
}


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Gives b of the last step of y = a x**b: 1 where twice as much takes twice as long."""
    return math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every point, prints them, and keeps them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput.scaling")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=int, default=10_000, help="leave out points of more passes or rows or width")
    given = parser.parse_args(arguments)
    series: dict[str, list[dict[str, Any]]] = {}
    for name, points in SERIES.items():
        series[name] = []
        for point in points:
            if point[name] <= given.most:
                asked = {"width": point["width"], "device": given.device, "threads": given.threads}
                found = measured_apart("M2", point["rows"], point["passes"], **asked)
                series[name].append({**point, **found})
                print(name, json.dumps(series[name][-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"environment": environment(), "series": series}, indent=1) + "\n")


if __name__ == "__main__":
    main()
