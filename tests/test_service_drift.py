"""The drift alarm of a served model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcdrop.artifact import load, save
from mcdrop.drift import DriftMonitor
from mcdrop.fitting import fit_screen
from mcdrop.model import Options
from mcdrop.predict import predict
from service.registry import Registry
from service.settings import Settings
from service.watch import Watch
from service.work import answer


def drift_after(store: Path, *bodies: dict[str, object]) -> dict[str, object]:
    """What the model's page says of drift after these requests."""
    registry = Registry(store, "line")
    registry.load()
    for body in bodies:
        answer(json.dumps(body).encode(), registry, Settings())
    watch = registry.find("line").watch
    assert watch is not None
    return vars(watch.state)


def rows(low: float, high: float, count: int = 300) -> dict[str, object]:
    return {"inputs": np.random.default_rng(0).uniform(low, high, (count, 1)).tolist()}


def test_rows_like_the_reference_raise_no_alarm(store: Path) -> None:
    drift = drift_after(store, rows(-1, 1))
    assert drift["rows"] == 300
    assert drift["alarm"] is False


def test_rows_from_elsewhere_raise_it(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert drift_after(store, rows(-1, 1), rows(4, 6))["alarm"] is True
    assert caplog.text.count("have drifted") == 1


def test_requests_under_another_plan_are_not_compared(store: Path) -> None:
    far = rows(4, 6)
    assert drift_after(store, {**far, "seed": 9}, {**far, "passes": 64})["rows"] == 0


@pytest.mark.parametrize(
    "defaults",
    [
        pytest.param({"passes": 32}, id="passes"),
        pytest.param({"seed": 3}, id="seed"),
        pytest.param({"sampler": "iid"}, id="sampler"),
        pytest.param({"passes": 256, "tolerance": 0.5}, id="tolerance"),
    ],
)
def test_requests_are_watched_under_the_model_s_plan_whatever_that_of_its_screen(
    store: Path, defaults: dict[str, Any]
) -> None:
    """The alarm is that of a monitor of the scores that the library gives of both, reference and rows."""
    model = load(store / "line")
    assert model.screen is not None
    inliers, model = model.screen.rows, replace(model, defaults=Options(**defaults))
    x = np.random.default_rng(0).uniform(-1, 1, (30, 1))
    watch = Watch("line", model)
    for passes, seed in ((None, None), (model.defaults.passes, model.defaults.seed), (7, None), (None, 9)):
        watch.see(predict(model, x, passes=passes, seed=seed), passes)
    reference, scores = predict(model, inliers).score, predict(model, x).score
    assert reference is not None
    assert scores is not None
    assert watch.state == DriftMonitor(reference).update([*scores, *scores])
    assert watch.state.rows == 60


def test_a_served_model_is_watched_by_default_requests_also_with_a_screen_of_other_passes(
    store: Path, tmp_path: Path
) -> None:
    model = load(store / "line")
    assert model.screen is not None
    screen = fit_screen(model, model.screen.rows, fpr=0.05, passes=30)
    save(model, tmp_path / "line" / "1", factory="models.networks:noisy_line", screen=screen)
    far = rows(4, 6)
    drift = drift_after(tmp_path, far, {**far, "passes": 30})
    assert drift["rows"] == 300
    assert drift["alarm"] is True


def test_a_screen_that_no_request_can_be_compared_with_is_named(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(store / "line")
    assert model.screen is not None
    screen = fit_screen(model, model.screen.rows, fpr=0.1, score="feature_distance")
    others = replace(screen, weights="others")
    save(model, tmp_path / "line" / "1", factory="models.networks:noisy_line", screen=others)
    registry = Registry(tmp_path)
    registry.load()
    assert registry.find("line").watch is None
    assert "line 1: drift is not watched: the screen compares hidden features, and the weights" in caplog.text


def test_only_the_first_rows_of_a_large_request_are_watched(store: Path) -> None:
    assert drift_after(store, rows(-1, 1, 1500))["rows"] == 1000


@pytest.mark.parametrize("far", [3e38, -3e38])
def test_outputs_that_overflow_are_answered_and_count_as_strange(store: Path, far: float) -> None:
    """Their score is no number: whatever the model's own passes and seed, the answer is the same as under others."""
    registry = Registry(store, "line")
    registry.load()
    for more in ({}, {"seed": 1}):
        body = json.dumps({"inputs": [[0.0], [far]], **more}).encode()
        told = json.loads(answer(body, registry, Settings()))
        assert told["is_anomaly"] == [False, True]
        assert told["score"][1] is None
    watch = registry.find("line").watch
    assert watch is not None
    assert watch.state.rows == 2
    answer(json.dumps({"inputs": [[far]] * 300}).encode(), registry, Settings())
    assert watch.state.alarm


def test_a_monitor_starts_anew_before_it_grows_without_end(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.watch.MOST_ROWS", 100)
    model = load(store / "line")
    watch = Watch("line", model)
    prediction = predict(model, np.random.default_rng(1).uniform(-1, 1, (60, 1)))
    for _ in range(3):
        watch.see(prediction)
    assert watch.state.rows == 60


def test_a_model_whose_reference_overflows_is_watched_too(store: Path) -> None:
    """The score of such a row is no number, as that of a request may be."""
    model = load(store / "line")
    assert model.screen is not None
    scores = model.screen.scores.copy()
    scores[3] = np.nan
    watch = Watch("line", model.with_screen(replace(model.screen, scores=scores)))
    watch.see(predict(model, np.random.default_rng(1).uniform(-1, 1, (60, 1))))
    assert watch.state.rows == 60
