"""The command line: what it prints and writes, and that failures are one line with the right exit code."""

import csv
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from serving import PATIENCE, ROOT
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import mcdrop
from mcdrop.artifact import load, save
from mcdrop.cli import app, predicted
from mcdrop.errors import InputError, MissingExtra
from mcdrop.predict import predict
from mcdrop.wrapping import wrap
from models.networks import digits

SIX = ["mean", "variance", "std", "lower", "upper", "standard_error"]
FLAGS = ["score", "p_value", "is_anomaly"]


def run(*arguments: str | Path, given: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=given)


def written(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("id,x\na,-0.5\nb,0\nc,30\n")
    return path


# -- predict -----------------------------------------------------------------------------------------------------------


def test_predict_writes_the_input_followed_by_what_the_library_gives(store: Path, rows: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    options = ["--passes", "50", "--level", "0.8", "--interval", "quantile", "--seed", "7"]
    result = run("predict", store / "line", rows, "-o", target, *options)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"3 rows written to {target}\n"
    table = written(target)
    assert list(table[0]) == ["id", "x", *SIX, *FLAGS]
    assert [row["id"] for row in table] == ["a", "b", "c"]
    expected = predict(load(store / "line"), [[-0.5], [0], [30]], passes=50, level=0.8, interval="quantile", seed=7)
    for name in [*SIX, "score", "p_value"]:
        assert [float(row[name]) for row in table] == np.ravel(getattr(expected, name)).tolist()
    assert [row["is_anomaly"] for row in table] == ["false", "false", "true"]


def test_without_a_screen_the_flags_are_empty(store: Path, rows: Path, tmp_path: Path) -> None:
    rows.write_text("x\n1\n")
    assert run("predict", store / "line" / "1", rows, "-o", tmp_path / "out.csv").exit_code == 0
    assert [written(tmp_path / "out.csv")[0][name] for name in FLAGS] == ["", "", ""]


def test_classification_gives_a_label_and_one_probability_for_each_class(store: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("1,0,0,0\n0,1,0,0\n")
    assert run("predict", store / "classes", tmp_path / "in.csv", "-o", tmp_path / "out.csv").exit_code == 0
    table = written(tmp_path / "out.csv")
    assert list(table[0])[:7] == ["x_0", "x_1", "x_2", "x_3", "label", "probability_0", "probability_1"]
    assert {"lower_9", "upper_0", "entropy", "mutual_information"} < set(table[0])
    for row in table:
        chances = [float(row[f"probability_{i}"]) for i in range(10)]
        assert sum(chances) == pytest.approx(1)
        assert int(row["label"]) == np.argmax(chances)


def test_standard_input_to_standard_output(store: Path, rows: Path) -> None:
    result = run("predict", store / "line", "-", given=rows.read_text())
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == ",".join(["id", "x", *SIX, *FLAGS])
    assert len(result.stdout.splitlines()) == 4


def test_a_long_table_is_answered_as_its_parts(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.csv").write_text("x\n" + "".join(f"{i / 100}\n" for i in range(200)))
    assert run("predict", store / "line", tmp_path / "in.csv", "-o", tmp_path / "whole.csv").exit_code == 0
    monkeypatch.setattr("mcdrop.table.CELLS_PER_BLOCK", 64)
    assert run("predict", store / "line", tmp_path / "in.csv", "-o", tmp_path / "parts.csv").exit_code == 0
    whole, parts = written(tmp_path / "whole.csv"), written(tmp_path / "parts.csv")
    assert len(whole) == len(parts) == 200
    for name in SIX:
        one, other = ([float(row[name]) for row in table] for table in (whole, parts))
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_a_second_run_over_its_own_output_needs_a_prefix(store: Path, rows: Path, tmp_path: Path) -> None:
    assert run("predict", store / "line", rows, "-o", tmp_path / "one.csv").exit_code == 0
    again = run("predict", store / "line", tmp_path / "one.csv", "-o", tmp_path / "two.csv")
    assert again.exit_code == 1
    assert "already has columns 'mean', 'variance'" in again.stderr
    more = run("predict", store / "line", tmp_path / "one.csv", "-o", tmp_path / "two.csv", "--prefix", "new_")
    assert more.exit_code == 0
    assert written(tmp_path / "two.csv")[0]["new_mean"] == written(tmp_path / "one.csv")[0]["mean"]


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x\n1\nhello\n", "line 3, column 'x' holds 'hello', which is not a number"),
        ("id,x\n1,2\n3\n", "line 3 must have 2 cells, got 1"),
        ("x\nNaN\n", "line 2, column 'x' holds 'NaN', which is not a finite number"),
        ("a,b\n1,2\n", "must have 1 columns, got 2"),
        ("", "is empty"),
        ("x\n", "a header and no rows"),
    ],
)
def test_a_bad_table_is_one_line_and_leaves_nothing(
    store: Path, rows: Path, tmp_path: Path, text: str, said: str
) -> None:
    rows.write_text(text)
    result = run("predict", store / "line", rows, "-o", tmp_path / "out.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [rows]


def test_a_missing_model_or_table_is_one_line(store: Path, rows: Path, tmp_path: Path) -> None:
    for arguments in (
        ("predict", tmp_path / "no", rows),
        ("predict", store / "line", tmp_path / "no.csv"),
        ("predict", store / "line", rows, "-o", tmp_path / "no" / "out.csv"),
        ("inspect", tmp_path / "no"),
        ("serve", tmp_path / "no", "--port", "0"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, arguments
        assert result.stderr.startswith("error: ")
        assert str(tmp_path / "no") in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--level", "95"], "for 95 % give 0.95"),
        (["--level", "1.0"], "level must be a number between 0 and 1, got 1.0"),
        (["--level", "high"], "'--level'"),
        (["--passes", "0"], "passes must be a whole number from 2"),
        (["--passes", "1000000000"], "passes must be a whole number from 2"),
        (["--passes", "1.5"], "'--passes'"),
        (["--seed", "-1"], "seed must be a whole number from 0"),
        (["--interval", "nope"], "unknown interval 'nope'; choose one of: "),
        (["--nope"], "--nope"),
    ],
)
def test_wrong_options_are_wrong_usage(store: Path, rows: Path, options: list[str], said: str) -> None:
    result = run("predict", store / "line", rows, *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


def test_wrong_commands_are_wrong_usage(store: Path, rows: Path) -> None:
    for arguments in ((), ("nope",), ("predict", store / "line"), ("serve", "--port", "70000")):
        assert run(*arguments).exit_code == 2


def test_the_input_is_never_replaced(store: Path, rows: Path, tmp_path: Path) -> None:
    before = rows.read_text()
    (tmp_path / "link.csv").symlink_to(rows)
    for same in (rows, tmp_path / "link.csv", tmp_path / ".." / tmp_path.name / "rows.csv"):
        result = run("predict", store / "line", rows, "-o", same)
        assert result.exit_code == 2
        assert "would replace the input" in result.stderr
    assert rows.read_text() == before


def test_a_model_that_takes_several_inputs_takes_no_table(rows: Path) -> None:
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return nn.functional.dropout(a + b, training=self.training)

    pair = wrap(Pair(), example=(np.ones((2, 1)), np.ones((2, 1))))
    with pytest.raises(InputError, match=r"takes several inputs \(a, b\) and a table gives one"):
        next(predicted(pair, str(rows), {}, "", print))


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_images_are_read_as_flat_columns(rows: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 1))
    model = wrap(net, example=np.zeros((2, 1, 2, 3)))
    rows.write_text("1,2,3,4,5,6\n")
    (table,) = predicted(model, str(rows), {"passes": 10}, "", lambda position: None)
    image = np.arange(1, 7).reshape(1, 1, 2, 3)
    assert table.rows[0][6] == pytest.approx(predict(model, image, passes=10).mean[0, 0])


def test_inspect_prints_the_audit(store: Path) -> None:
    model = load(store / "line")
    text = run("inspect", store / "line")
    assert text.exit_code == 0
    assert text.stdout.startswith("line 2, regression\ninputs: input float32 (-1, 1)\nscreen: variance at")
    took = replace(model.audit, prepare_seconds=None)  # differs from run to run, and is told at the end of a line
    assert all(line in text.stdout for line in str(took).splitlines())
    found = json.loads(run("inspect", store / "line", "--json").stdout)
    assert (found["name"], found["version"], found["task"]) == ("line", "2", "regression")
    assert found["audit"].pop("prepare_seconds") > 0
    assert found["audit"] | {"prepare_seconds": None} == json.loads(json.dumps(took.to_dict()))


def test_version_and_help() -> None:
    assert run("--version").stdout == f"mcdrop {mcdrop.__version__}\n"
    for arguments in (["--help"], ["predict", "-h"], ["serve", "-h"], ["inspect", "-h"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "Usage: " in result.stdout


def test_without_the_service_the_message_has_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "service"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = run("serve")
    assert result.exit_code == 1
    assert result.stderr == f"error: {MissingExtra('fastapi', 'serve')}\n"


def test_settings_that_cannot_be_used_name_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCDROP_MAX_ROWS", "many")
    result = run("serve")
    assert result.exit_code == 1
    assert "MCDROP_MAX_ROWS" in result.stderr


def test_usage_errors_come_without_loading_torch() -> None:
    script = (
        "import sys; from mcdrop.cli import app; app(['predict', 'a', 'b', '--level', '95'], standalone_mode=False)"
    )
    script = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {script}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "False\n"
    assert done.returncode == 1  # standalone_mode=False lets the error out


def test_a_reader_that_leaves_early_gets_no_traceback(store: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x\n" + "0.5\n" * 5000)
    command = f"{sys.executable} -m mcdrop predict {store / 'line'} {tmp_path / 'in.csv'} --passes 2 | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.startswith("x,mean,")
    assert done.stderr == ""


def _left_in(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except BlockingIOError:
        return b""


def test_a_terminal_sees_progress_and_a_file_does_not(store: Path, rows: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "mcdrop",
        "predict",
        str(store / "line"),
        str(rows),
        "-o",
        str(tmp_path / "out.csv"),
    ]
    try:
        environment = {**os.environ, "TERM": "xterm"}
        subprocess.run(command, cwd=ROOT, env=environment, stderr=theirs, check=True, timeout=PATIENCE)
        os.set_blocking(ours, False)
        shown = b"".join(iter(partial(_left_in, ours), b"")).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "loading the model" in shown
    assert "predicting" in shown
    assert "3 rows written" in shown


def test_the_model_gets_its_columns_in_its_own_order(tmp_path: Path) -> None:
    shape = {"hidden_layers": 2, "inputs": 6}
    model = wrap(digits(**shape), example=np.zeros((2, 6)), task="classification")
    save(model, tmp_path / "m" / "1", factory="models.networks:digits", arguments=shape, features=list("abcdef"))
    (tmp_path / "in.csv").write_text("f,e,d,c,b,a\n6,5,4,3,2,1\n")
    assert run("predict", tmp_path / "m", tmp_path / "in.csv", "-o", tmp_path / "out.csv").exit_code == 0
    expected = predict(model, [[1, 2, 3, 4, 5, 6]]).mean[0]
    row = written(tmp_path / "out.csv")[0]
    np.testing.assert_allclose([float(row[f"probability_{i}"]) for i in range(10)], expected, rtol=1e-5)
