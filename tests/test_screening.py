"""Flags of single requests: false-positive rates that hold, and those that no screen could hold."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made import net, summary
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.base import clone, is_outlier_detector
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import mcdrop
from mcdrop.bank import DISTANCES, build_bank
from mcdrop.engine import PassPlan
from mcdrop.errors import InputError, UnknownName
from mcdrop.model import Options
from mcdrop.rows import Rows
from mcdrop.screening import SCORES, Screen, check_fpr, p_values, score_of

X = np.random.default_rng(0).normal(size=(99, 2)).astype(np.float32)
CORNERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
SCORE = st.integers(-100, 100).map(lambda tenths: tenths / 10)


@pytest.fixture(scope="module")
def model() -> mcdrop.Model:
    return mcdrop.wrap(net(), example=X)


# -- p-values ----------------------------------------------------------------------------------------------------------


@given(st.lists(SCORE, min_size=1, max_size=30), SCORE)
def test_a_p_value_is_the_rank_of_the_row_among_the_reference_and_itself(reference: list[float], score: float) -> None:
    """Against scipy's percentile of a score: the share of all n + 1 that is at least as strange."""
    (p,) = p_values(np.array([score]), np.array(reference))
    everyone = -np.array([*reference, score])
    assert p == pytest.approx(stats.percentileofscore(everyone, -score, kind="weak") / 100)


@given(st.integers(1, 200), st.floats(0.001, 0.999))
def test_p_values_of_exchangeable_rows_are_super_uniform(count: int, rate: float) -> None:
    """Exactly: of the n + 1 ranks that are equally likely, at most a share ``rate`` has p <= rate."""
    reference = np.arange(count, dtype=float)
    new = np.arange(count + 1, dtype=float) - 0.5  # every place among the reference once
    assert (p_values(new, reference) <= rate).mean() <= rate + 1e-12


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(-11, 11), st.floats(0, 5))
def test_a_stranger_row_has_no_larger_p_value(reference: list[float], score: float, more: float) -> None:
    low, high = p_values(np.array([score, score + more]), np.array(reference))
    assert high <= low
    assert high >= 1 / (len(reference) + 1)


@given(st.lists(SCORE, min_size=1, max_size=30), st.lists(st.floats(-4e-6, 4e-6), min_size=30, max_size=30))
def test_rounding_tells_no_scores_apart(scores: list[float], rounding: list[float]) -> None:
    given, off = np.array(scores), np.array(rounding)[: len(scores)]
    np.testing.assert_array_equal(p_values(given * (1 + off), given), p_values(given, given))
    np.testing.assert_array_equal(p_values(given, given * (1 + off)), p_values(given, given))


def test_what_is_infinite_or_nan_is_stranger_than_all_numbers() -> None:
    reference = np.array([1.0, np.inf, -np.inf, np.nan])
    scores = np.array([1e300, np.inf, np.nan, -np.inf])
    np.testing.assert_allclose(p_values(scores, reference), [3 / 5, 3 / 5, 2 / 5, 5 / 5])


@pytest.mark.parametrize("score", ["variance", "feature_distance", "combined"])
@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_a_row_that_others_equal_has_one_p_value_in_every_batch(score: str, distance: str) -> None:
    """Each corner is 50 of the 200 typical rows: whatever batch it comes in, those of the reference count as equal."""
    model = mcdrop.wrap(net(inputs=2, seed=1), example=CORNERS)
    screen = mcdrop.fit_screen(model, CORNERS[np.arange(200) % 7 % 4], fpr=0.05, score=score, distance=distance)
    reference = np.asarray(screen.rows.leaves[0])
    for corner in CORNERS:
        batches = [np.vstack([corner[None], CORNERS[np.arange(more) % 4]]) for more in (0, 1, 2, 6, 30)]
        found = {float(mcdrop.screen(model, batch, screen=screen).p_value[0]) for batch in batches}
        found |= {
            float(p[0]) for batch in batches if (p := mcdrop.predict(model, batch, screen=screen).p_value) is not None
        }
        assert len(found) == 1
        assert found.pop() >= (1 + (reference == corner).all(axis=1).sum()) / (1 + len(reference))


@pytest.mark.parametrize("score", ["variance", "feature_distance", "combined"])
def test_a_row_of_the_reference_has_its_own_rank_alone_and_among_others(model: mcdrop.Model, score: str) -> None:
    screen = mcdrop.fit_screen(model, X, fpr=0.05, score=score)
    rows = np.asarray(screen.rows.leaves[0])
    together = mcdrop.screen(model, rows, screen=screen).p_value
    ranks = stats.rankdata(-screen.scores, method="max")
    np.testing.assert_allclose(together, (1 + ranks) / (1 + len(rows)))
    alone = [mcdrop.predict(model, row[None], screen=screen).p_value for row in rows]
    np.testing.assert_array_equal(np.ravel(alone), together)  # type: ignore[arg-type]


@pytest.mark.statistical
def test_flags_hold_their_false_positive_rate(model: mcdrop.Model) -> None:
    """200 references of 39 rows, 20 inliers each, at 0.05: within 4 standard errors over references."""
    rng, shares = np.random.default_rng(1), []
    for seed in range(200):
        screen = mcdrop.fit_screen(model, rng.normal(size=(39, 2)), fpr=0.05, passes=10, seed=seed)
        found = mcdrop.predict(model, rng.normal(size=(20, 2)), passes=10, seed=seed, screen=screen)
        assert found.is_anomaly is not None
        shares.append(found.is_anomaly.mean())
    assert abs(np.mean(shares) - 0.05) < 4 * stats.sem(shares)


# -- rates -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000))
def test_the_smallest_rate_is_that_of_the_smallest_p_value(count: int) -> None:
    check_fpr(1 / (count + 1), count)
    with pytest.raises(InputError, match="below the smallest p-value"):
        check_fpr(0.999 / (count + 1), count)


@given(st.floats(1e-4, 0.9))
def test_a_refused_rate_comes_with_the_rows_that_would_do(rate: float) -> None:
    try:
        check_fpr(rate, 1)
    except InputError as error:
        check_fpr(rate, int(str(error).split("at least ")[1].split()[0]))


@pytest.mark.parametrize("fpr", [0, 1, -0.1, 5, float("nan"), "0.1", None, True])
def test_a_rate_that_is_no_number_between_0_and_1_is_refused(fpr: Any) -> None:
    with pytest.raises(InputError, match="fpr must be a number between 0 and 1, got"):
        check_fpr(fpr, 1000)


def test_a_screen_cannot_be_made_with_a_rate_it_cannot_hold(model: mcdrop.Model) -> None:
    said = (
        "fpr 0.01 is below the smallest p-value that 50 reference rows can give, 0.02; raise fpr or fit the screen on"
    )
    with pytest.raises(InputError, match=f"{said} at least 99 rows"):
        mcdrop.fit_screen(model, X[:50], fpr=0.01)
    with pytest.raises(InputError, match="below the smallest p-value"):
        Screen("variance", Rows.of(X[:50]), np.zeros(50), PassPlan(), 0.01)
    screen = mcdrop.fit_screen(model, X, fpr=0.01, passes=4)
    with pytest.raises(InputError, match=r"fpr 0\.001 is below"):
        mcdrop.predict(model, X, passes=4, screen=screen, fpr=0.001)


# -- flags -------------------------------------------------------------------------------------------------------------


def test_a_row_is_flagged_where_its_p_value_is_at_most_the_rate(model: mcdrop.Model) -> None:
    screen = mcdrop.fit_screen(model, X, fpr=0.05, passes=20)
    rows = np.concatenate([X[:10] * 0.5, X[:10] * 50])
    for fpr in (None, 0.01, 0.5):
        found = mcdrop.predict(model, rows, passes=20, screen=screen, fpr=fpr)
        assert found.fpr == (0.05 if fpr is None else fpr)
        assert found.score is not None
        assert found.p_value is not None
        np.testing.assert_array_equal(found.is_anomaly, found.p_value <= found.fpr)
        np.testing.assert_array_equal(found.p_value, p_values(found.score, screen.scores))
        np.testing.assert_allclose(found.score, found.epistemic.sum(axis=-1))
    assert found.is_anomaly is not None
    assert found.is_anomaly[10:].all()


def test_the_reference_is_scored_again_with_the_masks_of_the_request(model: mcdrop.Model) -> None:
    """A reference row then gets its own rank exactly, whatever seed, passes or sampler is asked for."""
    screen = mcdrop.fit_screen(model, X, fpr=0.05, passes=20)
    asked: list[dict[str, Any]] = [{"seed": 7}, {"passes": 50}, {"sampler": "iid"}, {"seed": 3, "passes": 33}]
    for options in asked:
        found = mcdrop.predict(model, X, screen=screen, **{"passes": 20} | options)
        assert found.p_value is not None
        ranks = stats.rankdata(-found.epistemic[:, 0], method="max")
        np.testing.assert_allclose(found.p_value, (1 + ranks) / 100, atol=0.0100001)


class Overflowing(nn.Module):
    """Gives infinite outputs where the first input is above 3."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x)
        return outputs / (x[:, :1] < 3).float()


def test_a_row_without_a_finite_output_is_flagged_by_a_detector_as_by_a_prediction() -> None:
    model = mcdrop.wrap(Overflowing(), example=X)
    detector = mcdrop.Detector(model, fpr=0.05).fit(X)
    rows = np.concatenate([[[4.0, 0.0]], X[:20]])
    found = mcdrop.predict(model, rows, screen=detector.screen_)
    assert found.is_anomaly is not None
    assert found.is_anomaly[0]
    np.testing.assert_array_equal(detector.predict(rows), found.is_anomaly)
    np.testing.assert_array_equal(detector.labels_, (detector.decision_scores_ > detector.threshold_))


def test_scikit_learn_clones_a_detector() -> None:
    model = mcdrop.wrap(net(), example=X)
    detector = mcdrop.Detector(model, fpr=0.05, passes=20).fit(X)
    other = clone(detector)
    assert not hasattr(other, "screen_")
    np.testing.assert_array_equal(other.fit(X).predict(X * 2), detector.predict(X * 2))


def test_a_detector_is_the_last_step_of_a_pipeline() -> None:
    model = mcdrop.wrap(net(), example=X)
    scaled = StandardScaler().fit_transform(X)
    expected = mcdrop.Detector(model, fpr=0.05, passes=20).fit(scaled)
    pipeline = make_pipeline(StandardScaler(), mcdrop.Detector(model, fpr=0.05, passes=20)).fit(X)
    np.testing.assert_array_equal(pipeline.predict(X), expected.labels_)
    np.testing.assert_allclose(pipeline.decision_function(X), expected.decision_scores_)
    assert is_outlier_detector(pipeline)


def test_what_is_no_screen_is_refused(model: mcdrop.Model) -> None:
    other: Any = mcdrop.calibrate(model, X, X[:, 0], passes=4)  # whose text holds all of its scores
    asks = (
        lambda: mcdrop.predict(model, X, screen=other),
        lambda: mcdrop.screen(model, X, screen=other),
        lambda: mcdrop.interpret(model, mcdrop.sample(model, X, PassPlan(4)), Options(passes=4), screen=other),
    )
    for ask in asks:
        with pytest.raises(InputError, match=r"screen must be what mcdrop\.fit_screen gave, got Calibration$"):
            ask()


def test_without_a_screen_nothing_is_flagged_and_it_says_why(model: mcdrop.Model) -> None:
    found = mcdrop.predict(model, X, passes=4)
    assert (found.score, found.p_value, found.is_anomaly, found.fpr) == (None, None, None, None)
    assert found.screen_note == "no screen is fitted: fit one on inlier rows with mcdrop.fit_screen"
    with pytest.raises(InputError, match="fpr needs a fitted screen; fit one with"):
        mcdrop.predict(model, X, passes=4, fpr=0.1)


def test_a_model_keeps_the_screen_that_it_is_given(model: mcdrop.Model) -> None:
    screen = mcdrop.fit_screen(model, X, fpr=0.05, passes=20)
    with_screen = model.with_screen(screen)
    ours, given = mcdrop.predict(with_screen, X * 2, passes=20), mcdrop.predict(model, X * 2, passes=20, screen=screen)
    np.testing.assert_array_equal(ours.p_value, given.p_value)
    assert model.screen is None


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_that_do_not_suit_the_task_are_refused_with_those_that_do(model: mcdrop.Model) -> None:
    with pytest.raises(UnknownName, match=f"unknown score 'nope'; choose one of: {', '.join(sorted(SCORES))}"):
        mcdrop.fit_screen(model, X, score="nope")
    for name in ("entropy", "mutual_information", "variation_ratio"):
        with pytest.raises(InputError, match=f"score '{name}' needs a classifier; for this task choose one of: "):
            score_of(name, summary(np.zeros((3, 2))))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_rows_that_the_bank_holds_are_at_distance_0_and_others_are_not(distance: str) -> None:
    """A difference of squares would have lost the digits."""
    rows = (10 + np.random.default_rng(0).normal(size=(7, 5))).astype(np.float32)
    bank = build_bank(np.repeat(rows, 20, axis=0), distance=distance, layer=None)
    np.testing.assert_array_equal(bank.measure(rows * np.float32(1 + 1e-7)), 0)
    away, spread = rows + np.float32(0.5), rows.std(axis=0) if distance == "euclidean" else 1
    pairs = cdist(away / spread, rows / spread, "cosine" if distance == "cosine" else "euclidean")
    np.testing.assert_allclose(bank.measure(away), pairs.min(axis=1), rtol=1e-3)


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_the_farther_of_two_rows_is_never_the_nearer_one(distance: str) -> None:
    """In float32 the square of 2e19 is infinite, and so was what rounding was measured by: the row counted as equal."""
    random = np.random.default_rng(0)
    rows, way = random.normal(size=(50, 3)).astype(np.float32), np.array([[1.0, -2.0, 0.5]])
    bank = build_bank(rows, distance=distance, layer=None)
    found = np.concatenate([bank.measure((far * way).astype(np.float32)) for far in (1e4, 1e10, 1e19, 1e25, 1e38)])
    if distance == "cosine":
        np.testing.assert_allclose(found, found[0], rtol=1e-5)  # the length of a row does not count
    else:
        np.testing.assert_allclose(found / found[0], [1, 1e6, 1e15, 1e21, 1e34], rtol=1e-3)
    with np.errstate(over="ignore"):
        assert not (bank.measure(np.array([[np.inf, 1, 1], [np.nan, 1, 1]], np.float32)) < np.inf).any()


@pytest.mark.parametrize("distance", sorted(DISTANCES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -3.4e38])
def test_typical_rows_without_finite_squares_are_named(distance: str, bad: float) -> None:
    """One of them was in the centre or the spread of all: every row then had the same p-value, or p = 1."""
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    rows[[7, 9]] = bad
    with pytest.raises(InputError, match=r"hidden features of typical row 7 are not finite.*\(2 of the 50 typical"):
        build_bank(rows, distance=distance, layer=None)


@pytest.mark.parametrize("width", [3, 32])
@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_rows_of_no_data_among_the_typical_ones_are_named_by_their_place(distance: str, width: int) -> None:
    """Hidden features of the narrow network stay finite, their squares do not; other reference rows may be so."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 1))
    model = mcdrop.wrap(module, example=X)
    options: dict[str, Any] = {"score": "combined", "distance": distance, "fpr": 0.1}
    for place in (4, 11):  # in the bank, and among those that the two looks are ranked by
        rows = X.copy()
        rows[place] = -3.4e38
        with pytest.raises(InputError, match=f"hidden features of row {place} of the reference are not finite"):
            mcdrop.fit_screen(model, rows, **options)
    with pytest.raises(InputError, match="hidden features of row 11 of x_train are not finite"):
        mcdrop.fit_screen(model, X, x_train=rows, **options)
    rows = X.copy()
    rows[13] = -3.4e38
    found = mcdrop.screen(model, rows, screen=mcdrop.fit_screen(model, rows, **options))
    assert found.is_anomaly[13]


def test_a_typical_row_whose_output_overflows_is_named() -> None:
    last = nn.Linear(8, 1)
    module = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.3), last)
    with torch.no_grad():
        last.weight.fill_(1e30)
    model, rows = mcdrop.wrap(module, example=X), X.copy()
    rows[11] = 1e15
    with pytest.raises(InputError, match=r"output for row 11 of the reference is not finite.*\(1 of the 10 typical"):
        mcdrop.fit_screen(model, rows, score="combined", fpr=0.1)


def test_the_variance_is_summed_over_outputs() -> None:
    found = score_of("variance", summary(np.zeros((2, 3)), [[1.0, 2.0, 3.0], [0.0, 0.0, 0.5]]))
    np.testing.assert_array_equal(found, [6.0, 0.5])


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_features_far_from_0_keep_the_digits_of_what_sets_them_apart(distance: str, offset: float) -> None:
    """Rows alone and among others, beside distances in float64."""
    random = np.random.default_rng(0)
    rows, x = (np.float32(offset) + random.standard_normal((count, 32)).astype(np.float32) for count in (2000, 50))
    bank = build_bank(rows, distance=distance, layer=None)
    whole, alone = bank.measure(x), np.concatenate([bank.measure(x[i : i + 1]) for i in range(50)])
    np.testing.assert_allclose(alone, whole, rtol=1e-6)
    if distance == "euclidean":
        scale = bank.state["scale"].astype(np.float64)
        exact = np.sort(cdist(x / scale, bank.state["rows"].astype(np.float64)), axis=1)[:, 9]
        np.testing.assert_allclose(whole, exact, rtol=1e-3)
