"""What the commands have in common: what they may not replace, what they tell, and how they end when told to."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from serving import PATIENCE, ROOT
from torch import nn
from typer.testing import CliRunner, Result

from mcdrop.artifact import save
from mcdrop.cli import app
from mcdrop.console import terminable
from mcdrop.wrapping import wrap


def run(*arguments: str | Path, given: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=given)


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "model.onnx", "rows.csv", "-o", "model.onnx"),
        ("screen", "model", "rows.csv", "-o", "inliers.csv", "--reference", "inliers.csv"),
        ("screen", "model.onnx", "rows.csv", "-o", "model.onnx"),
        ("export", "model.onnx", "model.onnx"),
        ("export", "model.onnx", "link.onnx"),
        ("convert", "weights.pth", "weights.pth"),
    ],
    ids=" ".join,
)
def test_no_input_is_ever_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    files = [Path(name) for name in ("model.onnx", "rows.csv", "inliers.csv", "weights.pth")]
    for path in files:
        path.write_text(f"x\n1\n{path}")
    Path("link.onnx").symlink_to("model.onnx")
    result = run(*command)
    assert result.exit_code == 2
    assert "the output would replace the input; choose another file" in result.stderr
    assert [path.read_text() for path in files] == [f"x\n1\n{path}" for path in files]


@pytest.mark.parametrize(
    ("command", "written"),
    [
        (("predict", "model", "rows.csv", "-o", "out.parquet"), ".csv, .txt"),
        (("predict", "model", "rows.csv", "-o", "out.XLSX"), ".csv, .txt"),
        (("screen", "model", "rows.csv", "-o", "out.json"), ".csv, .txt, .parquet, .pq"),
        (("export", "model", "out.txt"), ".onnx, .pt2"),
        (("convert", "weights.pth", "out.pth"), ".safetensors"),
    ],
)
def test_a_file_of_another_format_is_not_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*command)
    assert result.exit_code == 2
    assert f"this command does not write .{command[-1][4:].lower()}; choose one of: {written}" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("export", "model", "-"), ("convert", "weights.pth", "-")], ids=" ".join)
def test_a_network_is_not_written_to_standard_output_nor_to_a_file_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*command)
    assert result.exit_code == 2
    assert "standard output takes no network; give a file with the suffix ." in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_suffix_of_no_format_is_fine(store: Path, tmp_path: Path) -> None:
    for name in ("out", "out.2024", "out.txt", "out.CSV"):
        assert run("predict", store / "line", "-", "-o", tmp_path / name, given="x\n1\n").exit_code == 0
        assert (tmp_path / name).read_text().startswith("x,mean,")


def test_nothing_is_put_into_a_model_folder(store: Path, tmp_path: Path) -> None:
    """A file more in it, and the model would be refused."""
    model = Path(shutil.copytree(store / "line" / "2", tmp_path / "2"))
    result = run("predict", model, "-", "-o", model / "out.csv", given="x\n1\n")
    assert result.exit_code == 2
    assert "is a model folder, which holds the model alone" in result.stderr
    assert run("predict", model, "-", given="x\n1\n").exit_code == 0


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """There is no model and there are no weights, and the output is what is complained about."""
    for command in (
        ("export", tmp_path / "model", tmp_path / "no" / "out.onnx"),
        ("convert", tmp_path / "weights.pth", tmp_path / "no" / "out.safetensors"),
    ):
        result = run(*command)
        assert result.exit_code == 1
        assert result.stderr == f"error: cannot write {command[-1]}: No such file or directory\n"


def test_rows_without_a_header_are_noted_once(store: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("0\n0.5\n")
    line = f"note: the first line of {rows} holds numbers, so it is read as a row, not as the names of columns\n"
    for command in ("predict", "screen"):
        result = run(command, store / "line", rows, "-o", tmp_path / "out.csv")
        assert result.exit_code == 0
        assert result.stderr.count(line) == 1
    rows.write_text("x\n0.5\n")
    assert "note:" not in run("predict", store / "line", rows).stderr


def test_outputs_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    """Three times 2e38 is more than a float32 holds."""
    inner, outer = nn.Linear(1, 3), nn.Linear(3, 1)
    for layer in (inner, outer):
        nn.init.ones_(layer.weight)
    model, reference = tmp_path / "model", np.linspace(-1, 1, 40)[:, None]
    save(wrap(nn.Sequential(nn.Dropout(0.1), inner, outer), example=reference), model / "1", features=["x"])
    rows, inliers = tmp_path / "rows.csv", tmp_path / "inliers.csv"
    rows.write_text("x\n0.5\n3e38\n2e38\n-0.5\n")
    inliers.write_text("x\n" + "\n".join(map(str, reference[:, 0])))
    assert "note: 2 of 4 rows have outputs that are not finite numbers\n" in run("predict", model, rows).stderr
    screened = run("screen", model, rows, "-o", tmp_path / "out.csv", "--reference", inliers, "--fpr", "0.1")
    assert "note: 2 of 4 rows have scores that are not finite numbers\n" in screened.stderr
    rows.write_text("x\n0.5\n")
    assert "note:" not in run("predict", model, rows).stderr


def test_a_run_that_is_terminated_leaves_no_file(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mcdrop", "predict", str(store / "line"), "-", "-o", str(tmp_path / "out.csv")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    late = time.monotonic() + PATIENCE
    while not list(tmp_path.iterdir()):  # it waits for rows then, its output begun
        assert process.poll() is None
        assert time.monotonic() < late
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (128 + signal.SIGTERM, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_where_nobody_else_takes_it(number: signal.Signals) -> None:
    """A terminal that is closed sends SIGHUP; after ``nohup`` a command goes on all the same."""

    def work() -> None:
        with terminable():
            assert signal.getsignal(number) is not signal.SIG_DFL  # or it would end the tests
            signal.raise_signal(number)

    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as caught:
            work()
        assert caught.value.code == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with terminable():
            signal.raise_signal(number)
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_terminal_that_is_closed_meanwhile_ends_nothing(tmp_path: Path) -> None:
    save(wrap(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)), example=np.zeros((2, 4))), tmp_path / "m")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mcdrop", "inspect", str(tmp_path / "m")]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True) as done:
        os.close(theirs)
        os.close(ours)
        text, _ = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0
    assert "live" in text
