"""Monte Carlo dropout on the regression sets and splits of Gal and Ghahramani 2016: the paper's numbers beside ours.

    python -m benchmarks.accuracy.uci [SET ...] [--data DIR] [--json OUT]

Any folder ``uci/NAME/`` of the same layout works; the published columns are empty for a set that the paper lacks.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.data import RegressionSet, data_folder, names, read_set, recut
from benchmarks.accuracy.experiment import run_ours, run_paper
from benchmarks.accuracy.published import PUBLISHED, Figure
from benchmarks.accuracy.report import markdown
from benchmarks.environment import environment

__all__ = ["main"]

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sets, prints as it goes, and writes the results after each set."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.uci", description="UCI regression accuracy")
    parser.add_argument("sets", nargs="*", metavar="SET", help="a folder under DIR/uci; all of them if none is named")
    parser.add_argument("--data", type=Path, metavar="DIR", help="holds uci/; else MCDROP_DATA, else ../shared/data")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the results go")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies the epochs: 0.02 shows that all works")
    parser.add_argument("--recut", type=int, metavar="SEED", help="other random splits instead of the published ones")
    parser.add_argument("--threads", type=int, help="of torch; else as many as it likes")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        folder = data_folder(given.data)
        data = [read_set(folder, name) for name in given.sets or names(folder)]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if given.recut is not None:
        data = [recut(one, given.recut) for one in data]
    results: Result = {"environment": environment(), "effort": given.effort, "recut": given.recut, "sets": {}}
    for one in data:
        results["sets"][one.name] = _run(one, given.effort)
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n" + markdown(results))


def _run(data: RegressionSet, effort: float) -> Result:
    published, found = PUBLISHED.get(data.name), {}
    if published is not None:
        found["paper"] = _timed(lambda: run_paper(data, published, effort=effort))
        _print(data.name, "recipe of 2016", found["paper"], published.rmse, published.log_likelihood)
    found["ours"] = _timed(lambda: run_ours(data, effort=effort))
    best = (published.best_rmse, published.best_log_likelihood) if published else (None, None)
    _print(data.name, "our recipe", found["ours"], *best)
    return found


def _timed(work: Any) -> Result:
    wall, processor = time.perf_counter(), time.process_time()
    found: Result = work()
    return found | {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}


def _print(name: str, what: str, found: Result, *published: Figure | None) -> None:
    line = f"{name:12} {what:15}"
    for label, kind, figure in zip(("RMSE", "LL"), ("rmse", "log_likelihood"), published, strict=True):
        line += f"  {label} {found[kind]['mean']:7.3f} ± {found[kind]['standard_error'] or 0:.3f}"
        line += f" (published {figure.mean:.3f} ± {figure.error:.3f})" if figure else ""
    print(f"{line}  {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
