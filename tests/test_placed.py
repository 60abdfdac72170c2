"""Where a saved network runs: the devices that load, the command line and the service are told, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import on_each_device
from graphs import exported
from torch import Tensor, nn
from typer.testing import CliRunner

import mcdrop
from mcdrop.cli import app
from mcdrop.errors import InputError
from models.networks import digits
from service import Settings, create_app
from service.work import answer

SHAPE = {"hidden_layers": 2, "inputs": 4}
FACTORY: dict[str, Any] = {"factory": "models.networks:digits", "arguments": SHAPE}
X = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
NOT_THERE = f"cuda:{torch.cuda.device_count()}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network in every format."""
    folder = tmp_path_factory.mktemp("placed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mcdrop.wrap(digits(**SHAPE), example=X, task="classification")
    for form, given in (("onnx", {}), ("pt2", {}), ("safetensors", FACTORY)):
        mcdrop.save(model, folder / form / "1", format=form, **given)
    return folder


class Places(nn.Module):
    """Makes a tensor by itself, on the device of its input: a program names that device."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.out = nn.Dropout(0.4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        output: Tensor = self.out(self.drop(x + place))
        return output


@on_each_device
@pytest.mark.parametrize("form", ["pt2", "safetensors"])
def test_answers_do_not_depend_on_where_it_runs(form: str, device: str, models: Path) -> None:
    expected = mcdrop.predict(mcdrop.load(models / form), X)
    for devices in ([device], [device, device]):
        model = mcdrop.load(models / form, devices=devices)
        assert [place.partition(":")[0] for place in model.audit.devices] == devices
        assert f"on {', '.join(model.audit.devices)}" in str(model.audit)
        found = mcdrop.predict(model, X)
        for field in ("mean", "variance", "lower", "mutual_information"):
            np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-4, atol=1e-6)


@on_each_device
def test_a_program_that_makes_tensors_is_moved_whole(device: str, tmp_path: Path) -> None:
    model = mcdrop.wrap(Places().to(device), example=X)
    folder = mcdrop.save(model, tmp_path / "net" / "1", format="pt2")
    expected = mcdrop.predict(model, X).mean
    for devices in ([], [device]):
        found = mcdrop.predict(mcdrop.load(folder, devices=devices), X).mean
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_program_keeps_how_its_passes_were_to_be_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mcdrop.wrap(digits(**SHAPE), example=X, task="classification", precision="bf16")
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format="pt2"))
    assert loaded.audit.precision == "bf16"
    assert loaded.audit.precision_error == pytest.approx(model.audit.precision_error, rel=1e-3)
    np.testing.assert_allclose(mcdrop.predict(loaded, X).mean, mcdrop.predict(model, X).mean, atol=1e-5)


@pytest.mark.parametrize("device", [NOT_THERE, "meta", "nonsense"])
@pytest.mark.parametrize("form", ["pt2", "safetensors"])
def test_a_device_that_cannot_be_used_is_named(form: str, device: str, models: Path) -> None:
    with pytest.raises(InputError, match=rf"device '{device}' cannot be used \(.+\); there is: cpu"):
        mcdrop.load(models / form, devices=[device])
    with pytest.raises(InputError, match=rf"device '{device}' cannot be used"):
        mcdrop.load(models / form, devices=["cpu", device])


def test_a_graph_stays_on_the_cpu(models: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(exported("mlp", training=True))
    for path in (models / "onnx", bare):
        assert mcdrop.load(path, devices="cpu").audit.devices == ("cpu",)
        with pytest.raises(InputError, match="an ONNX graph runs on the CPU, not on cuda"):
            mcdrop.load(path, devices=["cuda"])


def test_the_command_line_is_told_by_device(models: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b,c,d\n" + "\n".join(",".join(map(str, row)) for row in X) + "\n")
    run, where = CliRunner().invoke, ["--device", "cpu", "--device", "cpu"]
    texts = [run(app, ["predict", str(models / "pt2"), str(rows), *more]).stdout for more in ([], where)]
    tables = [np.array([line.split(",")[4:7] for line in text.splitlines()[1:]], float) for text in texts]
    assert tables[0].shape == (9, 3)
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-4, atol=1e-6)
    audit = json.loads(run(app, ["inspect", str(models / "pt2"), "--json", *where]).stdout)["audit"]
    assert audit["devices"] == ["cpu", "cpu"]
    refused = run(app, ["inspect", str(models / "pt2"), "--device", NOT_THERE])
    assert refused.exit_code == 1
    assert f"device '{NOT_THERE}' cannot be used" in refused.stderr


@on_each_device
def test_the_service_runs_networks_where_it_is_told(device: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCDROP_DEVICES", f"{device}, {device}")
    settings = Settings(store=models)
    assert settings.devices == (device, device)
    registry = create_app(settings).state.registry
    registry.load()
    where = {form: registry.find(form).model.audit.devices for form in ("onnx", "pt2", "safetensors")}
    assert where.pop("onnx") == ("cpu",)
    assert {place.partition(":")[0] for places in where.values() for place in places} == {device}
    for form in where:
        asked = json.dumps({"model": form, "inputs": X.tolist()}).encode()
        found, expected = json.loads(answer(asked, registry, settings)), mcdrop.predict(mcdrop.load(models / form), X)
        np.testing.assert_allclose(found["mean"], expected.mean, rtol=1e-4, atol=1e-6)


def test_a_service_without_its_device_does_not_start(models: Path) -> None:
    registry = create_app(Settings(store=models, devices=(NOT_THERE,))).state.registry
    registry.load()
    assert registry.problem.startswith(f"the model in {models / 'pt2' / '1'} cannot be served: device '{NOT_THERE}'")
