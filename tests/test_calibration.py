import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from made import classes, net, summary
from scipy import optimize, stats

import mcdrop
from mcdrop.calibration import Calibration, calibration_curve, fit_calibration, targets_of
from mcdrop.engine import PassPlan
from mcdrop.errors import ArtifactError, InputError
from mcdrop.fits import fit_noise, fit_scale, fit_temperature, tempered
from models.networks import noisy_line

X = np.random.default_rng(0).normal(size=(200, 2))
Y = X[:, 0] + 0.5 * np.random.default_rng(1).normal(size=200)


def held() -> tuple[mcdrop.Model, mcdrop.Calibration]:
    model = mcdrop.wrap(net(), example=X)
    return model, mcdrop.calibrate(model, X, Y)


# -- fits --------------------------------------------------------------------------------------------------------------


def test_fitted_noise_is_the_most_probable() -> None:
    random = np.random.default_rng(0)
    epistemic = random.exponential(size=(400, 1))
    residuals = random.normal(size=(400, 1)) * np.sqrt(epistemic + 0.7)

    def loss(noise: float) -> float:
        return float(-np.sum(stats.norm.logpdf(residuals, scale=np.sqrt(epistemic + noise))))

    best = optimize.minimize_scalar(loss, bounds=(1e-3, 10), method="bounded", options={"xatol": 1e-9}).x
    assert fit_noise(residuals, epistemic)[0] == pytest.approx(best, rel=1e-5)


def test_noise_without_epistemic_variance_is_the_mean_square() -> None:
    residuals = np.array([[1.0, 2.0], [-3.0, 0.0]])
    np.testing.assert_allclose(fit_noise(residuals, np.zeros((2, 2))), [5, 2])


def test_noise_is_never_below_zero() -> None:
    assert fit_noise(np.full((5, 1), 0.1), np.full((5, 1), 9.0))[0] > 0
    assert fit_noise(np.zeros((5, 1)), np.full((5, 1), 9.0))[0] > 0


def test_scale_makes_normal_errors_most_probable() -> None:
    random = np.random.default_rng(1)
    variance = random.exponential(size=(300, 1))
    residuals = 2.5 * random.normal(size=(300, 1)) * np.sqrt(variance)

    def loss(scale: float) -> float:
        return float(-np.sum(stats.norm.logpdf(residuals, scale=scale * np.sqrt(variance))))

    best = optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}).x
    assert fit_scale(residuals, variance)[0] == pytest.approx(best, rel=1e-5)


def test_temperature_undoes_a_sharpening() -> None:
    random = np.random.default_rng(2)
    true = random.dirichlet([1, 1, 1], 20_000)
    labels = np.array([random.choice(3, p=row) for row in true])
    sharp = tempered(true, 0.4)
    found = fit_temperature(sharp, labels)
    assert found == pytest.approx(2.5, rel=0.03)
    np.testing.assert_allclose(tempered(sharp, 2.5), true, atol=1e-12)


# -- the record --------------------------------------------------------------------------------------------------------


def test_calibration_applies_noise_and_scale() -> None:
    made = summary(np.zeros((4, 2)), 0.5)
    calibration = fit_calibration(made, np.full((4, 2), 3.0), task="regression", plan=PassPlan(), fingerprint="")
    applied = calibration.applied(made)
    assert applied.aleatoric is not None
    np.testing.assert_allclose(applied.variance, 9.0)  # epistemic and noise add up to the squared residual
    assert applied.scale == pytest.approx(np.ones(2))


def test_noise_that_is_known_is_not_fitted() -> None:
    made = summary(np.zeros((10, 1)), 0.5)
    calibration = fit_calibration(made, np.ones(10), task="regression", plan=PassPlan(), fingerprint="", noise=0.25)
    assert calibration.noise == pytest.approx([0.25])
    assert calibration.scores.shape == (1, 10, 1)  # and spends no rows


@pytest.mark.parametrize("method", ["absolute", "cqr", "standardised"])
def test_calibration_survives_json_to_the_bit(method: str) -> None:
    model = mcdrop.wrap(net(), example=X)
    first = mcdrop.calibrate(model, X, Y, method=method)
    again = Calibration.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again.fingerprint == first.fingerprint
    for level in (0.8, 0.95):
        answers = [mcdrop.predict(model, X, calibration=one, level=level) for one in (first, again)]
        np.testing.assert_array_equal(answers[0].lower, answers[1].lower)


def test_what_is_not_a_calibration_is_refused() -> None:
    _, calibration = held()
    with pytest.raises(ArtifactError, match="not a calibration"):
        Calibration.from_dict({})
    with pytest.raises(ArtifactError, match="unknown calibration method 'nope'"):
        Calibration.from_dict(calibration.to_dict() | {"method": "nope"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shape": -1}, "its scores have the shape"),
        ({"shape": [-1]}, "its scores have the shape"),
        ({"shape": [-1, 1]}, "its scores have the shape"),
        ({"levels": [0.8, 0.9]}, "its scores have the shape"),
        ({"scores": 10**400}, "OverflowError"),
        ({"noise": [10**400]}, "OverflowError"),
        ({"noise": [-1.0]}, "not above 0"),
        ({"offset": [-1.0]}, "not above 0"),
        ({"scale": [0.0]}, "not above 0"),
        ({"temperature": 0.0}, "not above 0"),
        ({"temperature": 10**400}, "TypeError"),
    ],
)
def test_a_calibration_of_numbers_that_none_has_is_refused(changed: dict[str, Any], said: str) -> None:
    """A variance below 0 would make bounds that are NaN."""
    _, calibration = held()
    with pytest.raises(ArtifactError, match=f"not a calibration: .*{said}"):
        Calibration.from_dict(calibration.to_dict() | changed)


@pytest.mark.statistical
def test_calibration_curve_is_the_diagonal_where_the_noise_is_right() -> None:
    random = np.random.default_rng(3)
    made = summary(np.zeros((5000, 1)), 1.0, aleatoric=np.full((5000, 1), 3.0))
    expected, observed = calibration_curve(made, 2 * random.normal(size=(5000, 1)))
    assert np.abs(observed - expected).max() < 1.63 / np.sqrt(5000)  # Kolmogorov's 1 % bound
    _, narrow = calibration_curve(made, 6 * random.normal(size=(5000, 1)))
    assert narrow[0] > 0.15  # too many y below the first percentile


@pytest.mark.parametrize("points", [0, -3, 1.5, "a", True, None])
def test_a_curve_has_a_whole_number_of_points(points: Any) -> None:
    made = summary(np.zeros((5, 1)), 1.0, aleatoric=np.ones((5, 1)))
    with pytest.raises(InputError, match=f"points must be a whole number of at least 1, got {points!r}"):
        calibration_curve(made, np.zeros((5, 1)), points)
    assert [len(part) for part in calibration_curve(made, np.zeros((5, 1)), np.int64(1))] == [1, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["absolute", "cqr", "standardised"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_held_out_row_without_a_finite_output_is_named(method: str, bad: float) -> None:
    fine, mean = np.zeros((30, 2)), np.zeros((30, 2))
    mean[[7, 9], 1] = bad
    for made in (summary(mean), summary(fine, mean), summary(fine, aleatoric=mean)):
        with pytest.raises(
            InputError, match="for held-out row 7 is not finite; leave out such rows, of which there are 2"
        ):
            fit_calibration(made, fine, task="regression", plan=PassPlan(), fingerprint="", method=method)


def test_a_held_out_row_without_probabilities_is_named() -> None:
    with pytest.raises(InputError, match="for held-out row 1 is not finite"):
        fit_calibration(
            classes([[0.5, 0.5], [np.nan, np.nan]]), [0, 1], task="classification", plan=PassPlan(), fingerprint=""
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_may_be_a_tensor_that_is_learnt(dtype: torch.dtype) -> None:
    made, y = summary(np.zeros((8, 1))), torch.arange(8, dtype=dtype, requires_grad=True)
    found = fit_calibration(made, y, task="regression", plan=PassPlan(), fingerprint="", method="absolute")
    assert found.scores[0, :, 0].tolist() == list(range(8))


def test_labels_and_targets_that_are_text_are_refused() -> None:
    model = mcdrop.wrap(net(outputs=3), example=X, task="classification")
    with pytest.raises(InputError, match="labels must be numbers, got the text 'cat'"):
        mcdrop.calibrate(model, X, ["cat"] * 200)
    with pytest.raises(InputError, match="labels must be finite numbers; row 0 holds nan"):
        mcdrop.calibrate(model, X, np.full(200, np.nan))
    with pytest.raises(InputError, match=r"targets must be numbers, got the text '1\.5'"):
        mcdrop.calibrate(mcdrop.wrap(net(), example=X), X, ["1.5"] * 200)


# -- with a model ------------------------------------------------------------------------------------------------------


def test_a_calibration_makes_the_interval_conformal() -> None:
    model, calibration = held()
    found = mcdrop.predict(model, X, calibration=calibration, level=0.9)
    assert (found.interval, found.interval_kind) == ("conformal", "prediction")
    assert found.aleatoric is not None
    inside = (found.lower[:, 0] <= Y) & (found.upper[:, 0] >= Y)
    assert inside.mean() >= 0.88


def test_with_calibration_the_model_answers_alone() -> None:
    model, calibration = held()
    alone = mcdrop.predict(model.with_calibration(calibration), X, interval="conformal")
    np.testing.assert_array_equal(alone.lower, mcdrop.predict(model, X, calibration=calibration).lower)


def test_a_calibration_is_refused_elsewhere() -> None:
    model, calibration = held()
    with pytest.raises(InputError, match=r"fitted with passes=100 seed=0 .* does not hold for passes=50 seed=0"):
        mcdrop.predict(model, X, calibration=calibration, passes=50)
    with pytest.raises(InputError, match="seed=1"):
        mcdrop.predict(model, X, calibration=calibration, seed=1)
    with pytest.raises(InputError, match="weights or live sites have changed"):
        mcdrop.predict(mcdrop.wrap(net(seed=1), example=X), X, calibration=calibration)


def test_training_on_ends_a_calibration() -> None:
    module = net()
    model = mcdrop.wrap(module, example=X)
    calibration = mcdrop.calibrate(model, X, Y)
    with torch.no_grad():
        next(module.parameters()).add_(1e-3)
    with pytest.raises(InputError, match="weights or live sites have changed"):
        mcdrop.predict(model, X, calibration=calibration)


def test_the_models_own_calibration_stands_aside_where_it_does_not_hold() -> None:
    model, calibration = held()
    both = model.with_calibration(calibration)
    assert mcdrop.predict(both, X, passes=50).aleatoric is None
    assert mcdrop.predict(both, X).aleatoric is not None
    with pytest.raises(InputError, match="does not hold for"):
        mcdrop.predict(both, X, passes=50, interval="conformal")


def test_classes_get_sets_and_tempered_probabilities() -> None:
    model = mcdrop.wrap(net(outputs=3), example=X, task="classification")
    labels = (X[:, 0] > 0).astype(int)
    calibration = mcdrop.calibrate(model, X, labels)
    found = mcdrop.predict(model, X, calibration=calibration, level=0.9)
    assert found.interval == "student_t"
    assert found.prediction_set is not None
    assert found.probabilities is not None
    assert found.prediction_set[np.arange(200), labels].mean() >= 0.9
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    assert calibration.temperature is not None
    np.testing.assert_allclose(found.probabilities, tempered(found.mean, calibration.temperature))
    with pytest.raises(InputError, match="gives prediction_set, not bounds"):
        mcdrop.predict(model, X, calibration=calibration, interval="conformal")


def test_targets_that_do_not_fit_are_refused() -> None:
    model = mcdrop.wrap(net(), example=X)
    with pytest.raises(InputError, match=r"shape \(200, 1\)"):
        mcdrop.calibrate(model, X, Y[:5])
    with pytest.raises(InputError, match="does not suit the task 'regression'; choose one of: absolute, cqr, stand"):
        mcdrop.calibrate(model, X, Y, method="lac")
    with pytest.raises(InputError, match="unknown calibration method 'nope'"):
        mcdrop.calibrate(model, X, Y, method="nope")
    with pytest.raises(InputError, match=r"unknown calibration method \['lac'\]; choose one of"):
        mcdrop.calibrate(model, X, Y, method=["lac"])  # type: ignore[arg-type]
    made = classes([[0.5, 0.5], [0.1, 0.9]])
    for labels in ([0, 2], [0.5, 1]):
        with pytest.raises(InputError, match="from 0 to 1"):
            fit_calibration(made, labels, task="classification", plan=PassPlan(), fingerprint="")


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        (-1.0, "noise must be a variance above 0"),
        ([0.1, 0.2, 0.3], r"noise must be a number or of the shape \(2,\), one row's; got \(3,\)"),
        ("a", "noise must be numbers, got the text 'a'"),
        (np.inf, "noise must be finite numbers"),
        (True, "noise must be a variance above 0, got True"),
        (np.True_, "noise must be a variance above 0, got True"),
    ],
)
def test_noise_that_is_no_variance_of_the_outputs_is_refused(noise: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit_calibration(
            summary(np.zeros((9, 2))), np.ones((9, 2)), task="regression", plan=PassPlan(), fingerprint="", noise=noise
        )


@pytest.mark.parametrize("noise", [0.25, np.float32(0.25), torch.tensor(0.25, requires_grad=True), [0.25, 0.25]])
def test_known_noise_may_be_any_number_or_one_an_output(noise: Any) -> None:
    made = summary(np.zeros((9, 2)))
    found = fit_calibration(made, np.ones((9, 2)), task="regression", plan=PassPlan(), fingerprint="", noise=noise)
    assert found.noise is not None
    assert found.noise.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("levels", [[], 0.9, "0.9", [90]])
def test_a_method_by_level_needs_levels(levels: Any) -> None:
    made = summary(np.zeros((9, 1)), samples=np.zeros((8, 9, 1)))
    with pytest.raises(InputError, match="level"):
        fit_calibration(
            made, np.ones(9), task="regression", plan=PassPlan(), fingerprint="", method="cqr", levels=levels
        )


def test_a_level_of_fewer_digits_is_the_one_that_is_written() -> None:
    made = summary(np.zeros((30, 1)), samples=np.random.default_rng(0).normal(size=(8, 30, 1)))
    asked: dict[str, Any] = {"task": "regression", "plan": PassPlan(), "fingerprint": "", "method": "cqr"}
    y, short = np.random.default_rng(1).normal(size=30), cast(float, np.float32(0.9))
    ours, theirs = (fit_calibration(made, y, levels=[level], **asked) for level in (short, 0.9))
    assert ours.levels == (0.9,)
    np.testing.assert_array_equal(ours.bounds(made, 0.9), theirs.bounds(made, short))


@pytest.mark.parametrize(
    ("outputs", "given", "fits"),
    [
        ((6, 1), (6,), True),
        ((6,), (6, 1), True),
        ((6, 1, 2, 3), (6, 2, 3), True),
        ((6, 2, 3, 4), (6, 3, 4, 2), False),
        ((6, 2, 3), (6, 6), False),
        ((6, 2), (2, 6), False),
        ((1, 3), (3, 1), False),
    ],
)
def test_targets_are_not_put_into_another_layout(outputs: tuple[int, ...], given: tuple[int, ...], fits: bool) -> None:
    y = np.arange(np.prod(given), dtype=np.float64).reshape(given)
    if fits:
        np.testing.assert_array_equal(targets_of(y, np.zeros(outputs)).ravel(), y.ravel())
        return
    with pytest.raises(InputError, match=f"targets must have the shape {re.escape(str(outputs))} of the outputs"):
        targets_of(y, np.zeros(outputs))


def test_sparse_targets_are_refused() -> None:
    with pytest.raises(InputError, match=r"targets must be dense, got a tensor of layout torch\.sparse_coo"):
        targets_of(torch.eye(3).to_sparse(), np.zeros((3, 3)))


def test_a_folder_keeps_its_calibration(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 60)[:, None]
    model = mcdrop.wrap(noisy_line(), example=x)
    calibration = mcdrop.calibrate(model, x, x)
    mcdrop.save(model, tmp_path / "line" / "1", factory="models.networks:noisy_line", calibration=calibration)
    loaded = mcdrop.load(tmp_path / "line")
    ours = mcdrop.predict(model, x, calibration=calibration)
    np.testing.assert_array_equal(mcdrop.predict(loaded, x, interval="conformal").upper, ours.upper)
    other = mcdrop.wrap(noisy_line(), example=x)
    with pytest.raises(ArtifactError, match="belongs to another model"):
        mcdrop.save(other, tmp_path / "line" / "2", factory="models.networks:noisy_line", calibration=calibration)


def test_bounds_need_the_deterministic_output_which_predict_gives_them() -> None:
    """Bounds move by rounding, and it says how many digits the network has."""
    model, calibration = held()
    with_it, without = (
        mcdrop.predict(model, X, calibration=calibration, deterministic=asked) for asked in (True, False)
    )
    np.testing.assert_array_equal(without.upper, with_it.upper)
    assert without.deterministic is not None
    result = mcdrop.sample(model, X, calibration.plan, deterministic=False)
    options = mcdrop.Options(interval="conformal")
    with pytest.raises(InputError, match="deterministic output, which was left out; sample with deterministic=True"):
        mcdrop.interpret(model, result, options, calibration=calibration)
    found = mcdrop.interpret(model, result, mcdrop.Options())
    assert found.deterministic is None
    np.testing.assert_allclose(found.mean, with_it.mean, rtol=1e-5, atol=1e-6)


def test_noise_of_classes_is_refused() -> None:
    with pytest.raises(InputError, match="noise cannot be given here: classes have none"):
        fit_calibration(
            classes([[0.5, 0.5]] * 9), [0] * 9, task="classification", plan=PassPlan(), fingerprint="", noise=0.3
        )


@pytest.mark.parametrize("method", ["absolute", "standardised"])
def test_targets_whose_squares_are_no_numbers_are_refused(method: str) -> None:
    """At 1e155 their noise was infinite, and every bound of the method not a number."""

    def fitted(size: float) -> Calibration:
        y = size * np.linspace(-1, 1, 9)
        return fit_calibration(
            summary(np.zeros((9, 1))), y, task="regression", plan=PassPlan(), fingerprint="", method=method
        )

    spread = 1e150 * np.sqrt(np.mean(np.linspace(-1, 1, 9) ** 2))  # beside which that of the passes is nothing
    np.testing.assert_allclose(np.sqrt(fitted(1e150).noise), spread)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"up to 1\.0e\+155 from the network's outputs.*larger units"):
        fitted(1e155)
