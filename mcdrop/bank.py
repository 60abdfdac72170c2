"""A bank of typical rows: their hidden features, and how far the features of other rows lie from them.

Feature distances find what dropout's variance does not: rows far from everything that the network has seen (Lee et al.
2018, "A simple unified framework"; Sun et al. 2022, "Out-of-distribution detection with deep nearest neighbours"). To
add a distance, add one entry to ``DISTANCES``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError, UnknownName

__all__ = ["BANK_ROWS", "DISTANCES", "Bank", "Distance", "build_bank", "check_typical"]

Array = NDArray[np.float64]
Features = NDArray[np.float32]
State = dict[str, Features]
Named = Callable[[int], str]

BANK_ROWS = 10_000

_NEIGHBOURS = 10
_NEAR = 16  # rows whose distances are computed in full: the few digits of the search may mistake some
_BLOCK = 2**24  # numbers held at a time
_ROUNDING = 1e-6  # of the length of a row of features
_SHRINK = 1e-3
_TINY = 1e-12


@dataclass(frozen=True)
class Distance:
    """What is kept of the bank's features (B, F), what is made of that, and the distances (N,) of others from it."""

    fit: Callable[[Features], State]
    of: Callable[[State, Features], Array]
    ready: Callable[[State], State] = dict


@dataclass(frozen=True)
class Bank:
    """Typical rows as a distance keeps them; ``layer`` is where their features come from (None: the default).

    ``typical`` are values of the parts of a combined score for further typical rows, in ascending order.
    """

    distance: str
    layer: str | None
    state: State
    typical: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the name of the distance."""
        UnknownName.check("distance", self.distance, DISTANCES)

    def measure(self, features: Features) -> Array:
        """Gives the distance of features (N, F) from the bank.

        Raises:
            InputError: they have another width than the bank's.
        """
        width = next(iter(self.state.values())).shape[-1]
        if features.shape[1:] != (width,):
            raise InputError(f"rows have {features.shape[1]} features where those of the bank have {width}")
        with np.errstate(over="ignore", invalid="ignore"):  # features that are not finite are not near either
            return DISTANCES[self.distance].of(self._ready, features)

    @cached_property
    def _ready(self) -> State:
        return DISTANCES[self.distance].ready(self.state)


def build_bank(features: Features, *, distance: str, layer: str | None, named: Named = "typical row {}".format) -> Bank:
    """Fits a bank on the features of typical rows (B, F), whose places are ``named`` in errors.

    Raises:
        InputError: an unknown distance, fewer rows than a distance needs, or features without finite squares.
    """
    UnknownName.check("distance", distance, DISTANCES)
    if len(features) <= _NEIGHBOURS:
        raise InputError(f"a feature distance needs more than {_NEIGHBOURS} typical rows, got {len(features)}")
    check_typical(features, named)
    return Bank(distance, layer, DISTANCES[distance].fit(features.astype(np.float32)))


def check_typical(features: Features, named: Named) -> None:
    """Refuses features (N, F) whose squares no float32 holds: one such row would be in the spread of all.

    Raises:
        InputError: a row has some; it is ``named`` by its place.
    """
    bad = ~(_squared_lengths(features) <= np.finfo(np.float32).max)  # true of a NaN
    if bad.any():
        raise InputError(
            f"hidden features of {named(int(bad.argmax()))} are not finite, or too large to be squared; leave out such "
            f"rows ({bad.sum()} of the {len(bad)} typical ones)"
        )


def _squared_lengths(features: Features) -> Array:
    """Of each row of features (..., F), in float64: in float32 the square of 2e19 is infinite."""
    return np.asarray(np.einsum("...f,...f->...", features, features, dtype=np.float64))


def _unit(features: Features) -> Features:
    length = np.sqrt(_squared_lengths(features))[:, None]
    unit: Features = (features / np.maximum(length, _TINY)).astype(np.float32)
    return unit


def _fit_cosine(features: Features) -> State:
    return {"rows": _unit(features)}


def _cosine(state: State, features: Features) -> Array:
    """One minus the cosine similarity to the 10th nearest row: half the squared distance of unit vectors."""
    return _tenth(state, _unit(features)) / 2


def _fit_euclidean(features: Features) -> State:
    scale = features.std(axis=0, dtype=np.float64).astype(np.float32)
    scale[scale <= _TINY] = 1
    return {"rows": (features / scale).astype(np.float32), "scale": scale[None]}


def _euclidean(state: State, features: Features) -> Array:
    """Distance to the 10th nearest row, each feature in units of its own standard deviation."""
    return np.sqrt(_tenth(state, (features / state["scale"]).astype(np.float32)))


def _centred(state: State) -> State:
    """Rows around their centre: products of what all have in common would leave no digits of what sets them apart."""
    rows = state["rows"]
    centre = rows.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
    around = rows - centre
    squares = np.einsum("bf,bf->b", around, around)
    return {**state, "centre": centre, "around": around, "squares": squares}


def _tenth(state: State, points: Features) -> Array:
    """The squared distance of each point (N, F) from the 10th nearest row, in blocks of points.

    A matrix product, with the squared lengths of the rows, finds those that are near, but leaves few digits of small
    distances; so they are computed from differences. What rounding alone sets apart is at distance 0.
    """
    rows, lengths = state["around"], _squared_lengths(points)
    kth, near, found = _NEIGHBOURS - 1, min(_NEAR, len(rows)), np.empty(len(points))
    size = max(1, _BLOCK // max(len(rows), near * rows.shape[1]))
    for start in range(0, len(points), size):
        some = points[start : start + size] - state["centre"]
        order = np.argpartition(state["squares"] - 2 * some @ rows.T, near - 1, axis=1)[:, :near]
        apart = some[:, None] - rows[order]
        squares = np.partition(_squared_lengths(apart), kth, axis=1)[:, kth]
        same = np.isfinite(squares) & (squares <= _ROUNDING**2 * lengths[start : start + size])
        found[start : start + size] = np.where(same, 0, squares)
    return found


def _fit_mahalanobis(features: Features) -> State:
    """Mean, and the factor that whitens; the covariance is shrunk a little, so that it can be inverted."""
    centre = features.mean(axis=0, dtype=np.float64)
    covariance = np.atleast_2d(np.cov(features.astype(np.float64), rowvar=False))
    level = max(float(np.trace(covariance)) / len(covariance), _TINY)
    shrunk = (1 - _SHRINK) * covariance + _SHRINK * level * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(shrunk)
    whitening = (vectors / np.sqrt(values)).T
    return {"centre": centre[None].astype(np.float32), "whitening": whitening.astype(np.float32)}


def _mahalanobis(state: State, features: Features) -> Array:
    """Mahalanobis distance from the mean."""
    apart = (features - state["centre"]).astype(np.float64) @ state["whitening"].astype(np.float64).T
    return np.asarray(np.sqrt((apart**2).sum(axis=1)), np.float64)


DISTANCES: dict[str, Distance] = {
    "cosine": Distance(_fit_cosine, _cosine, _centred),
    "euclidean": Distance(_fit_euclidean, _euclidean, _centred),
    "mahalanobis": Distance(_fit_mahalanobis, _mahalanobis),
}
