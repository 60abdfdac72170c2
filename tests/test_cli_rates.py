"""The commands that calibrate and screen files, CSV and Parquet."""

import csv
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import mcdrop
from mcdrop.cli import app

X = np.random.default_rng(0).uniform(-1, 1, 120).astype(np.float32)
Y = X + 0.3 * np.random.default_rng(1).normal(size=120)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def line(store: Path, tmp_path: Path) -> Path:
    """A copy of the model that names its column and has a screen, for writing to."""
    return Path(shutil.copytree(store / "line" / "2", tmp_path / "store" / "line" / "2"))


def table(path: Path, **columns: np.ndarray) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
        return path
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    return path


def read(path: Path) -> dict[str, list[str]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        found = parquet.read_table(path).to_pydict()
        return {name: [str(value).lower() for value in values] for name, values in found.items()}
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_calibrate_keeps_what_the_library_fits(line: Path, tmp_path: Path, suffix: str) -> None:
    held = table(tmp_path / f"held.{suffix}", id=np.arange(120), x=X, y=Y)
    result = run("calibrate", line, held, "--target", "y", "--passes", "60")
    assert result.exit_code == 0, result.stderr
    assert "standardised calibration of 120 rows kept" in result.stdout
    assert result.stdout.endswith("it holds for passes=60 seed=0; ask with --interval conformal\n")
    model = mcdrop.load(line)
    expected = mcdrop.calibrate(model, X[:, None], Y, passes=60)
    assert model.calibration is not None
    assert model.calibration.to_dict() == expected.to_dict()
    found = mcdrop.predict(model, X[:, None], passes=60, interval="conformal")
    assert ((found.lower[:, 0] <= Y) & (found.upper[:, 0] >= Y)).mean() > 0.9


def test_calibrate_says_what_is_wrong_in_one_line(line: Path, tmp_path: Path) -> None:
    held = table(tmp_path / "held.csv", x=X, y=Y)
    result = run("calibrate", line, held, "--target", "z")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {held} has no column 'z'; its columns are x, y\n"
    assert run("calibrate", line, held).exit_code == 2
    assert "unknown calibration method" in run("calibrate", line, held, "--target", "y", "--method", "nope").stderr
    assert mcdrop.load(line).calibration is None


def test_columns_of_a_model_without_names_are_those_that_are_no_targets(store: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(store / "line" / "1", tmp_path / "plain" / "1"))
    held = table(tmp_path / "held.csv", y=Y, anything=X)
    assert run("calibrate", plain, held, "--target", "y").exit_code == 0
    assert mcdrop.load(plain).calibration is not None


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_calibrate_refuses_columns_and_targets_that_do_not_fit(store: Path, tmp_path: Path, suffix: str) -> None:
    """The classifier reads four columns and names none."""
    model, y = Path(shutil.copytree(store / "classes" / "1", tmp_path / "m" / "1")), np.zeros(120)
    few = table(tmp_path / f"few.{suffix}", a=X, y=y)
    result = run("calibrate", model, few, "--target", "y")
    assert (result.exit_code, result.stderr) == (
        1, f"error: {few} must have 4 columns that the model reads, got 1\n",
    )  # fmt: skip
    result = run("calibrate", model, few, "--target", "y", "--target", "a")
    assert result.exit_code == 2
    assert "a classifier has one column of labels" in result.stderr
    bare = table(tmp_path / f"bare.{suffix}", y=y)
    assert "has no columns beside y" in run("calibrate", store / "line" / "1", bare, "--target", "y").stderr
    assert mcdrop.load(model).calibration is None


def test_a_column_is_one_target(line: Path, tmp_path: Path) -> None:
    held = table(tmp_path / "held.csv", x=X, y=Y)
    result = run("calibrate", line, held, "--target", "y", "--target", "y")
    assert result.exit_code == 2
    assert "'y' is given twice" in result.stderr
    assert mcdrop.load(line).calibration is None


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_network_may_predict_its_own_inputs(line: Path, tmp_path: Path, suffix: str) -> None:
    held = table(tmp_path / f"held.{suffix}", y=Y, x=X)
    result = run("calibrate", line, held, "--target", "x", "--passes", "20")
    assert result.exit_code == 0, result.stderr
    model = mcdrop.load(line)
    assert model.calibration is not None
    assert model.calibration.to_dict() == mcdrop.calibrate(model, X[:, None], X.astype(np.float64), passes=20).to_dict()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_target_is_never_read_as_the_input_by_its_place(line: Path, tmp_path: Path, suffix: str) -> None:
    held = table(tmp_path / f"held.{suffix}", y=Y)
    result = run("calibrate", line, held, "--target", "y")
    assert (result.exit_code, result.stderr) == (1, f"error: {held} lacks the column 'x'; the model takes 'x'\n")
    spelt = table(tmp_path / f"spelt.{suffix}", X=X, y=Y)
    assert "has a column 'X', but the model takes 'x'" in run("calibrate", line, spelt, "--target", "y").stderr
    assert mcdrop.load(line).calibration is None


def test_calibrate_keeps_it_where_a_link_and_a_dot_lead(
    line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, link = table(tmp_path / "held.csv", x=X, y=Y), tmp_path / "store" / "line" / "newest"
    link.symlink_to(line)
    assert run("calibrate", link, held, "--target", "y", "--seed", "1").exit_code == 0
    assert link.is_symlink()
    monkeypatch.chdir(line)
    result = run("calibrate", ".", held, "--target", "y", "--seed", "2")
    assert result.exit_code == 0, result.stderr
    found = mcdrop.load(line).calibration
    assert found is not None
    assert found.plan.seed == 2


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_is_read_twice_is_no_pipe(tmp_path: Path, suffix: str) -> None:
    """Nobody writes into it, so opening it would wait for ever; there is no model to load either."""
    pipe, model = tmp_path / f"rows.{suffix}", tmp_path / "no model"
    os.mkfifo(pipe)
    for source in (pipe, "-"):
        for command in (("calibrate", model, source, "--target", "y"), ("screen", model, source, "-o", tmp_path / "o")):
            result = run(*command)
            assert result.exit_code == 1
            assert result.stderr == f"error: {source} is no file, and it is read twice; save the rows to a file first\n"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_screen_writes_what_the_library_finds(line: Path, tmp_path: Path, suffix: str) -> None:
    rows = np.concatenate([X, np.full(20, 50, np.float32)])
    source = table(tmp_path / f"rows.{suffix}", id=np.arange(140), x=rows)
    target = tmp_path / f"flagged.{suffix}"
    result = run("screen", line, source, "-o", target, "--fdr", "0.2")
    assert result.exit_code == 0, result.stderr
    found = mcdrop.screen(mcdrop.load(line), rows[:, None], fdr=0.2)
    assert result.stderr.strip() == str(found)
    written = read(target)
    assert list(written) == ["id", "x", "score", "p_value", "is_anomaly"]
    np.testing.assert_allclose(np.array(written["score"], float), found.score)
    assert [flag == "true" for flag in written["is_anomaly"]] == found.is_anomaly.tolist()


def test_screen_may_fit_on_a_file_of_inliers(store: Path, tmp_path: Path) -> None:
    inliers, rows = table(tmp_path / "in.csv", x=X), table(tmp_path / "rows.csv", x=X + 40)
    options: list[str | Path] = ["--reference", inliers, "--score", "feature_distance", "--fpr", "0.05"]
    options += ["--prefix", "mc_"]
    result = run("screen", store / "line" / "1", rows, "-o", tmp_path / "out.csv", *options)
    assert result.exit_code == 0, result.stderr
    assert "mc_is_anomaly" in read(tmp_path / "out.csv")


def test_references_for_a_false_discovery_rate_need_only_resolve_that(store: Path, tmp_path: Path) -> None:
    """At 0.1 nine rows do, 1 / (9 + 1); at eight the smallest p-value is above."""
    rows, target = table(tmp_path / "rows.csv", x=np.array([0.5, 90])), tmp_path / "out.csv"
    for count, code in ((9, 0), (8, 1)):
        inliers = table(tmp_path / "in.csv", x=X[:count])
        result = run("screen", store / "line" / "1", rows, "-o", target, "--reference", inliers, "--fdr", "0.1")
        assert result.exit_code == code, result.stderr
    assert "fdr 0.1 is below the smallest p-value that 8 reference rows can give" in result.stderr


def test_screen_refuses_an_output_before_it_does_any_work(tmp_path: Path) -> None:
    """There is no model to load, and the output is what is complained about."""
    rows, model = table(tmp_path / "rows.csv", x=X, score=X), tmp_path / "no model"
    for target, options, said in (
        ("out.parquet", (), "must have the format of"),
        ("out.csv", (), "already has a column 'score'"),
        ("nowhere/out.csv", ("--prefix", "my_"), "nowhere/out.csv: No such file or directory"),
        ("out.csv", ("--prefix", "my_"), "no model"),
    ):
        result = run("screen", model, rows, "-o", tmp_path / target, *options)
        assert result.exit_code == 1
        assert said in result.stderr


def test_screen_refuses_rows_that_change_while_it_works(store: Path, tmp_path: Path) -> None:
    """The reference is a pipe: when it is opened, the screen has begun, and the rows are written again."""
    rows, reference = table(tmp_path / "rows.csv", x=X), tmp_path / "reference.csv"
    os.mkfifo(reference)

    def change() -> None:
        with reference.open("w") as stream:
            table(rows, x=X[::-1])
            stream.write("x\n" + "\n".join(map(str, X)))

    writer = threading.Thread(target=change)
    writer.start()
    target = tmp_path / "out.csv"
    result = run("screen", store / "line" / "1", rows, "-o", target, "--reference", reference, "--fpr", "0.05")
    writer.join()
    assert (result.exit_code, target.exists()) == (1, False)
    assert result.stderr == f"error: {rows} has changed while it was read; try again when nothing writes to it\n"


def test_a_model_without_a_screen_is_told_of_the_option_that_gives_one(store: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x\nnot a number, and not read\n")
    result = run("screen", store / "line" / "1", tmp_path / "rows.csv", "-o", tmp_path / "out.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: the model has no screen of its own; give rows without anomalies as --reference FILE\n"
    )


def test_screen_refuses_what_cannot_be_right(line: Path, tmp_path: Path) -> None:
    rows, target = table(tmp_path / "rows.csv", x=X), tmp_path / "out.csv"
    assert run("screen", line, rows, "-o", target, "--fdr", "0.1", "--fpr", "0.1").exit_code == 2
    assert run("screen", line, rows, "-o", rows).exit_code == 2
    assert "must have the format of" in run("screen", line, rows, "-o", tmp_path / "out.parquet").stderr
    taken = table(tmp_path / "taken.csv", x=X, score=X)
    assert "already has a column 'score'" in run("screen", line, taken, "-o", target).stderr
    assert "fdr 0.001 is below" in run("screen", line, rows, "-o", target, "--fdr", "0.001").stderr
    assert not target.exists()


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("screen", ["--fdr", "2"], "fdr must be a number between 0 and 1, got 2.0"),
        ("screen", ["--fpr", "0"], "fpr must be a number between 0 and 1, got 0.0"),
        ("screen", ["--fpr", "nan"], "fpr must be a number between 0 and 1, got nan"),
        ("screen", ["--score", "nope"], "unknown score 'nope'; choose one of: "),
        ("screen", ["--score", "variance"], "it is used with --reference"),
        ("calibrate", ["--target", "y", "--method", "nope"], "unknown calibration method 'nope'; choose one of: "),
    ],
)
def test_wrong_options_are_wrong_usage(tmp_path: Path, command: str, options: list[str], said: str) -> None:
    """There is neither a model nor a table, and the option is what is complained about."""
    output: list[str | Path] = ["-o", tmp_path / "out.csv"] if command == "screen" else []
    result = run(command, tmp_path / "no", tmp_path / "no.csv", *output, *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_parquet_is_read_as_strictly_as_csv(line: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    target = tmp_path / "out.parquet"
    text = table(tmp_path / "text.parquet", x=np.array(["a", "b"]))
    assert "column 'x' holds string, not numbers" in run("screen", line, text, "-o", target).stderr
    hole = table(tmp_path / "hole.parquet", x=np.array([1.0, np.nan]))
    assert "row 1, column 'x' is empty or not a finite number" in run("screen", line, hole, "-o", target).stderr
    other = table(tmp_path / "other.parquet", z=X)
    assert "lacks the column 'x'" in run("screen", line, other, "-o", target).stderr
    (tmp_path / "no.parquet").write_text("no")
    assert "as Parquet" in run("screen", line, tmp_path / "no.parquet", "-o", target).stderr
