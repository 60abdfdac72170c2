"""The data of the reference models: noisy points on a line, scikit-learn's digits, MNIST where its files are.

To add a data set, add one function that gives a ``Split``.
"""

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Split", "digits_data", "line_positions", "mnist_data", "noisy_line_data"]

_NEIGHBOUR = Path(__file__).parents[2] / "shared" / "data"  # beside the checkout


@dataclass(frozen=True)
class Split:
    """Rows (N, F) and labels (N,), cut in three: to train on, to fit screens on, and to measure on."""

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_reference: NDArray[np.float32]
    y_reference: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]


def noisy_line_data(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gives 50 points (50, 1) evenly on [-1, 1], and y = x plus normal noise of standard deviation 0.3 (50, 1)."""
    x = np.linspace(-1.0, 1.0, 50).reshape(-1, 1)
    y = x + 0.3 * np.random.default_rng(seed).standard_normal(x.shape)
    return x.astype(np.float32), y.astype(np.float32)


def line_positions(rows: int, seed: int = 1) -> NDArray[np.float32]:
    """Gives fresh positions (rows, 1), uniform on [-1, 1]: what the line net is asked when all is well."""
    return np.random.default_rng(seed).uniform(-1.0, 1.0, (rows, 1)).astype(np.float32)


def digits_data() -> Split:
    """Gives scikit-learn's 1797 digits of 8x8 pixels as rows of 64 grey levels in [0, 1]; 1197 / 300 / 300 rows."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return _split((x[order] / 16).astype(np.float32), y[order].astype(np.int64), 1197, 300)


def mnist_data() -> Split:
    """Gives MNIST as rows of 784 grey levels in [0, 1]; the published 10000 test rows are cut 2000 / 8000.

    Raises:
        FileNotFoundError: the four files are not there; the message says where they were looked for.
    """
    folder = Path(os.environ.get("MCDROP_DATA") or _NEIGHBOUR) / "mnist"
    if not folder.is_dir():
        raise FileNotFoundError(f"no MNIST in {folder}; set MCDROP_DATA to the folder that holds mnist/")
    x = np.concatenate([_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")])
    y = np.concatenate([_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")])
    return _split(np.divide(x.reshape(len(x), -1), 255, dtype=np.float32), y.astype(np.int64), 60000, 2000)


def _split(x: NDArray[np.float32], y: NDArray[np.int64], train: int, reference: int) -> Split:
    ends = (train, train + reference)
    (x_train, x_reference, x_test), (y_train, y_reference, y_test) = np.split(x, ends), np.split(y, ends)
    return Split(x_train, y_train, x_reference, y_reference, x_test, y_test)


def _idx(path: Path) -> NDArray[np.uint8]:
    """Reads an idx file of bytes: a magic number whose last byte counts the axes, the axes, the values."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
