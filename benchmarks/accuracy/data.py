"""Regression sets with published splits, in the layout of the repository of Gal and Ghahramani.

``uci/NAME/`` holds ``data.txt`` (one row a line), ``index_features.txt`` and ``index_target.txt`` (columns), and for
each split K from 0 ``index_train_K.txt`` and ``index_test_K.txt`` (rows). Other files in it are not read.
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["RegressionSet", "data_folder", "names", "read_set", "recut", "split_held"]

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

_NEIGHBOUR = Path(__file__).parents[3] / "shared" / "data"  # beside the checkout


@dataclass(frozen=True)
class RegressionSet:
    """Rows x (N, F), targets y (N,), and for each split the rows to train on and to test on.

    All splits have equally many rows to train on, because their networks are trained at once.
    """

    name: str
    x: Array
    y: Array
    train: tuple[Rows, ...]
    test: tuple[Rows, ...]

    def __post_init__(self) -> None:
        """Checks the splits.

        Raises:
            ValueError: no splits, unequal ones, or rows that are missing, unknown or in both halves.
        """
        if not self.train or len({len(rows) for rows in self.train}) > 1:
            raise ValueError(f"{self.name}: all splits must have equally many training rows, and there must be one")
        everything = np.arange(len(self.x))
        for k, (train, test) in enumerate(zip(self.train, self.test, strict=True)):
            if not np.array_equal(np.sort(np.concatenate([train, test])), everything):
                raise ValueError(f"{self.name}: split {k} does not cut the {len(self.x)} rows in two")


def data_folder(given: Path | None = None) -> Path:
    """Gives the folder that holds ``uci/``: the given one, else MCDROP_DATA, else shared/data beside the checkout.

    Raises:
        FileNotFoundError: it holds none; the message says what to set.
    """
    folder = given or Path(os.environ.get("MCDROP_DATA") or _NEIGHBOUR)
    if not (folder / "uci").is_dir():
        raise FileNotFoundError(f"no folder uci in {folder}; give --data or set MCDROP_DATA to what holds it")
    return folder


def names(folder: Path) -> list[str]:
    """Lists the sets in a data folder."""
    return sorted(path.parent.name for path in (folder / "uci").glob("*/data.txt"))


def read_set(folder: Path, name: str) -> RegressionSet:
    """Reads one set with all its splits.

    Raises:
        FileNotFoundError: there is no such set; the message lists those that are there.
    """
    here = folder / "uci" / name
    if not (here / "data.txt").is_file():
        raise FileNotFoundError(f"no set {name!r} in {folder / 'uci'}; there are: {', '.join(names(folder)) or 'none'}")
    data = np.loadtxt(here / "data.txt", ndmin=2)
    features, target = _whole(here / "index_features.txt"), _whole(here / "index_target.txt")
    count = next(k for k in itertools.count() if not (here / f"index_train_{k}.txt").is_file())
    halves = {half: tuple(_whole(here / f"index_{half}_{k}.txt") for k in range(count)) for half in ("train", "test")}
    return RegressionSet(name, data[:, features], data[:, target[0]], halves["train"], halves["test"])


def recut(data: RegressionSet, seed: int) -> RegressionSet:
    """Gives the set with as many other splits of the same sizes, cut at random."""
    orders = [np.random.default_rng([seed, k]).permutation(len(data.x)) for k in range(len(data.train))]
    cut = len(data.train[0])
    train, test = tuple(order[:cut] for order in orders), tuple(order[cut:] for order in orders)
    return RegressionSet(data.name, data.x, data.y, train, test)


def split_held(rows: Rows) -> tuple[Rows, Rows]:
    """Cuts training rows into those to fit and the last fifth to choose or to calibrate with.

    The published order of the rows is random already, and the 2018 code of that repository holds out the last fifth.
    """
    fit = round(0.8 * len(rows))
    return rows[:fit], rows[fit:]


def _whole(path: Path) -> Rows:
    return np.loadtxt(path, ndmin=1).astype(np.int64)
