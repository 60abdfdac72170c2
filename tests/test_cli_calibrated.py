"""What the commands say of a model that keeps a calibration."""

import csv
import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import mcdrop
from mcdrop.cli import app


def run(*arguments: str | Path, given: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier with the calibration of sixty rows, for 20 passes."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    model = mcdrop.wrap(net, example=x[:4], task="classification", tuning={})
    fitted = mcdrop.calibrate(model, x, (x[:, 0] > 0).astype(int), passes=20)
    return mcdrop.save(model, tmp_path / "net" / "1", calibration=fitted, features=["a", "b"])


def test_the_table_has_the_sets_and_chances_that_the_library_gives(folder: Path) -> None:
    rows = [[0.5, 1], [-2, 0.25]]
    expected = mcdrop.predict(mcdrop.load(folder), rows, passes=20, level=0.5)
    assert expected.prediction_set is not None
    assert expected.probabilities is not None
    text = "a,b\n" + "".join(f"{a},{b}\n" for a, b in rows)
    written = run("predict", folder, "-", "--passes", "20", "--level", "0.5", given=text).stdout
    table = list(csv.DictReader(written.splitlines()))
    sets = [[row[f"in_set_{i}"] == "true" for i in range(3)] for row in table]
    chances = [[float(row[f"calibrated_{i}"]) for i in range(3)] for row in table]
    assert sets == expected.prediction_set.tolist()
    np.testing.assert_allclose(chances, expected.probabilities, rtol=1e-6)
    assert "in_set_0" not in run("predict", folder, "-", "--passes", "30", given=text).stdout  # it holds for 20


def test_a_calibration_that_does_not_hold_for_the_options_is_named_and_seen_in_the_table(tmp_path: Path) -> None:
    """The variance is the passes' alone there, and with the noise of the calibration where it holds."""
    x = np.random.default_rng(0).normal(size=(40, 1)).astype(np.float32)
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    model = mcdrop.wrap(net, example=x[:4], tuning={})
    fitted = mcdrop.calibrate(model, x, 2 * x, passes=20, seed=3)
    plain = mcdrop.save(model, tmp_path / "plain" / "1", features=["a"])
    kept = mcdrop.save(model, tmp_path / "kept" / "1", calibration=fitted, features=["a"])

    def asked(folder: Path, *options: str) -> tuple[list[dict[str, str]], str]:
        done = run("predict", folder, "-", "--passes", "20", *options, given="a\n0.5\n-1\n")
        return list(csv.DictReader(done.stdout.splitlines())), done.stderr

    (without, _), (holds, quiet), (left_out, said) = asked(plain), asked(kept, "--seed", "3"), asked(kept)
    assert "note" not in quiet
    assert said.count("note: the model's calibration was fitted with passes=20 seed=3 sampler=balanced and") == 1
    for row in holds:
        passes = float(row["variance"]) - float(row["aleatoric"])
        assert passes == pytest.approx(_spread(model, row["a"]), rel=1e-5)
    assert [row["aleatoric"] for row in left_out] == ["", ""]
    assert {row["interval_kind"] for row in (*holds, *left_out)} == {"credible"}
    assert [{name: row[name] for name in without[0]} for row in left_out] == without
    conformal, _ = asked(kept, "--seed", "3", "--interval", "conformal")
    assert {row["interval_kind"] for row in conformal} == {"prediction"}


def _spread(model: mcdrop.Model, cell: str) -> float:
    return float(mcdrop.predict(model, [[float(cell)]], passes=20, seed=3).epistemic[0, 0])


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    (tmp_path / "held.csv").write_text("a,b\n1,2\n")  # without the target, which is seen when it is read
    done = run("calibrate", folder, tmp_path / "held.csv", "--target", "y")
    assert (done.exit_code, done.stderr) == (1, f"error: cannot write {folder}: Read-only file system\n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_export_says_that_it_leaves_the_calibration_out(folder: Path, tmp_path: Path) -> None:
    said = run("export", folder, tmp_path / "out.pt2", "--passes", "4")
    assert said.exit_code == 0, said.stderr
    assert "note: the model's calibration is not in it" in said.stderr
