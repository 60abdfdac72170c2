"""Intervals against scipy, their claims by simulation, and what is refused."""

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import classes, summary
from numpy.typing import NDArray
from scipy import stats

from mcdrop.errors import InputError, UnknownName
from mcdrop.intervals import INTERVALS, Interval, check_level, interval_of
from mcdrop.summaries import Summary

Array = NDArray[np.float64]

levels = st.floats(0.01, 0.99)
every = pytest.mark.parametrize(
    "name", sorted(name for name, method in INTERVALS.items() if not method.needs_calibration)
)


def of_passes(draws: Array, **more: Any) -> Summary:
    """The summary of independent passes (T, N, D)."""
    return summary(
        draws.mean(axis=0), draws.var(axis=0, ddof=1), passes=len(draws),
        standard_error=stats.sem(draws), samples=draws, **more,
    )  # fmt: skip


def gaussian(draws: Array) -> Summary:
    return of_passes(draws, aleatoric=np.full(draws.shape[1:], 0.1))


# -- against scipy -----------------------------------------------------------------------------------------------------


@given(levels, st.integers(2, 200))
def test_the_interval_of_the_mean_is_scipys_t(level: float, passes: int) -> None:
    draws = np.random.default_rng(passes).normal(3, 2, (passes, 4, 2))
    found = interval_of("mean", of_passes(draws), level)
    lower, upper = stats.t.interval(level, passes - 1, loc=draws.mean(axis=0), scale=stats.sem(draws))
    np.testing.assert_allclose(found.lower, lower, rtol=1e-9)
    np.testing.assert_allclose(found.upper, upper, rtol=1e-9)
    assert found.kind == "confidence"


@given(levels, st.integers(2, 200))
def test_the_normal_interval_is_scipys(level: float, passes: int) -> None:
    draws = np.random.default_rng(passes).normal(3, 2, (passes, 4, 2))
    found = interval_of("normal", of_passes(draws), level)
    lower, upper = stats.norm.interval(level, loc=draws.mean(axis=0), scale=draws.std(axis=0, ddof=1))
    np.testing.assert_allclose(found.lower, lower, rtol=1e-9)
    np.testing.assert_allclose(found.upper, upper, rtol=1e-9)
    assert found.kind == "credible"


@given(levels, st.integers(2, 200))
def test_student_t_is_the_textbook_interval_for_one_more_draw(level: float, passes: int) -> None:
    draws = np.random.default_rng(passes).normal(3, 2, (passes, 4, 2))
    found = interval_of("student_t", of_passes(draws), level)
    scale = draws.std(axis=0, ddof=1) * np.sqrt(1 + 1 / passes)
    lower, upper = stats.t.interval(level, passes - 1, loc=draws.mean(axis=0), scale=scale)
    np.testing.assert_allclose(found.lower, lower, rtol=1e-9)
    np.testing.assert_allclose(found.upper, upper, rtol=1e-9)


def test_rows_with_their_own_passes_have_their_own_quantiles() -> None:
    counts = np.array([2, 10, 1000])
    rows = replace(summary(np.zeros((3, 2)), 1.0, passes=10), passes=counts, degrees=counts - 1)
    bounds = {name: interval_of(name, rows, 0.9).upper for name in ("mean", "student_t")}
    expected = np.outer(stats.t.ppf(0.95, counts - 1), np.ones(2))
    np.testing.assert_allclose(bounds["mean"], expected / np.sqrt(10))
    np.testing.assert_allclose(bounds["student_t"], expected * np.sqrt(1 + 1 / counts)[:, None])


# -- what they claim, by simulation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["student_t", "quantile"])
@pytest.mark.parametrize(("level", "passes"), [(0.95, 39), (0.95, 100), (0.8, 25), (0.5, 7)])
@pytest.mark.statistical
def test_one_more_pass_falls_inside_with_the_level(name: str, level: float, passes: int) -> None:
    """40000 normal rows: exactly the level for student_t, at least it for quantile and at most 2 / (T + 1) more."""
    draws = np.random.default_rng(1).normal(size=(passes + 1, 40_000, 1))
    found = interval_of(name, of_passes(draws[:-1]), level)
    share = float(((found.lower <= draws[-1]) & (draws[-1] <= found.upper)).mean())
    error = np.sqrt(level * (1 - level) / 40_000)
    assert share > level - 4 * error
    assert share < level + 4 * error + (2 / (passes + 1) if name == "quantile" else 0)


@pytest.mark.parametrize("draw", ["lognormal", "uniform", "exponential"])
@pytest.mark.statistical
def test_the_quantile_interval_needs_no_normality(draw: str) -> None:
    """With k = floor((T + 1)(1 - level) / 2) exactly (T + 1 - 2 k) / (T + 1) of further draws fall between."""
    rng = np.random.default_rng(2)
    draws = getattr(rng, draw)(size=(51, 40_000, 1))
    found = interval_of("quantile", of_passes(draws[:-1]), 0.9)
    share = float(((found.lower <= draws[-1]) & (draws[-1] <= found.upper)).mean())
    exact = (51 - 2 * 2) / 51
    assert abs(share - exact) < 4 * np.sqrt(exact * (1 - exact) / 40_000)


@given(st.integers(39, 300), st.integers(0, 5))
def test_quantile_bounds_are_passes_of_the_stated_rank(passes: int, seed: int) -> None:
    draws = np.random.default_rng(seed).normal(size=(passes, 3, 2))
    found, ordered = interval_of("quantile", of_passes(draws), 0.95), np.sort(draws, axis=0)
    rank = (passes + 1) // 40  # floor((T + 1) * 0.025), in whole numbers
    np.testing.assert_array_equal(found.lower, ordered[rank - 1])
    np.testing.assert_array_equal(found.upper, ordered[passes - rank])


def test_quantiles_of_many_rows_are_ordered_a_part_at_a_time() -> None:
    """Of 100 MB of passes: what is taken besides stays below half of that, and is the same as all at once."""
    draws = np.random.default_rng(0).standard_normal((500, 50_000, 1), np.float32)
    passes = replace(of_passes(np.ones((2, 1, 1))), passes=np.array([500]), mean=draws[0], samples=draws)
    tracemalloc.start()
    lower, upper = INTERVALS["quantile"].bounds(passes, 0.9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < draws.nbytes / 2
    ordered = np.sort(draws, axis=0)
    np.testing.assert_array_equal(lower, ordered[24])  # the 25th of 500, floor(501 * 0.05)
    np.testing.assert_array_equal(upper, ordered[475])


# -- laws of all -------------------------------------------------------------------------------------------------------


@every
@given(one=st.floats(0.02, 0.95), other=st.floats(0.02, 0.95))
def test_a_higher_level_contains_a_lower_one(name: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    draws = np.random.default_rng(3).normal(size=(60, 4, 2))
    inner, outer = (interval_of(name, gaussian(draws), level) for level in (low, high))
    assert (outer.lower <= inner.lower + 1e-9).all()
    assert (inner.upper <= outer.upper + 1e-9).all()


@every
@given(shift=st.floats(-1e3, 1e3), scale=st.floats(0.01, 100))
def test_intervals_follow_a_change_of_units(name: str, shift: float, scale: float) -> None:
    draws = np.random.default_rng(4).normal(size=(60, 4, 2))
    plain = interval_of(name, gaussian(draws), 0.9)
    moved = of_passes(draws * scale + shift, aleatoric=np.full((4, 2), 0.1 * scale**2))
    other = interval_of(name, moved, 0.9)
    np.testing.assert_allclose(other.lower, plain.lower * scale + shift, rtol=1e-6, atol=1e-6 * scale)
    np.testing.assert_allclose(other.upper, plain.upper * scale + shift, rtol=1e-6, atol=1e-6 * scale)


@every
def test_bounds_lie_around_the_mean_and_say_what_they_are(name: str) -> None:
    draws = np.random.default_rng(5).normal(size=(100, 5, 3))
    found: Interval = interval_of(name, gaussian(draws), 0.9)
    assert (found.lower < draws.mean(axis=0)).all()
    assert (draws.mean(axis=0) < found.upper).all()
    assert (found.name, found.level) == (name, 0.9)
    assert found.kind in {"confidence", "credible", "prediction"}


@pytest.mark.parametrize("name", ["mean", "normal", "student_t", "quantile"])
@given(level=levels)
def test_bounds_of_probabilities_stay_between_0_and_1(name: str, level: float) -> None:
    if name == "quantile" and level > 0.9:
        return
    chances = np.random.default_rng(6).dirichlet([0.05] * 4, (30, 8))
    found = interval_of(name, of_passes(chances, support=(0.0, 1.0)), level)
    assert (found.lower >= 0).all()
    assert (found.upper <= 1).all()
    assert (found.lower <= found.upper).all()


def test_no_spread_gives_no_width() -> None:
    alike = np.ones((50, 3, 2))
    for name in ("mean", "normal", "student_t", "quantile"):
        found = interval_of(name, of_passes(alike), 0.9)
        np.testing.assert_array_equal(found.upper - found.lower, 0)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "needed"), [(0.95, 39), (0.99, 199), (0.9, 19), (0.5, 3), (0.999, 1999)])
def test_too_few_passes_for_a_quantile_are_refused_with_the_number_needed(level: float, needed: int) -> None:
    draws = np.random.default_rng(0).normal(size=(needed, 2, 1))
    found = interval_of("quantile", of_passes(draws), level)
    np.testing.assert_array_equal(found.lower, draws.min(axis=0))
    np.testing.assert_array_equal(found.upper, draws.max(axis=0))
    with pytest.raises(InputError) as caught:
        interval_of("quantile", of_passes(draws[:-1]), level)
    said = f"needs at least {needed} passes, got {needed - 1}; raise passes or choose 'student_t'"
    assert said in str(caught.value)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 1.5, 95, float("nan"), float("inf"), "0.95", None, True, [0.9]])
def test_a_level_that_is_no_number_between_0_and_1_is_refused(level: Any) -> None:
    with pytest.raises(InputError, match="level must be a number between 0 and 1, got"):
        check_level(level)


@pytest.mark.parametrize(("level", "hint"), [(95, "(for 95 % give 0.95)"), (99.9, "(for 99.9 % give 0.999)")])
def test_a_level_in_percent_gets_a_hint(level: float, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        check_level(level)
    assert hint in str(caught.value)


@pytest.mark.parametrize("level", [0.5, np.float32(0.5), np.float64(0.5)])
def test_a_level_may_be_any_number(level: Any) -> None:
    assert check_level(level) == 0.5


def test_an_unknown_interval_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName) as caught:
        interval_of("nope", summary(np.zeros((2, 1))), 0.9)
    assert str(caught.value) == f"unknown interval 'nope'; choose one of: {', '.join(sorted(INTERVALS))}"


def test_classes_have_every_credible_interval() -> None:
    chances = np.random.default_rng(0).dirichlet([1, 1, 1], 5)
    for name in ("mean", "normal", "student_t"):
        assert interval_of(name, classes(chances), 0.9).lower.shape == (5, 3)
