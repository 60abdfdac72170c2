"""What the commands say of a bare ONNX file."""

from pathlib import Path

import pytest
from graphs import by_hand, number
from onnx import helper
from typer.testing import CliRunner

from mcdrop.cli import app


def test_inspect_says_no_version_of_a_file_that_has_none(tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    path.write_bytes(by_hand([helper.make_node("Dropout", ["x", "p"], ["y"])], initial=(number("p", 0.25),)))
    said = CliRunner().invoke(app, ["inspect", str(path)]).stdout
    assert said.startswith("one, regression\ninputs: x float32 (-1, 6)\n")


@pytest.mark.parametrize("command", ["inspect", "predict", "screen", "export"])
def test_commands_that_take_an_onnx_file_say_so(command: str) -> None:
    assert "an ONNX file" in " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())
