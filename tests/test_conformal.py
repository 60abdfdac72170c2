import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import classes, summary
from scipy import stats

from mcdrop.calibration import Calibration, fit_calibration
from mcdrop.conformal import CONFORMAL, conformal_rank
from mcdrop.engine import PassPlan
from mcdrop.errors import InputError
from mcdrop.summaries import Summary

LEVEL = st.floats(0.01, 0.99)
NUMBERS = sorted(name for name, method in CONFORMAL.items() if method.members is None)
SETS = sorted(name for name, method in CONFORMAL.items() if method.members is not None)


def rows(count: int, seed: int) -> tuple[Summary, np.ndarray]:
    """Exchangeable rows whose model is wrong in scale and misses half of the noise."""
    random = np.random.default_rng(seed)
    mean = random.normal(size=(count, 2))
    spread = random.uniform(0.1, 1, (count, 2))
    y = mean + random.normal(size=(count, 2)) * np.sqrt(2 * spread + 0.5)
    samples = mean + random.normal(size=(8, count, 2)) * np.sqrt(spread)
    return summary(mean, spread, samples=samples), y


def labelled(count: int, seed: int) -> tuple[Summary, np.ndarray]:
    """Exchangeable rows of an over-confident classifier of six classes."""
    random = np.random.default_rng(seed)
    true = random.dirichlet(np.full(6, 0.5), count)
    y = np.array([random.choice(6, p=row) for row in true])
    sharp = true**3 + 1e-6
    return classes(sharp / sharp.sum(axis=1, keepdims=True)), y


def fitted(method: str, made: Summary, y: np.ndarray, level: float = 0.9) -> Calibration:
    task = "classification" if made.classes is not None else "regression"
    return fit_calibration(made, y, task=task, plan=PassPlan(), fingerprint="", method=method, levels=[level])


@given(st.integers(0, 500), LEVEL)
def test_the_rank_is_the_smallest_that_covers(count: int, level: float) -> None:
    rank = conformal_rank(count, level)
    assert rank / (count + 1) >= level - 1e-9
    assert (rank - 1) / (count + 1) < level


@pytest.mark.parametrize(("level", "fewest"), [(0.9, 9), (0.95, 19), (0.99, 99)])
def test_bounds_are_infinite_where_held_out_rows_are_too_few(level: float, fewest: int) -> None:
    made, y = rows(fewest, 0)
    assert np.isfinite(fitted("absolute", made, y).bounds(made, level)[0]).all()
    lower, upper = fitted("absolute", made.take(slice(1, None)), y[1:]).bounds(made, level)
    assert (lower == -np.inf).all()
    assert (upper == np.inf).all()


@pytest.mark.parametrize("method", SETS)
def test_sets_are_whole_where_held_out_rows_are_too_few(method: str) -> None:
    made, y = labelled(8, 0)
    members = fitted(method, made, y).prediction_set(made, 0.9)
    assert members is not None
    assert members.all()


@pytest.mark.parametrize("method", NUMBERS)
def test_score_and_bounds_are_inverse(method: str) -> None:
    """y scores at most q exactly where it lies between the bounds of q."""
    made, y = rows(300, 1)
    entry, offset = CONFORMAL[method], np.array([0.3, 0.6])
    assert entry.bounds is not None
    for q in (0.05, 0.7, 2.0):
        lower, upper = entry.bounds(made, np.full(2, q), 0.8, offset)
        inside = (lower <= y) & (y <= upper)
        np.testing.assert_array_equal(inside, entry.score(made, y, 0.8, offset) <= q)


@pytest.mark.parametrize("method", SETS)
def test_score_and_members_are_inverse(method: str) -> None:
    made, _ = labelled(50, 1)
    entry = CONFORMAL[method]
    assert entry.members is not None
    members = entry.members(made, np.array(0.6))
    top = made.mean.argmax(axis=1)
    for label in range(6):
        small = entry.score(made, np.full(50, float(label)), 0.0, None) <= 0.6
        expected = small if method == "lac" else small | (top == label)
        np.testing.assert_array_equal(members[:, label], expected)


def test_class_scores_by_hand() -> None:
    made = classes([[0.1, 0.6, 0.3]])
    by_label = {
        name: [float(CONFORMAL[name].score(made, np.array([k]), 0.0, None)[0]) for k in (0.0, 1.0, 2.0)]
        for name in SETS
    }
    assert by_label["lac"] == pytest.approx([0.9, 0.4, 0.7])
    assert by_label["aps"] == pytest.approx([1.0, 0.6, 0.9])
    assert by_label["raps"] == pytest.approx([1.0, 0.6, 0.9])  # no penalty before the sixth class
    long = classes(np.full((1, 8), 0.125))
    assert CONFORMAL["raps"].score(long, np.array([7.0]), 0.0, None)[0] == pytest.approx(1.03)


def covered(method: str, repeats: int, count: int, level: float) -> list[float]:
    """Coverage of one output (or of the labels) on 2000 fresh rows, for each of many held-out sets."""
    make = labelled if method in SETS else rows
    shares = []
    for seed in range(repeats):
        held, fresh = make(count, 2 * seed), make(2000, 2 * seed + 1)
        calibration = fitted(method, *held, level)
        made, y = fresh
        if method in SETS:
            members = calibration.prediction_set(made, level)
            assert members is not None
            shares.append(float(np.take_along_axis(members, y[:, None], axis=1).mean()))
        else:
            lower, upper = calibration.bounds(made, level)
            shares.append(float(((lower <= y) & (y <= upper))[:, 0].mean()))
    return shares


@pytest.mark.statistical
@pytest.mark.parametrize("method", sorted(CONFORMAL))
def test_coverage_lies_in_its_beta_band(method: str) -> None:
    """Mean coverage over 60 held-out sets within four standard errors of its Beta law; sets may cover more."""
    repeats, count, level = 60, 100, 0.9
    shares = covered(method, repeats, count, level)
    used = count - count // 5 if CONFORMAL[method].needs_offset else count
    left = math.floor((used + 1) * (1 - level) + 1e-9)
    law = stats.beta(used + 1 - left, left)
    error = math.sqrt((law.var() + 0.9 * 0.1 / 2000) / repeats)
    assert np.mean(shares) >= law.mean() - 4 * error
    if method not in ("aps", "raps"):  # those always keep the most probable class
        assert np.mean(shares) <= law.mean() + 4 * error
        assert np.var(shares) <= 2 * (law.var() + 0.9 * 0.1 / 2000)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), LEVEL, LEVEL)
def test_a_higher_level_contains_a_lower_one(residuals: list[float], one: float, other: float) -> None:
    y = np.array(residuals)[:, None]
    made = summary(np.zeros_like(y))
    calibration = fitted("standardised", made, y)
    low, high = (calibration.bounds(made, level) for level in sorted((one, other)))
    assert (high[0] <= low[0]).all()
    assert (low[1] <= high[1]).all()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), LEVEL, LEVEL)
def test_sets_grow_with_the_level(labels: list[int], one: float, other: float) -> None:
    made = classes(np.random.default_rng(0).dirichlet([1, 1, 1], len(labels)))
    for method in SETS:
        calibration = fitted(method, made, np.array(labels))
        low, high = (calibration.prediction_set(made, level) for level in sorted((one, other)))
        assert low is not None
        assert high is not None
        assert (low <= high).all()


def test_ties_only_widen() -> None:
    y = np.repeat([0.0, 1.0], 10)[:, None]
    made = summary(np.zeros_like(y))
    lower, upper = fitted("absolute", made, y).bounds(made, 0.5)
    assert (-lower[0, 0], upper[0, 0]) == pytest.approx((1.0, 1.0), rel=2e-5)  # the 11th of 20 scores


def repeated(method: str, seed: int) -> tuple[Summary, np.ndarray]:
    """400 rows of four kinds, whole targets or labels: many scores are equal; of a network of float32."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 4, 400)
    chance = random.uniform(0.05, 0.95, (4, 1)).astype(np.float32).astype(np.float64)
    y = (random.uniform(size=(400, 1)) < chance[kind]).astype(np.int64)
    if method in SETS:
        return classes(np.hstack([1 - chance, chance])[kind]), y[:, 0]
    samples = (1000 * seed + chance + random.normal(size=(8, 4, 1)) * 0.1)[:, kind]
    mean = 1000 * seed + chance[kind]
    single = mean.astype(np.float32).astype(np.float64)
    return summary(mean, (0.01 * chance)[kind], samples=samples, deterministic=single), y + 1000.0 * seed


def moved(made: Summary, random: np.random.Generator) -> Summary:
    """The same rows in a batch of another size: a last digit of float32 further."""
    apart = np.float32(np.finfo(np.float32).eps) * random.choice([-1, 0, 1], made.mean.shape)
    samples = None if made.samples is None else made.samples * (1 + apart)
    return replace(made, mean=made.mean * (1 + apart), epistemic=made.epistemic * (1 + apart), samples=samples)


@pytest.mark.parametrize("method", sorted(CONFORMAL))
def test_rounding_does_not_cost_coverage_where_scores_repeat(method: str) -> None:
    """Of the held-out rows themselves at least ``level`` have a score of at most q, in whichever batch they come."""
    random = np.random.default_rng(1)
    for seed in range(4):
        made, y = repeated(method, seed)
        known: dict[str, Any] = {} if method in SETS else {"noise": 0.25}  # no rows are spent on it
        task = "classification" if method in SETS else "regression"
        calibration = fit_calibration(
            made, y, task=task, plan=PassPlan(), fingerprint="", method=method, levels=[0.6, 0.8], **known
        )
        for level in (0.6, 0.8):
            for again in (made, moved(made, random), moved(made, random)):
                if method in SETS:
                    members = calibration.prediction_set(again, level)
                    assert members is not None
                    inside = np.take_along_axis(members, y[:, None], axis=1)
                else:
                    lower, upper = calibration.bounds(again, level)
                    inside = (lower <= y) & (y <= upper)
                assert inside.mean() >= level, (seed, level)


@pytest.mark.parametrize("method", NUMBERS)
def test_bounds_are_no_wider_than_rounding(method: str) -> None:
    """Of a network of float64 far from 0: on the scale of float32's digits this would be wider by more than itself."""
    made, y = rows(300, 1)
    assert made.samples is not None
    assert made.deterministic is not None
    far = replace(made, mean=made.mean + 1e7, deterministic=made.deterministic + 1e7, samples=np.add(made.samples, 1e7))
    for one, targets in ((made, y), (far, y + 1e7)):
        calibration = fitted(method, one, targets)
        lower, upper = calibration.bounds(one, 0.9)
        inside = CONFORMAL[method].score(one, targets, 0.9, calibration.offset) <= calibration.quantile(0.9)
        gap = np.maximum(lower - targets, targets - upper)
        np.testing.assert_array_equal(inside, gap <= 0)  # none is taken in beyond those that score as low
        last = gap.max(axis=0, where=inside, initial=-np.inf)  # the held-out row that q is the score of
        assert (last >= -3e-5 * (upper - lower).max(axis=0)).all()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("method", ["absolute", "standardised"])
def test_an_output_that_overflowed_is_its_own_bound(method: str, sign: int) -> None:
    """In float64 both bounds lie there with it, and those of the other rows where they are without it."""
    made, y = rows(60, 1)
    assert made.deterministic is not None
    calibration, mean, off = fitted(method, made, y), made.mean.copy(), made.deterministic.copy()
    mean[0, 0] = off[0, 0] = sign * np.inf
    found = calibration.bounds(replace(made, mean=mean, deterministic=off), 0.9)
    for bound, finite in zip(found, calibration.bounds(made, 0.9), strict=True):
        assert bound[0, 0] == sign * np.inf
        np.testing.assert_array_equal(bound[1:], finite[1:])


@pytest.mark.parametrize("method", SETS)
def test_a_row_without_probabilities_may_be_of_every_class(method: str) -> None:
    made, y = labelled(100, 0)
    members = fitted(method, made, y, 0.5).prediction_set(classes([[np.nan] * 6, made.mean[0]]), 0.5)
    assert members is not None
    assert members[0].all()
    assert not members[1].all()


def test_cqr_is_fitted_for_levels() -> None:
    made, y = rows(60, 3)
    calibration = fitted("cqr", made, y, 0.8)
    assert np.isfinite(calibration.bounds(made, 0.8)[0]).all()
    with pytest.raises(InputError, match=r"fitted for the levels 0.8, not for 0.9"):
        calibration.bounds(made, 0.9)
    with pytest.raises(InputError, match="keep_samples=True"):
        calibration.bounds(summary(made.mean), 0.8)


@pytest.mark.parametrize("level", [1e-3, 1e-9, 1e-12, 1e-300])
def test_the_smallest_levels_have_the_smallest_bounds(level: float) -> None:
    """Rank 0 would be that of the last score, which bounds widest."""
    assert conformal_rank(60, level) == 1
