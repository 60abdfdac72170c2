"""Every block of the README runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import running

from models.train import main as train

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SPREADS = re.compile(r"(\w+): (\d+) live draws, std (\S+), by flipping (\S+)")
SHELL = [code for language, code in BLOCKS if language == "sh"]


def test_no_block_is_left_out() -> None:
    assert len(PYTHON) + len(SHELL) == len(BLOCKS)
    assert len(PYTHON) == 5
    assert len(SHELL) == 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reference models where the README expects them."""
    folder = tmp_path_factory.mktemp("readme")
    trained = ROOT / "models" / "store"
    (folder / "models").mkdir()
    if (trained / "noisy-line").is_dir():
        (folder / "models" / "store").symlink_to(trained)
    else:
        train(["--store", str(folder / "models" / "store")])
    return folder


def _run(command: list[str], place: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", PYTHON, ids=["start", "networks", "deployed", "promises", "speed"])
def test_a_python_block_runs(code: str, tmp_path: Path) -> None:
    if "transformers" in code:
        pytest.importorskip("transformers")
    script = tmp_path / "block.py"
    script.write_text(code)
    # a torchvision built for CUDA, which transformers loads, fails beside a torch for the CPU
    shim = "from zoo import torchvision_shim; torchvision_shim.load(); " if "transformers" in code else ""
    printed = _run([sys.executable, "-c", f"{shim}import runpy; runpy.run_path({str(script)!r})"], tmp_path)
    if "calibrate" in code:
        assert "20 of 20 strange" in printed
        assert abs(float(printed.split()[1]) - 0.9) < 0.03  # two standard deviations of 1000 rows
    elif "is_anomaly" in code:
        assert "[False  True]" in printed
    elif "exact_last" in code:
        way, ratio, said = printed.splitlines()
        assert way.startswith("captured ")
        assert float(ratio) > 1
        assert said.startswith("bf16 is off by ")
    elif "export_onnx" in code:
        assert float(printed.split()[2]) <= 1e-5
        assert "'lower'" in printed
    else:
        found = {name: (int(live), float(std), float(flipped)) for name, live, std, flipped in SPREADS.findall(printed)}
        assert found["functional"][0] == found["LSTM"][0] == 1
        assert found["BERT"][0] == 8
        assert all(std > 0 for _, std, _ in found.values())
        assert found["functional"][2] == found["LSTM"][2] == 0


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {line.split()[1] for line in SHELL[0].splitlines()} <= set(targets)


def test_the_curl_block_flags_the_row_that_was_never_seen(place: Path) -> None:
    with running(place / "models" / "store", place / "log.txt") as server:
        printed = _run(["bash", "-c", SHELL[1].replace("http://127.0.0.1:8000", server.url)], place)
    assert '"is_anomaly":[false,true]' in printed.replace(" ", "")


def test_the_command_line_block_writes_intervals(place: Path) -> None:
    _run(["bash", "-ec", SHELL[2].replace("mcdrop ", f"{sys.executable} -m mcdrop ")], place)
    header, *rows = (place / "intervals.csv").read_text().splitlines()
    assert {"x", "mean", "lower", "upper", "is_anomaly"} <= set(header.split(","))
    assert len(rows) == 3
