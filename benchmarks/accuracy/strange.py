"""What the two benchmarks of strangeness share: their data, their figures, their command line."""

import argparse
import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.report import README, put_section
from benchmarks.environment import ROOT, environment

__all__ = ["figure", "read_images", "read_table", "run", "shown", "tables"]

Result = dict[str, Any]

_NEIGHBOUR = ROOT.parent / "shared" / "data"  # beside the checkout


def tables(folder: Path) -> list[str]:
    """Lists the anomaly tables in a data folder."""
    return sorted(path.stem for path in (folder / "adbench").glob("*.npz"))


def read_table(folder: Path, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gives the inliers (N, F) and the anomalies (M, F) of ``adbench/NAME.npz`` (label ``y`` 1)."""
    with np.load(folder / "adbench" / f"{name}.npz") as file:
        x, y = file["X"].astype(np.float32), file["y"]
    return x[y == 0], x[y == 1]


def read_images(folder: Path, name: str) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Gives training images (N, 784) in [0, 1], their labels (N,), and test images of ``NAME/*-ubyte.gz``."""
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3")
    x, y, test = (_idx(folder / name / f"{part}-ubyte.gz") for part in parts)
    grey = [np.divide(images.reshape(len(images), -1), 255, dtype=np.float32) for images in (x, test)]
    return grey[0], y.astype(np.int64), grey[1]


def _idx(path: Path) -> NDArray[np.uint8]:
    """Reads an idx file of bytes: a magic number whose last byte counts the axes, the axes, the values."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def figure(values: Sequence[float]) -> Result:
    """Gives mean and standard error over repetitions."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}


def shown(cell: Result) -> str:
    """Gives a figure as text."""
    error = cell["standard_error"]
    return f"{cell['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def run(
    name: str, work: Callable[[Path, int], Result], markdown: Callable[[Result], str], repeats: int,
    arguments: Sequence[str] | None,
) -> None:  # fmt: skip
    """Runs a benchmark from the command line: prints its table, writes its results, or renews its README section."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.accuracy.{name}")
    parser.add_argument("--data", type=Path, metavar="DIR", help="else MCDROP_DATA, else ../shared/data")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the results go")
    parser.add_argument("--repeats", type=int, default=repeats, help="splits or seeds; 2 shows that all works")
    parser.add_argument("--report", action="store_true", help="renew the section of benchmarks/README.md and stop")
    given = parser.parse_args(arguments)
    kept = ROOT / "benchmarks" / "results" / f"{name}.json"
    if given.report:
        text = markdown(json.loads(kept.read_text(encoding="utf-8")))
        put_section(README, text, (f"<!-- {name} -->", f"<!-- /{name} -->"))
        return
    folder = given.data or Path(os.environ.get("MCDROP_DATA") or _NEIGHBOUR)
    if not folder.is_dir():
        parser.error(f"no folder {folder}; give --data or set MCDROP_DATA")
    results = {"environment": environment(), "repeats": given.repeats, **work(folder, given.repeats)}
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n" + markdown(results))
