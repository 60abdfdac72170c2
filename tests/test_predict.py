"""Predictions: dropout as torch itself does it, the same answer for the same seed, and refusals that help."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import Frame, net
from numpy.typing import NDArray
from scipy import stats
from torch import nn

import mcdrop
from mcdrop.engine import PassPlan
from mcdrop.errors import InputError, UnknownName
from mcdrop.intervals import INTERVALS
from mcdrop.model import Options
from models import recipes

Array = NDArray[Any]

LINE = np.linspace(-3, 3, 50, dtype=np.float32)[:, None]
X = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)


@cache
def line() -> nn.Module:
    """The net that learns y = x from noisy points on [-1, 1], trained briefly."""
    return recipes.noisy_line(lambda *_: None, epochs=300).network


@pytest.fixture(scope="module")
def model() -> mcdrop.Model:
    return mcdrop.wrap(net(), example=X)


# -- against torch itself ----------------------------------------------------------------------------------------------


@pytest.mark.statistical
def test_a_thousand_passes_agree_with_a_thousand_of_torchs_in_training_mode() -> None:
    """Mean and standard deviation at 50 inputs, each within 4 standard errors of the difference."""
    module = line()
    ours = mcdrop.predict(module, LINE, passes=1000, sampler="iid", keep_samples=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module.train()
        theirs = torch.stack([module(torch.from_numpy(LINE)) for _ in range(1000)]).double().numpy()
        module.eval()
    assert ours.samples is not None
    left, right = ours.samples.astype(np.float64), theirs
    error = np.hypot(stats.sem(left), stats.sem(right))
    np.testing.assert_array_less(np.abs(ours.mean - right.mean(axis=0)), 4 * error)
    spread = [_std_error(draws) for draws in (left, right)]
    difference = np.abs(ours.std - right.std(axis=0, ddof=1))
    np.testing.assert_array_less(difference, 4 * np.hypot(*spread))


def _std_error(draws: Array) -> Array:
    """Of a standard deviation, from the fourth moment: se(s) = sqrt((m4 - s^4) / T) / (2 s)."""
    variance = draws.var(axis=0)
    fourth = ((draws - draws.mean(axis=0)) ** 4).mean(axis=0)
    return np.asarray(np.sqrt((fourth - variance**2) / len(draws)) / (2 * np.sqrt(variance)))


@pytest.mark.parametrize("interval", ["normal", "student_t", "quantile"])
def test_the_interval_widens_outside_the_training_points(interval: str) -> None:
    found = mcdrop.predict(line(), LINE, passes=400, interval=interval)
    width, place = (found.upper - found.lower)[:, 0], np.abs(LINE[:, 0])
    assert width[place > 2].min() > width[place < 1].max()
    right = width[LINE[:, 0] > 1]
    assert (np.diff(right) > 0).all()


def test_the_fit_is_the_line_inside() -> None:
    inside = LINE[np.abs(LINE[:, 0]) < 0.9]
    assert np.abs(mcdrop.predict(line(), inside, passes=200).mean - inside).max() < 0.35


# -- the same seed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["mean", "normal", "student_t", "quantile"])
def test_the_same_seed_gives_the_same_answer_and_another_another(model: mcdrop.Model, interval: str) -> None:
    first, again, other = (mcdrop.predict(model, X, interval=interval, seed=seed) for seed in (5, 5, 6))
    for name in ("mean", "variance", "std", "lower", "upper", "standard_error", "deterministic"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.mean, other.mean)
    np.testing.assert_array_equal(first.deterministic, other.deterministic)


def test_a_row_alone_in_a_batch_of_256_and_reversed_has_the_same_interval(model: mcdrop.Model) -> None:
    many = np.random.default_rng(1).normal(size=(256, 2)).astype(np.float32)
    batch, back = (mcdrop.predict(model, x, interval="quantile", seed=3) for x in (many, many[::-1]))
    alone = mcdrop.predict(model, many[77:78], interval="quantile", seed=3)
    for name in ("mean", "variance", "lower", "upper"):
        np.testing.assert_allclose(getattr(back, name)[::-1], getattr(batch, name), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(getattr(alone, name), getattr(batch, name)[77:78], rtol=1e-4, atol=1e-6)


def test_the_deterministic_output_can_be_left_out(model: mcdrop.Model) -> None:
    """Also that of classes, which are told from each pass."""
    for one in (model, mcdrop.wrap(net(outputs=3), example=X, task="classification")):
        whole, less = (mcdrop.predict(one, X, deterministic=asked) for asked in (True, False))
        assert whole.deterministic is not None
        assert less.deterministic is None
        for name in ("mean", "variance", "lower", "upper"):
            np.testing.assert_allclose(getattr(less, name), getattr(whole, name), rtol=1e-4, atol=1e-6)


def test_a_bare_module_answers_as_a_wrapped_one() -> None:
    module = net()
    bare, wrapped = mcdrop.predict(module, X, seed=2), mcdrop.predict(mcdrop.wrap(module, example=X), X, seed=2)
    np.testing.assert_array_equal(bare.mean, wrapped.mean)
    np.testing.assert_array_equal(bare.variance, wrapped.variance)


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_a_prediction_holds_what_was_asked_and_is_consistent(model: mcdrop.Model) -> None:
    found = mcdrop.predict(model, X, passes=60, level=0.8, interval="normal", seed=4, keep_samples=True, sampler="iid")
    assert (found.seed, found.level, found.interval, found.interval_kind) == (4, 0.8, "normal", "credible")
    assert found.passes.tolist() == [60] * 12
    assert found.samples is not None
    assert found.samples.shape == (60, 12, 1)
    np.testing.assert_allclose(found.mean, found.samples.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.variance, found.samples.var(axis=0, ddof=1, dtype=np.float64), rtol=1e-4)
    np.testing.assert_allclose(found.std**2, found.variance)
    np.testing.assert_allclose(found.upper - found.lower, 2 * stats.norm.ppf(0.9) * found.std)
    assert found.audit is model.audit
    assert found.label is None
    assert {getattr(found, name).dtype for name in ("mean", "variance", "lower", "upper")} == {np.dtype(np.float64)}
    assert mcdrop.predict(model, X).samples is None


def test_sampling_once_and_reading_twice_is_predicting_twice(model: mcdrop.Model) -> None:
    """``sample`` is shared, ``interpret`` is cheap: the two halves of ``predict``."""
    passes = mcdrop.sample(model, X, PassPlan(50, 1, keep_samples=True))
    for interval, level in (("quantile", 0.9), ("student_t", 0.5), ("mean", 0.99)):
        options = Options(passes=50, seed=1, interval=interval, level=level)
        read = mcdrop.interpret(model, passes, options)
        asked = mcdrop.predict(model, X, passes=50, seed=1, interval=interval, level=level)
        np.testing.assert_array_equal(read.lower, asked.lower)
        np.testing.assert_array_equal(read.upper, asked.upper)
        assert read.samples is None


def test_a_classifier_gives_probabilities_and_a_gaussian_head_noise() -> None:
    classes = mcdrop.predict(net(outputs=3), X, task="classification")
    np.testing.assert_allclose(classes.mean.sum(axis=1), 1)
    assert classes.label is not None
    assert classes.entropy is not None
    np.testing.assert_array_equal(classes.label, classes.mean.argmax(axis=1))
    assert ((classes.lower >= 0) & (classes.upper <= 1)).all()
    noisy = mcdrop.predict(net(outputs=4), X, task="gaussian")
    assert noisy.aleatoric is not None
    assert noisy.mean.shape == noisy.aleatoric.shape == (12, 2)
    np.testing.assert_allclose(noisy.variance, noisy.epistemic + noisy.aleatoric)


def test_with_a_tolerance_each_row_ends_on_its_own(model: mcdrop.Model) -> None:
    rows = np.concatenate([X * 0.1, X * 10])
    found = mcdrop.predict(model, rows, tolerance=0.05, max_passes=500)
    assert len(set(found.passes)) > 1
    assert (found.standard_error[found.passes < 500] <= 0.05).all()


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (X[:, :1], "input 'input' must have the shape (N, 2), got (N, 1)"),
        (np.ones((3, 5)), "input 'input' must have the shape (N, 2), got (N, 5)"),
        (X[0], "input 'input' must have the shape (N, 2), got (N,)"),
        (X[:, :, None], "input 'input' must have the shape (N, 2), got (N, 2, 1)"),
        (X[:0], "hold no rows; give at least one"),
        ([], "hold no rows; give at least one"),
        ([[1.0, float("nan")]], "must be finite numbers; row 0 holds nan at [1]"),
        ([[1.0, 2.0], [float("-inf"), 1.0]], "must be finite numbers; row 1 holds -inf at [0]"),
        ([[1e39, 0.0]], "holds numbers that are too large for float32"),
        ([["a", "b"]], "must be numbers, got the text 'a'"),
        ("rows.csv", "must be numbers, got the text 'rows.csv'"),
        ([[1.0, None]], "must be numbers, got a missing value (null)"),
        ([[1.0, 2.0], [3.0]], "row 0 has 2 values and row 1 has 1"),
        (3.0, "must have rows as its first dimension, got a single number"),
        ((X, X), "the network takes 1 input (input), got 2"),
        ({"nope": X}, "inputs must be named input; got nope"),
        ({}, "inputs must be named input; got none"),
        (torch.ones(3, 5), "must have the shape (N, 2), got (N, 5)"),
        (torch.full((3, 2), float("nan")), "must be finite numbers; row 0 holds nan at [0]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_what_was_given(model: mcdrop.Model, x: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        mcdrop.predict(model, x)
    assert said in str(caught.value)


def test_inputs_may_come_in_every_form(model: mcdrop.Model) -> None:
    expected = mcdrop.predict(model, X).mean
    for x in (X.tolist(), X.astype(np.float64), torch.from_numpy(X), (X,), {"input": X}, list(X)):
        np.testing.assert_allclose(mcdrop.predict(model, x).mean, expected, rtol=1e-6)


def test_columns_of_a_frame_are_read_by_name_wherever_rows_are(model: mcdrop.Model) -> None:
    named = replace(model, features=["a", "b"])
    rows = np.random.default_rng(3).normal(size=(40, 2))
    turned = Frame(["b", "a"], rows[:, ::-1])
    np.testing.assert_array_equal(mcdrop.predict(named, turned).mean, mcdrop.predict(model, rows).mean)
    plain, framed = mcdrop.calibrate(model, rows, rows[:, 0]), mcdrop.calibrate(named, turned, rows[:, 0])
    np.testing.assert_array_equal(plain.scores, framed.scores)
    for score, typical in (("variance", (None, None)), ("feature_distance", (rows, turned))):
        by_place = mcdrop.fit_screen(model, rows, score=score, fpr=0.1, x_train=typical[0])
        by_name = mcdrop.fit_screen(named, turned, score=score, fpr=0.1, x_train=typical[1])
        np.testing.assert_array_equal(by_place.scores, by_name.scores)
        found = mcdrop.screen(named, turned, screen=by_place)
        np.testing.assert_array_equal(found.score, mcdrop.screen(model, rows, screen=by_place).score)
    with pytest.raises(InputError, match="the rows have no column b; the model reads a, b"):
        mcdrop.predict(named, Frame(["a", "c"], rows))


def test_a_frame_as_example_names_the_columns_of_later_frames(model: mcdrop.Model, tmp_path: Path) -> None:
    """Its names go with the model when it is saved; numbers in place of names are none."""
    rows = np.random.default_rng(3).normal(size=(40, 2))
    expected = mcdrop.predict(model, rows)
    named = mcdrop.wrap(model.module, example=Frame(["a", "b"], X))
    assert named.features == ["a", "b"]
    loaded = mcdrop.load(mcdrop.save(named, tmp_path / "named", format="onnx"))
    for one, rounding in ((named, 0.0), (loaded, 1e-5)):
        got = mcdrop.predict(one, Frame(["b", "c", "a"], rows[:, [1, 1, 0]]))
        np.testing.assert_allclose(got.mean, expected.mean, rtol=0, atol=rounding)
        np.testing.assert_allclose(mcdrop.predict(one, rows).mean, expected.mean, rtol=0, atol=rounding)
    unnamed = mcdrop.load(mcdrop.save(named, tmp_path / "unnamed", format="onnx", features=[]))
    assert unnamed.features is None
    for columns in ([0, 1], ["a", "a"]):
        assert mcdrop.wrap(model.module, example=Frame(columns, X)).features is None


# -- options -----------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"passes": 0}, "passes must be a whole number from 2 to 1000000, got 0"),
    ({"passes": 1}, "passes must be a whole number from 2 to 1000000, got 1"),
    ({"passes": 10**9}, "passes must be a whole number from 2 to 1000000, got 1000000000"),
    ({"passes": "many"}, "got 'many'"),
    ({"level": 95}, "level must be a number between 0 and 1, got 95 (for 95 % give 0.95)"),
    ({"level": 1.0}, "level must be a number between 0 and 1, got 1.0"),
    ({"level": 0}, "level must be a number between 0 and 1, got 0"),
    ({"level": float("nan")}, "level must be a number between 0 and 1, got nan"),
    ({"level": "0.9"}, "level must be a number between 0 and 1, got '0.9'"),
    ({"interval": "nope"}, f"unknown interval 'nope'; choose one of: {', '.join(sorted(INTERVALS))}"),
    ({"interval": ""}, "unknown interval ''"),
    ({"seed": -1}, "seed must be a whole number from 0 to 2**64 - 1, got -1"),
    ({"seed": 1.5}, "got 1.5"),
    ({"sampler": "sobol"}, "unknown sampler 'sobol'; choose one of: balanced, iid"),
    ({"tolerance": 0}, "tolerance must be above 0, got 0"),
    ({"max_passes": 100}, "max_passes goes with tolerance"),
    ({"tolerance": 0.1, "passes": 50}, "each row has its own number of passes; give max_passes=50 instead of passes"),
    ({"calibration": "x"}, "calibration must be what mcdrop.calibrate gave, got str"),
    ({"tolerance": 0.1, "max_passes": 1}, "passes must be a whole number from 2 to"),
    ({"tolerance": 0.1, "interval": "quantile"}, "an interval that needs them all ('quantile') cannot be read"),
    ({"passes": 38, "interval": "quantile"}, "needs at least 39 passes, got 38"),
    ({"interval": "conformal"}, "interval 'conformal' needs a calibration; fit one on held-out rows with"),
    ({"interval": "predictive"}, "needs to know the noise of y"),
    ({"task": "nope"}, "nope"),
]


@pytest.mark.parametrize(("options", "said"), OPTIONS)
@pytest.mark.parametrize("bare", [False, True])
def test_options_out_of_range_are_refused_with_what_works(
    model: mcdrop.Model, options: dict[str, Any], said: str, bare: bool
) -> None:
    with pytest.raises(InputError) as caught:
        mcdrop.predict(net() if bare else model, X, **options)
    assert said in str(caught.value)


def test_a_model_knows_its_own_task(model: mcdrop.Model) -> None:
    with pytest.raises(InputError, match="this model was wrapped for regression, not for 'gaussian'"):
        mcdrop.predict(model, X, task="gaussian")
    with pytest.raises(UnknownName, match="unknown task 'nope'; choose one of: classification, gaussian, regression"):
        mcdrop.wrap(net(), example=X, task="nope")


def test_options_left_out_are_the_models_own(model: mcdrop.Model) -> None:
    keeping = replace(model, defaults=Options(passes=8, keep_samples=True))
    assert (found := mcdrop.predict(keeping, X).samples) is not None
    assert found.shape == (8, 12, 1)
    for asked in ({"keep_samples": False}, {"tolerance": 1.0}, {"exact_last": True}):
        assert mcdrop.predict(keeping, X, **asked).samples is None
    ending = replace(model, defaults=Options(tolerance=1e-9))  # too small to be reached
    for more, passes in (({}, 100), ({"passes": 70}, 70), ({"max_passes": 64}, 64), ({"tolerance": 1e-9}, 2000)):
        assert set(mcdrop.predict(ending, X[:1], **more).passes) == {passes}
    with pytest.raises(InputError, match="give max_passes=64 instead of passes"):
        mcdrop.predict(ending, X, passes=64, max_passes=128)


def test_passes_that_would_not_fit_in_memory_are_refused_before_they_run(model: mcdrop.Model) -> None:
    many = np.zeros((100_000, 2), np.float32)
    with pytest.raises(InputError, match="GiB to keep every pass; give fewer rows or passes, or an interval that"):
        mcdrop.predict(model, many, passes=1_000_000, interval="quantile")


class FourRows(nn.Module):
    """Is built for four rows, and checks its numbers as it likes."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.one, self.drop, self.two, self.error = nn.Linear(2, 8), nn.Dropout(0.4), nn.Linear(8, 1), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None and bool((x > 10).any()):
            raise self.error
        out: torch.Tensor = self.two(self.drop(self.one(x).view(-1, 4, 8)).flatten(0, 1))
        return out


def test_a_network_that_is_built_for_a_number_of_rows_keeps_its_passes() -> None:
    found = mcdrop.predict(FourRows().eval(), X[:4], passes=40, keep_samples=True, interval="quantile")
    assert found.samples is not None
    np.testing.assert_allclose(found.samples.mean(0), found.mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError(), "AssertionError"),
        (AssertionError("at most 10"), "at most 10"),
        (KeyError("ten"), "KeyError: 'ten'"),
        (ZeroDivisionError("by ten"), "by ten"),
    ],
)
def test_whatever_a_network_raises_of_rows_comes_with_what_it_was_given(error: Exception, said: str) -> None:
    model = mcdrop.wrap(FourRows(error).eval(), example=X[:4])
    with pytest.raises(InputError) as caught:
        mcdrop.predict(model, X[:4] + 20)
    assert str(caught.value) == f"the network cannot take inputs of shape 0: (4, 2): {said}"
    assert caught.value.__cause__ is error
