"""The drift alarm of a served model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mcdrop.artifact import load
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
    assert model.screen is not None
    watch = Watch("line", model.screen)
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
    watch = Watch("line", replace(model.screen, scores=scores))
    watch.see(predict(model, np.random.default_rng(1).uniform(-1, 1, (60, 1))))
    assert watch.state.rows == 60
