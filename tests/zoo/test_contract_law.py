"""The passes follow the law of the network's own training behaviour, drawn by torch's generator with plain flags.

What is compared is each output's mean and variance over the passes, in standard errors of the difference. A single
comparison allows 4 of them (one false alarm in 16 000); m comparisons allow what keeps that chance for all of them
together (Bonferroni), about 4.6 for 12 outputs. The seeds are fixed, so a test that passes does so every time.
"""

from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from . import ZOO, reference_passes
from .wrapped import CONTROLLED, HEAVY, Wrapped, passes, taken, tolerance, wrapped

Array = NDArray[np.float64]

_ONE = 4.0
_FEW, _MANY = 200, 600  # passes of whole architectures, and of the rest


def allowed(comparisons: int) -> float:
    """The largest of so many distances, in standard errors, that passes: 4.0, 4.7, 5.0 for 1, 20, 100 of them."""
    tail = 1 - NormalDist().cdf(_ONE)
    return NormalDist().inv_cdf(1 - tail / comparisons)


def moments(draws: Array) -> dict[str, tuple[Array, Array]]:
    """Mean, variance and summed variance of draws (T, M), each with its squared standard error."""
    squares = (draws - draws.mean(axis=0)) ** 2 * len(draws) / (len(draws) - 1)
    found = {"mean": draws, "variance": squares, "variance of all outputs": squares.sum(axis=1, keepdims=True)}
    return {name: (values.mean(axis=0), values.var(axis=0, ddof=1) / len(values)) for name, values in found.items()}


def compared(ours: Array, theirs: Array, rounding: float) -> dict[str, float]:
    """The largest distance of each kind, over what is allowed: at most 1 where the laws agree."""
    scale = np.abs(theirs).max()
    floors = {"mean": rounding * scale, "variance": rounding * scale**2, "variance of all outputs": 0.0}
    left, right = moments(ours), moments(theirs)
    worst = {}
    for name, floor in floors.items():
        error = np.sqrt(left[name][1] + right[name][1] + floor**2)
        distance = np.abs(left[name][0] - right[name][0]) / np.maximum(error, 1e-300)
        worst[name] = float(distance.max()) / allowed(distance.size)
    return worst


def rows_to_compare(made: Wrapped) -> list[int]:
    """All rows, or two of what takes long.

    Where rows are coupled, a mask for each row, as the reference draws it, is another law: then one row alone.
    """
    if not made.specimen.row_coupled:
        return [0, 1] if made.specimen.name in HEAVY else [*range(made.rows.count)]
    for said in ("does not take a single row", "takes a way of its own when it is alone"):
        if any(said in warning for warning in made.model.audit.warnings):
            pytest.skip(f"its rows are coupled, and it {said}")
    return [0]


@pytest.mark.statistical
@pytest.mark.parametrize("name", CONTROLLED)
def test_mean_and_variance_are_those_of_training_behaviour(name: str) -> None:
    made = wrapped(name)
    theirs_count, ours_count = (_FEW, _FEW) if name in HEAVY else (_MANY, 2 * _MANY)
    example = taken(made.example, rows_to_compare(made))
    theirs = reference_passes(ZOO[name], made.module, example, theirs_count, seed=1).numpy().reshape(theirs_count, -1)
    parts = [passes(made, example, 100, seed=seed) for seed in range(ours_count // 100)]
    ours = np.concatenate(parts).reshape(ours_count, -1)
    worst = compared(ours, theirs, tolerance(made.module))
    assert max(worst.values()) <= 1, worst


def test_the_comparison_sees_a_small_difference_in_mean_or_spread() -> None:
    """Shares of a standard deviation that such a test finds with 600 and 1200 passes of 12 outputs."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(1200, 12)), rng.normal(size=(600, 12))
    assert max(compared(ours, theirs, 1e-5).values()) < 1
    assert compared(ours + 0.35, theirs, 1e-5)["mean"] > 1
    assert compared(ours * 1.1, theirs, 1e-5)["variance of all outputs"] > 1
    assert compared(ours * 0, theirs, 1e-5)["variance"] > 1


def test_more_comparisons_allow_more() -> None:
    assert [round(allowed(n), 1) for n in (1, 20, 100)] == [4.0, 4.7, 5.0]
