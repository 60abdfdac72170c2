"""What was fitted holds for the weights, the output, the passes and the layer that it was fitted with."""

import hashlib
import json
import operator
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import net
from torch import Tensor, nn

import mcdrop
import mcdrop.factory
from mcdrop.engine import PassPlan
from mcdrop.errors import InputError
from mcdrop.model import Options
from mcdrop.reads import reads_of
from mcdrop.sampling import fingerprint

X = np.random.default_rng(0).normal(size=(99, 2)).astype(np.float32)
NEW = np.random.default_rng(1).normal(size=(50, 2)).astype(np.float32)
Y = X.sum(axis=1)


class Heads(nn.Module):
    """Two outputs, the second of which is far wider."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.near, self.far = net(outputs=8), nn.Linear(8, 1), nn.Linear(8, 1)
        nn.init.normal_(self.far.weight, std=5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.body(x))
        return self.near(hidden), self.far(hidden)


@cache
def head(output: Any) -> mcdrop.Model:
    return mcdrop.wrap(Heads(), example=X, output=output, tuning={})


@pytest.fixture(scope="module")
def model() -> mcdrop.Model:
    return mcdrop.wrap(net(), example=X, tuning={})


# -- weights -----------------------------------------------------------------------------------------------------------


def test_screening_and_detectors_follow_the_weights_as_predictions_do() -> None:
    """With its last weights doubled a network's variances are four times as large, and no rank is another."""
    module = net()
    model = mcdrop.wrap(module, example=X, tuning={})
    detector = mcdrop.Detector(model, fpr=0.05).fit(X)
    screen, threshold = detector.screen_, detector.threshold_
    ranks, flags = mcdrop.screen(model, NEW, screen=screen).p_value, detector.predict(NEW)
    with torch.no_grad():
        module[3].weight.mul_(2)  # type: ignore[index]
    np.testing.assert_array_equal(mcdrop.screen(model, NEW, screen=screen).p_value, ranks)
    np.testing.assert_array_equal(mcdrop.predict(model, NEW, screen=screen).p_value, ranks)
    np.testing.assert_array_equal(detector.p_values(NEW), ranks)
    np.testing.assert_array_equal(detector.predict(NEW), flags)
    assert detector.threshold_ == pytest.approx(4 * threshold)
    np.testing.assert_array_equal(detector.decision_function(NEW) > detector.threshold_, flags)


def test_hidden_features_of_other_weights_are_compared_nowhere() -> None:
    module = net()
    model = mcdrop.wrap(module, example=X, tuning={})
    detector = mcdrop.Detector(model, fpr=0.05, score="feature_distance").fit(X)
    with torch.no_grad():
        module[0].weight.mul_(-1)  # type: ignore[index]
    asks: list[Callable[[Any], object]] = [
        detector.predict,
        detector.p_values,
        detector.decision_function,
        lambda x: mcdrop.screen(model, x, screen=detector.screen_),
        lambda x: mcdrop.predict(model, x, screen=detector.screen_),
        lambda x: detector.threshold_,
    ]
    for ask in asks:
        with pytest.raises(InputError, match="compares hidden features, and the weights or the output have changed"):
            ask(NEW)


def test_a_detector_has_a_threshold_once_it_is_fitted(model: mcdrop.Model) -> None:
    assert not hasattr(mcdrop.Detector(model), "threshold_")


# -- passes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint64])
def test_numbers_of_numpy_make_the_same_plan(model: mcdrop.Model, kind: Any) -> None:
    asked, plain = PassPlan(kind(100), kind(7)), PassPlan(100, 7)
    assert repr(asked) == repr(plain)
    assert fingerprint(model, asked) == fingerprint(model, plain)
    ours, theirs = (mcdrop.predict(model, X[:2], passes=passes, seed=3) for passes in (kind(100), 100))
    np.testing.assert_array_equal(ours.mean, theirs.mean)


@pytest.mark.parametrize(("given", "meant"), [(1, 1.0), (np.float32(0.1), 0.1), (np.float64(0.1), 0.1)])
def test_a_tolerance_is_the_number_that_is_written(given: Any, meant: float) -> None:
    assert repr(PassPlan(tolerance=given)) == repr(PassPlan(tolerance=meant))


def test_levels_and_rates_are_the_numbers_that_are_written(model: mcdrop.Model) -> None:
    options = Options(np.int64(199), np.float32(0.99), "quantile", np.uint8(1), tolerance=None)  # type: ignore[arg-type]
    assert repr(options) == repr(Options(199, 0.99, "quantile", 1))
    assert len(mcdrop.predict(model, X[:1], passes=199, interval="quantile", level=np.float32(0.99)).lower) == 1  # type: ignore[arg-type]
    screen = mcdrop.fit_screen(model, X, fpr=np.float32(0.01))  # type: ignore[arg-type]
    assert repr(screen.fpr) == "0.01"
    found = mcdrop.screen(model, X, screen=screen, fdr=np.float16(0.1))  # type: ignore[arg-type]
    assert repr(found.rate) == "0.1"


def test_a_calibration_of_numpys_numbers_is_one_of_pythons(model: mcdrop.Model) -> None:
    calibration = mcdrop.calibrate(model, X, Y, passes=np.int64(20), seed=np.uint8(3))  # type: ignore[arg-type]
    assert json.loads(json.dumps(calibration.to_dict()))["plan"] == asdict(PassPlan(20, 3))
    held = model.with_calibration(calibration)
    for passes, seed in ((20, 3), (np.int16(20), np.int64(3))):
        assert mcdrop.predict(held, X, passes=passes, seed=seed).aleatoric is not None  # type: ignore[arg-type]


def test_a_prediction_says_whether_a_calibration_was_applied(model: mcdrop.Model) -> None:
    calibration = mcdrop.calibrate(model, X, Y)
    held = model.with_calibration(calibration)
    for asked, calibrated in (({}, True), ({"seed": 1}, False), ({"passes": 50}, False)):
        found = mcdrop.predict(held, X, **asked)  # type: ignore[arg-type]
        assert found.audit.calibrated == (found.aleatoric is not None) == calibrated
    assert mcdrop.predict(model, X, calibration=calibration).audit.calibrated
    assert not mcdrop.predict(model, X).audit.calibrated


# -- output ------------------------------------------------------------------------------------------------------------


def test_without_a_chosen_output_the_fingerprint_is_what_older_folders_hold(model: mcdrop.Model) -> None:
    sites = [(site.name, site.kind, site.p) for site in model.audit.live]
    plan = {"exact_last": False, "keep_samples": False, "passes": 9, "sampler": "balanced", "seed": 2}
    said = ("regression", model.backend.digest(), sites, [*plan.items(), ("tolerance", None)])
    assert fingerprint(model, PassPlan(9, 2)) == hashlib.sha256(repr(said).encode()).hexdigest()


def test_a_calibration_is_for_the_output_that_it_was_fitted_on() -> None:
    near, far = head(0), head(1)
    calibration = mcdrop.calibrate(near, X, Y)
    assert mcdrop.predict(near, X, calibration=calibration).interval == "conformal"
    with pytest.raises(InputError, match="belongs to another model or output"):
        mcdrop.predict(far, X, calibration=calibration)


def test_a_screen_of_another_output_is_scored_again() -> None:
    """Its rows are as good a reference for this output as for that one; its scores are not."""
    near, far = head(0), head(1)
    lent, own = (mcdrop.fit_screen(one, X, fpr=0.05) for one in (near, far))
    expected = mcdrop.screen(far, NEW, screen=own).p_value
    assert not np.array_equal(own.scores, lent.scores)
    np.testing.assert_array_equal(mcdrop.screen(far, NEW, screen=lent).p_value, expected)
    np.testing.assert_array_equal(mcdrop.predict(far, NEW, screen=lent).p_value, expected)
    features = mcdrop.fit_screen(near, X, fpr=0.05, score="feature_distance")
    with pytest.raises(InputError, match="compares hidden features"):
        mcdrop.screen(far, NEW, screen=features)


def _near(outputs: Any) -> Tensor:
    return outputs[0]  # type: ignore[no-any-return]


def _at(place: int) -> Callable[[Any], Tensor]:
    return lambda outputs: outputs[place]


class _Pick:
    """Picks an output, as an object or by a method."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(self, outputs: Any) -> Tensor:
        return outputs[self.place]  # type: ignore[no-any-return]


def _by_default(place: int) -> Callable[[Any], Tensor]:
    def pick(outputs: Any, place: int = place) -> Tensor:
        return outputs[place]  # type: ignore[no-any-return]

    return pick


def _by_name(place: int) -> Callable[[Any], Tensor]:
    def pick(outputs: Any, *, place: int = place) -> Tensor:
        return outputs[place]  # type: ignore[no-any-return]

    return pick


def test_functions_that_pick_the_output_are_told_apart_by_what_they_do() -> None:
    """And by nothing that another process would not have, such as where they lie in memory."""
    zeroth, first = (_by_default(place) for place in (0, 1))
    functions = [_near, _at(0), _at(0), _at(1), operator.itemgetter(0), operator.itemgetter(0), zeroth, first]
    reads = [reads_of(function) for function in functions]
    assert [reads.index(one) for one in reads] == [0, 1, 1, 3, 4, 4, 6, 7]
    assert head(_near).reads == reads[0]
    kinds: list[Any] = [
        _Pick,
        lambda place: _Pick(place).__call__,
        operator.itemgetter,
        lambda place: partial(_at(place)),
    ]
    for pick in kinds:
        assert reads_of(pick(0)) == reads_of(pick(0)) != reads_of(pick(1))
    assert reads_of(_by_name(0)) == reads_of(_by_name(0)) != reads_of(_by_name(1))


@pytest.mark.parametrize("form", ["pt2", "onnx", "safetensors"])
def test_a_folder_keeps_the_output_and_what_was_fitted_on_it(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcdrop.factory, "FACTORY_MODULES", (*mcdrop.factory.FACTORY_MODULES, __name__))
    about: dict[str, Any] = {"factory": f"{__name__}:Heads"} if form == "safetensors" else {"format": form}
    far, older = head(1), replace(head(1), reads="")  # as it was when outputs were not looked at
    for number, one in enumerate((far, older)):
        whole = one.with_calibration(mcdrop.calibrate(one, X, Y)).with_screen(mcdrop.fit_screen(one, X, fpr=0.05))
        loaded = mcdrop.load(mcdrop.save(whole, tmp_path / "net" / str(number), **about))
        assert loaded.digest == one.digest
        ours, theirs = (mcdrop.predict(each, X, interval="conformal") for each in (whole, loaded))
        np.testing.assert_allclose(theirs.upper, ours.upper, rtol=1e-4, atol=1e-4)


# -- layer and task ----------------------------------------------------------------------------------------------------


def test_features_are_compared_with_those_of_their_own_layer(model: mcdrop.Model) -> None:
    first, second = (
        mcdrop.fit_screen(model, X, score="feature_distance", layer=layer, fpr=0.05) for layer in ("0", "1")
    )
    passes, plain = (mcdrop.sample(model, NEW, PassPlan(), screen=screen) for screen in (first, None))
    np.testing.assert_array_equal(
        mcdrop.interpret(model, passes, Options(), screen=first).p_value,
        mcdrop.predict(model, NEW, screen=first).p_value,
    )
    for given in (passes, plain):
        with pytest.raises(
            InputError, match=r"features that were not read with these passes; give it to mcdrop\.sample"
        ):
            mcdrop.interpret(model, given, Options(), screen=second)


def test_passes_are_read_as_what_they_are(model: mcdrop.Model) -> None:
    passes = mcdrop.sample(model, X, PassPlan())
    classifier = mcdrop.wrap(net(outputs=3), example=X, task="classification", tuning={})
    with pytest.raises(InputError, match="of a model for regression and cannot be read as classification"):
        mcdrop.interpret(classifier, passes, Options())
    with pytest.raises(
        InputError, match="'quantile' reads every pass, and these passes were not kept; sample them with"
    ):
        mcdrop.interpret(model, passes, Options(interval="quantile"))
