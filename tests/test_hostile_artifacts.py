"""Files made to run code, to lead elsewhere or to break a parser: each ends in one clear sentence and nothing else.

The files are loaded by another process, in an empty folder; code in one would leave a marker file there.
"""

import functools
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from graphs import built, exported
from onnx import TensorProto, external_data_helper

import mcdrop
from mcdrop.quiet import quiet
from mcdrop.store import sha256

ROOT = Path(__file__).parents[1]

_CHILD = """
import json
import sys
import numpy as np
import mcdrop
for line in sys.stdin:
    path, given = json.loads(line)
    try:
        model = mcdrop.load(path, **given)
        print("loaded", mcdrop.predict(model, np.ones((2, 8), np.float32), passes=4).variance.shape)
    except mcdrop.errors.MCDropError as error:
        print(type(error).__name__, error)
    print(flush=True)
"""


class _Evil:
    """Pickled, it is an order to write the marker."""

    def __reduce__(self) -> Any:
        return eval, ("open('marker', 'w').close()",)


class _Child:
    """A process that loads one file after the other in an empty folder, and starts anew where one brought it down."""

    def __init__(self, folder: Path) -> None:
        self._work, self._said = folder / "empty", folder / "stderr.txt"
        self._work.mkdir()
        self._process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        with self._said.open("a") as stderr:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _CHILD], cwd=self._work, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip

    def load(self, path: Path, **given: Any) -> str:
        """Gives the one line that it says of a file; that may take a minute and must leave no marker."""
        if self._process.poll() is not None:
            self._process = self._started()
        os.truncate(self._said, 0)
        late = threading.Timer(90, self._process.kill)
        late.start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(path), given]), file=self._process.stdin, flush=True)
        lines = [*itertools.takewhile(str.strip, self._process.stdout)]
        late.cancel()
        stderr = self._said.read_text()
        if not lines:
            self.end()
        assert not list(self._work.iterdir()), "code of the file ran"
        assert "Traceback" not in stderr
        assert len(lines) == 1, stderr[-2000:]
        return lines[0]

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Child]:
    """One for all files: whoever loads one that is refused goes on to the next, as a service does."""
    made = _Child(tmp_path_factory.mktemp("child"))
    yield made
    made.end()


# -- .pt2 --------------------------------------------------------------------------------------------------------------


@functools.cache
def _program() -> bytes:
    module, x = built("mlp")
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)), buffer)
    return buffer.getvalue()


def _rewritten(change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The program with some members changed; names are those inside its folder."""
    with zipfile.ZipFile(io.BytesIO(_program())) as archive:
        root = archive.namelist()[0].partition("/")[0]
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{root}/{name}", content)
    return out.getvalue()


def _evil_samples(members: dict[str, bytes]) -> None:
    members["data/sample_inputs/model.pt"] = _torch_saved(_Evil())


def _torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _pickled_weight(members: dict[str, bytes]) -> None:
    name = "data/weights/model_weights_config.json"
    config = json.loads(members[name])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    members[f"data/weights/{first['path_name']}"] = _torch_saved(_Evil())
    members[name] = json.dumps(config).encode()


def _model(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def changed(members: dict[str, bytes]) -> None:
        model = json.loads(members["models/model.json"])
        change(model)
        members["models/model.json"] = json.dumps(model).encode()

    return changed


def _expression(model: Any) -> None:
    evil = "__import__('builtins').open('marker', 'w').close()"
    sizes = model["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"]
    next(size for size in sizes if "as_expr" in size)["as_expr"]["expr_str"] = evil


def _guard(model: Any) -> None:
    model["guards_code"] = ["open('marker', 'w').close() is None"]


def _operator(model: Any) -> None:
    model["graph_module"]["graph"]["nodes"][0]["target"] = "os.system"


def _container(model: Any) -> None:
    signature = model["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("builtins.tuple", "collections.defaultdict", 1)


def _library(members: dict[str, bytes]) -> None:
    members["data/aotinductor/model/evil.so"] = b"\x7fELF"


def _emptied(members: dict[str, bytes]) -> None:
    members["data/weights/weight_0"] = b""


def _arguments(model: Any) -> None:
    model["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = "x"


def _rate(model: Any) -> None:
    nodes = model["graph_module"]["graph"]["nodes"]
    rate = next(node for node in nodes if "dropout" in node["target"])["inputs"][1]["arg"]
    rate["as_float"] = 1e308


def _outside(members: dict[str, bytes]) -> None:
    members["../../marker"] = b""


def _flipped(data: bytes, at: float) -> bytes:
    place = int(len(data) * at)
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def _bomb() -> bytes:
    return _rewritten(lambda members: members.update({"data/weights/weight_0": bytes(2**26)}), zipfile.ZIP_DEFLATED)


PROGRAMS: dict[str, tuple[Callable[[], bytes], str]] = {
    "sample inputs that are a pickle are not read": (lambda: _rewritten(_evil_samples), r"^loaded \(2, 3\)"),
    "guards are not read": (lambda: _rewritten(_model(_guard)), r"^loaded \(2, 3\)"),
    "a pickled weight": (lambda: _rewritten(_pickled_weight), "as a pickle, which can run code"),
    "an expression": (lambda: _rewritten(_model(_expression)), "more than arithmetic on sizes"),
    "an operator of another library": (lambda: _rewritten(_model(_operator)), "'os.system'; only torch's own"),
    "a container that imports": (lambda: _rewritten(_model(_container)), "only tuples, lists and dicts"),
    "a shared library": (lambda: _rewritten(_library), "plain program has no need of"),
    "a member outside of the folder": (lambda: _rewritten(_outside), "plain program has no need of"),
    "a zip bomb": (_bomb, "is compressed"),
    "nothing but a zip's head": (lambda: b"PK\x03\x04" + bytes(100), "damaged archive"),
    "cut off": (lambda: _program()[: len(_program()) // 2], "damaged archive"),
    "cut off at its end": (lambda: _program()[:-200], "is cut off"),
    "a weight without numbers": (lambda: _rewritten(_emptied), "has no numbers for"),
    "a rate that is none": (lambda: _rewritten(_model(_rate)), "ArtifactError.*between 0 and 1"),
    "names of arguments that are no list": (lambda: _rewritten(_model(_arguments)), "not a sound .pt2"),
    "brackets without end": (
        lambda: _rewritten(lambda members: members.update({"models/model.json": b"[" * 10**6})),
        "not a sound .pt2",
    ),
    "a bit of a weight flipped": (lambda: _flipped(_program(), 0.02), "^(ArtifactError|loaded)"),
    "a bit of the description flipped": (lambda: _flipped(_program(), 0.5), "^(ArtifactError|loaded)"),
    "a bit of the directory flipped": (lambda: _flipped(_program(), 0.97), "^(ArtifactError|loaded)"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_hostile_programs(case: str, tmp_path: Path, child: _Child) -> None:
    make, said = PROGRAMS[case]
    path = tmp_path / "net.pt2"
    path.write_bytes(make())
    assert re.search(said, child.load(path, example=[[1.0] * 8] * 4))


def test_torch_alone_runs_the_code_of_such_files(tmp_path: Path) -> None:
    """What the preflight is for."""
    folders = [tmp_path / str(index) for index in range(3)]
    for folder, change in zip(folders, (_evil_samples, _pickled_weight, _model(_expression)), strict=True):
        folder.mkdir()
        (folder / "net.pt2").write_bytes(_rewritten(change))
    script = (
        "import contextlib, os, sys, torch\n"
        "for folder in sys.argv[1:]:\n"
        "    os.chdir(folder)\n"
        "    with contextlib.suppress(Exception):\n"
        "        torch.export.load('net.pt2').module()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, folders)]
    subprocess.run(command, capture_output=True, check=False)
    assert all((folder / "marker").exists() for folder in folders)


# -- pickles and their relatives ---------------------------------------------------------------------------------------


def _archive(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, pickle.dumps(_Evil()))
    return out.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "net.pth": (lambda: _torch_saved(_Evil()), "is a pickle.*mcdrop convert"),
    "net.pkl": (lambda: pickle.dumps(_Evil()), "is a pickle.*mcdrop convert"),
    "script.pt": (
        lambda: _archive("net/code/net.py", "net/constants.pkl", "net/data.pkl"),
        "is TorchScript.*mcdrop.save",
    ),
    "net.mar": (lambda: _archive("MAR-INF/MANIFEST.json", "handler.py"), "TorchServe archive.*mcdrop convert"),
    "net.safetensors": (lambda: (9).to_bytes(8, "little") + b'{"a": {}}', "weights alone"),
    "empty.onnx": (lambda: b"", "not a sound ONNX model"),
    "text.onnx": (lambda: b"import os; os.system('touch marker')", "not an ONNX model"),
    "cut.onnx": (lambda: exported("mlp")[:-700], "not a(n| sound) ONNX model"),
    "flipped.onnx": (lambda: _flipped(exported("mlp"), 0.001), "ArtifactError|ModelRefused|InputError|loaded"),
    "middle.onnx": (lambda: _flipped(exported("mlp"), 0.93), "ArtifactError|ModelRefused|InputError|loaded"),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files(name: str, tmp_path: Path, child: _Child) -> None:
    make, said = FILES[name]
    (tmp_path / name).write_bytes(make())
    found = child.load(tmp_path / name)
    assert re.search(said, found)
    assert name in found or not found.startswith("ArtifactError")  # which one, of many


def test_pickles_are_converted_without_running_them(tmp_path: Path) -> None:
    from mcdrop.convert import convert

    for name, value in (("evil.pth", _Evil()), ("net.pth", built("mlp")[0])):
        (tmp_path / name).write_bytes(_torch_saved(value))
        with pytest.raises(mcdrop.errors.ArtifactError, match="would import"):
            convert(tmp_path / name, tmp_path / "out.safetensors")
    assert not Path("marker").exists()
    (tmp_path / "good.pth").write_bytes(_torch_saved({"state_dict": built("mlp")[0].state_dict()}))
    assert convert(tmp_path / "good.pth", tmp_path / "out.safetensors") == len(built("mlp")[0].state_dict())


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "linked.bin", "hard.bin", "plain.bin"])
def test_tensors_in_other_files_are_not_read(location: str, tmp_path: Path, child: _Child) -> None:
    (tmp_path / "outside.bin").write_bytes(bytes(4096))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "plain.bin").write_bytes(bytes(4096))
    (folder / "linked.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "hard.bin").hardlink_to(tmp_path / "outside.bin")
    model = onnx.ModelProto.FromString(exported("mlp"))
    tensor = model.graph.initializer[0]
    external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    assert "keeps tensors in other files" in child.load(folder / "net.onnx")


def test_links_and_pipes_are_not_followed(tmp_path: Path, child: _Child) -> None:
    real = tmp_path / "real.onnx"
    real.write_bytes(exported("mlp"))
    (tmp_path / "link.onnx").symlink_to(real)
    assert "must be a plain file that can be read: it is a link; give the file" in child.load(tmp_path / "link.onnx")
    (tmp_path / "hard.onnx").hardlink_to(real)
    assert "plain file" in child.load(tmp_path / "hard.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "ModelNotFound" in child.load(tmp_path / "pipe.onnx")


def test_pins(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(exported("mlp"))
    assert mcdrop.load(path, sha256=sha256(path)).name == "net"
    with pytest.raises(mcdrop.errors.ArtifactError, match="its sha256 is"):
        mcdrop.load(path, sha256="0" * 64)
    folder = mcdrop.save(mcdrop.load(path), tmp_path / "net" / "1")
    assert mcdrop.load(folder, sha256=sha256(folder / "model.toml")).name == "net"
    with pytest.raises(mcdrop.errors.ArtifactError, match="sha256 differs"):
        mcdrop.load(folder, sha256="0" * 64)
    (folder / "model.onnx").write_bytes(_flipped(exported("mlp"), 0.5))
    with pytest.raises(mcdrop.errors.ArtifactError, match="sha256 differs"):
        mcdrop.load(folder)


def test_a_manifest_names_no_code_and_no_other_place(tmp_path: Path, child: _Child) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(exported("mlp"))
    folder = mcdrop.save(mcdrop.load(path), tmp_path / "net" / "1")
    manifest = (folder / "model.toml").read_text()
    changes = {
        "'os:system'": manifest.replace('format = "onnx"', 'format = "safetensors"\nfactory = "os:system"'),
        "unknown format": manifest.replace('format = "onnx"', 'format = "../../net"'),
    }
    for said, text in changes.items():
        (folder / "model.toml").write_text(text)
        assert said in child.load(folder)
