"""How much one request may ask for: what is run or held beside its own rows and passes counts too."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcdrop.artifact import load, save
from mcdrop.errors import InputError
from mcdrop.fitting import calibrate
from mcdrop.model import Options
from service.registry import Registry
from service.settings import Settings
from service.work import answer

FACTORY = "models.networks:noisy_line"
SCREEN_ROWS = 40  # of the store's ``line``


def ask(registry: Registry, settings: Settings, **more: Any) -> dict[str, Any]:
    body = {"inputs": [[0.5]] * 10, **more}
    told: dict[str, Any] = json.loads(answer(json.dumps(body).encode(), registry, settings))
    return told


def loaded(store: Path) -> Registry:
    registry = Registry(store, "line")
    registry.load()
    return registry


def test_rows_of_the_screen_that_are_scored_anew_count(store: Path) -> None:
    registry, just = loaded(store), Settings(max_work=(SCREEN_ROWS + 10) * 30)
    for _ in range(2):  # what was scored is held, but under these passes and seeds alone
        assert ask(registry, just, passes=30)["score"] is not None
    assert ask(registry, just, passes=30, seed=1)["score"] is not None
    less = Settings(max_work=(SCREEN_ROWS + 10) * 30 - 1)
    assert ask(registry, less, passes=30)["score"] is not None
    for more in ({"passes": 31}, {"passes": 30, "seed": 2}):
        with pytest.raises(
            InputError, match=f"got 10 times 3[01], and {SCREEN_ROWS} rows of the model's screen, which"
        ):
            ask(registry, less, **more)
    assert ask(registry, less, passes=31, version="1")["score"] is None


def test_a_model_can_always_be_asked_for_its_own_passes(store: Path, tmp_path: Path) -> None:
    """Also where they are not those of its screen, and others were asked for since."""
    model = replace(load(store / "line"), defaults=Options(passes=64))
    save(model, tmp_path / "line" / "1", factory=FACTORY)
    registry, settings = loaded(tmp_path), Settings(max_work=64 * 10)
    for seed in range(20):
        ask(registry, Settings(), passes=2, seed=seed)
    assert ask(registry, settings)["score"] is not None


def test_passes_that_a_calibration_reads_are_kept(store: Path, tmp_path: Path) -> None:
    rows = np.linspace(-1, 1, 60)[:, None]
    for method in ("cqr", "standardised"):
        model = load(store / "line" / "1")
        fitted = calibrate(model, rows, rows, method=method, passes=50)
        save(model, tmp_path / method / "line" / "1", factory=FACTORY, calibration=fitted)
    settings = Settings(max_kept=499)
    few, all_kept = loaded(tmp_path / "standardised"), loaded(tmp_path / "cqr")
    assert ask(few, settings, passes=50, interval="conformal")["interval"] == "conformal"
    assert ask(all_kept, settings, passes=50, interval="normal")["interval"] == "normal"
    with pytest.raises(InputError, match="may be 499 where every pass is kept, got 10 times 50"):
        ask(all_kept, settings, passes=50, interval="conformal")
    assert ask(all_kept, Settings(max_kept=500), passes=50, interval="conformal")["interval"] == "conformal"
