from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, stats

from mcdrop.errors import InputError
from mcdrop.metrics import aurc, crps_gaussian, crps_samples, ence, interval_score, mean_width, picp

NUMBERS = st.floats(-100, 100)


def test_bounds_count_as_inside() -> None:
    assert picp([0, 1, 2, 3], [0, 0, 0, 0], [2, 2, 2, 2]) == 0.75
    assert mean_width([0, 0], [1, 3]) == 2
    assert mean_width([0, -np.inf], [1, np.inf]) == np.inf


def test_interval_score_is_the_two_pinball_losses() -> None:
    random = np.random.default_rng(0)
    y, level = random.normal(size=200), 0.9
    lower, upper = np.full(200, -1.0), np.full(200, 1.5)
    tail = (1 - level) / 2
    pinball = [np.maximum(q * (y - at), (q - 1) * (y - at)) for q, at in ((tail, lower), (1 - tail, upper))]
    assert interval_score(y, lower, upper, level) == pytest.approx(float(sum(pinball).mean()) / tail)


def test_true_interval_has_the_best_interval_score() -> None:
    y = np.random.default_rng(1).normal(size=20_000)
    z = stats.norm.ppf(0.95)
    scores = {width: interval_score(y, np.full_like(y, -width), np.full_like(y, width), 0.9) for width in (1.2, z, 2.2)}
    assert min(scores, key=lambda width: scores[width]) == z


def test_gaussian_crps_is_the_integral_over_thresholds() -> None:
    def brier(at: float) -> float:
        return float((stats.norm.cdf(at, 1, 2) - (at >= 2.5)) ** 2)

    expected = integrate.quad(brier, -20, 2.5)[0] + integrate.quad(brier, 2.5, 25)[0]
    assert crps_gaussian([2.5], [1.0], [2.0]) == pytest.approx(expected, rel=1e-6)


@given(arrays(np.float64, 5, elements=NUMBERS), arrays(np.float64, 5, elements=NUMBERS))
def test_gaussian_crps_without_spread_is_the_distance_that_a_small_spread_nears(
    y: np.ndarray, mean: np.ndarray
) -> None:
    exact = np.abs(y - mean).mean()
    assert crps_gaussian(y, mean, np.zeros(5)) == exact
    assert crps_gaussian(y, mean, np.full(5, 1e-9)) == pytest.approx(exact, abs=1e-8)
    assert np.isnan(crps_gaussian(y, mean, np.full(5, np.nan)))


@given(arrays(np.float64, (7, 3), elements=NUMBERS), arrays(np.float64, 3, elements=NUMBERS))
def test_crps_of_samples_equals_all_pairs(samples: np.ndarray, y: np.ndarray) -> None:
    pairs = np.abs(samples[:, None] - samples[None]).mean(axis=(0, 1))
    expected = (np.abs(samples - y).mean(axis=0) - pairs / 2).mean()
    assert crps_samples(y, samples) == pytest.approx(expected, abs=1e-9)


def test_crps_of_many_samples_nears_that_of_their_distribution() -> None:
    samples = np.random.default_rng(2).normal(1, 2, (100_000, 1))
    assert crps_samples([2.5], samples) == pytest.approx(crps_gaussian([2.5], [1], [2]), abs=0.01)


def test_ence_is_small_for_honest_spread_and_the_relative_error_for_another() -> None:
    random = np.random.default_rng(3)
    std = random.uniform(0.5, 2, 60_000)
    y = random.normal(0, std)
    assert ence(y, np.zeros_like(y), std, bins=10) < 0.02
    assert ence(y, np.zeros_like(y), 2 * std, bins=10) == pytest.approx(0.5, abs=0.02)


def test_ence_of_one_bin_by_hand() -> None:
    assert ence([3.0, 4.0], [0, 0], [1.0, 1.0], bins=1) == pytest.approx(np.sqrt(12.5) - 1)


def test_ence_without_spread_is_infinite_unless_there_are_no_errors() -> None:
    assert ence([1.0, 2.0], [1.0, 2.5], [0.0, 0.0], bins=1) == np.inf
    assert ence([1.0, 2.0], [1.0, 3.0], [0.0, 1.0], bins=2) == 0
    assert np.isnan(ence([1.0], [1.0], [np.nan], bins=1))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_all_orders_of_ties(rows: list[tuple[int, int]]) -> None:
    from itertools import permutations

    loss, score = np.array(rows, float).T
    areas = [
        (np.cumsum(loss[list(order)]) / np.arange(1, len(loss) + 1)).mean()
        for order in permutations(range(len(loss)))
        if (np.diff(score[list(order)]) >= 0).all()
    ]
    assert aurc(loss, score) == pytest.approx(np.mean(areas))


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"one shape and hold values, got \(2,\), \(3,\)"):
        picp([0, 1], [0, 0, 0], [1, 1])
    with pytest.raises(InputError, match="bins"):
        ence([1.0], [0.0], [1.0], bins=2)
    for samples in ([[1.0], [2.0]], np.empty((0, 2))):
        with pytest.raises(InputError, match="samples must have the shape"):
            crps_samples([1.0, 2.0], samples)
    with pytest.raises(InputError, match=r"one number a row \(N,\), got \(2, 2\)"):
        aurc(np.eye(2), np.eye(2))


def test_what_no_measure_can_count_is_refused() -> None:
    for level in (95, 1, 0):
        with pytest.raises(InputError, match="level must be a number between 0 and 1"):
            interval_score([0], [0], [1], level)
    assert interval_score([2], [0], [1], np.float32(0.9)) == interval_score([2], [0], [1], 0.9)  # type: ignore[arg-type]
    for measure in (crps_gaussian, ence):
        with pytest.raises(InputError, match="standard deviations must not be negative, got -1"):
            measure([0, 0], [0, 0], [1, -1])
    hidden: Any = np.ma.masked_array([0.0, 9.0], [False, True])
    with pytest.raises(InputError, match="masked values"):
        picp(hidden, [0, 0], [1, 1])
    with pytest.raises(InputError, match="masked values"):
        crps_samples(hidden, [[0, 0]])


def test_a_spread_too_small_to_divide_by_is_as_good_as_none() -> None:
    for std in (1e-300, 1e-310, 5e-324):
        assert crps_gaussian([1.0, -2.0], [0.0, 0.0], [std, std]) == 1.5


def test_coverage_of_what_is_unknown_is_unknown() -> None:
    assert picp([0.0, 5.0], [-np.inf, 0.0], [np.inf, 1.0]) == 0.5
    for y, lower, upper in ((np.nan, 0, 1), (0, np.nan, 1), (0, 0, np.nan)):
        assert np.isnan(picp([0.5, y], [0, lower], [1, upper]))


def test_numbers_are_measured_in_any_container_and_nothing_else_is() -> None:
    y = torch.tensor([0.0, 3.0], requires_grad=True)
    assert picp(y, torch.zeros(2), torch.ones(2, dtype=torch.bfloat16)) == 0.5
    assert picp(0.5, 0, 1) == 1
    for bad, said in ((["a", "b"], "the text 'a'"), ([[1], [1, 2]], "equal length"), ([None, 1], "missing")):
        with pytest.raises(InputError, match=f"what is measured must be .*{said}"):
            picp(bad, [0, 0], [1, 1])  # type: ignore[arg-type]
