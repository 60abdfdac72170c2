"""What is nearly what a function takes, such as the class of a network or a plan for options: named in one sentence."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import net
from torch import nn

import mcdrop
from mcdrop.calibration import Calibration
from mcdrop.errors import ArtifactError, InputError
from mcdrop.masks import Site, sample_masks
from mcdrop.store import list_models
from mcdrop.wrapping import devices_of

X = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
OPTIONS, PLAN = mcdrop.Options(passes=4), mcdrop.PassPlan(4)


class Net(nn.Module):
    """Of which none is made."""


@cache
def model() -> mcdrop.Model:
    return mcdrop.wrap(net(), example=X[:8], tuning={})


@cache
def fitted() -> dict[str, Any]:
    """A calibration as plain data, as a file holds it."""
    read: dict[str, Any] = json.loads(json.dumps(mcdrop.calibrate(model(), X, X[:, :1], passes=4).to_dict()))
    return read


def masks(sites: Any) -> object:
    return sample_masks(sites, 2, seed=0)


def read(x: Any) -> object:
    return mcdrop.sample(model(), x, PLAN)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "wrap a class": (lambda: mcdrop.wrap(Net, example=X), r"the class Net; give a network of it, Net\(\.\.\.\)$"),  # type: ignore[arg-type]
    "predict a class": (lambda: mcdrop.predict(Net, X), "a network is needed, .* got the class Net"),  # type: ignore[arg-type]
    "inject a class": (lambda: mcdrop.inject(Net), "a network is needed, .* got the class Net"),  # type: ignore[arg-type]
    "inject a model": (lambda: mcdrop.inject(model()), r"got a model; give its network, model\.module$"),  # type: ignore[arg-type]
    "inject None": (lambda: mcdrop.inject(None), r"a network is needed, a torch\.nn\.Module, got NoneType$"),  # type: ignore[arg-type]
    "rate of a model": (lambda: mcdrop.choose_rate(model(), X, X), "got a model; give its network"),  # type: ignore[arg-type]
    "sample 100": (lambda: mcdrop.sample(model(), X, 100), r"such as mcdrop\.PassPlan\(100\), got 100$"),  # type: ignore[arg-type]
    "sample None": (lambda: mcdrop.sample(model(), X, None), "a plan is needed, .* got None$"),  # type: ignore[arg-type]
    "no result": (lambda: mcdrop.interpret(model(), None, OPTIONS), r"what mcdrop\.sample gave, got NoneType$"),  # type: ignore[arg-type]
    "a plan": (lambda: mcdrop.interpret(model(), read(X), PLAN), r"must be mcdrop\.Options\(.*got PassPlan"),  # type: ignore[arg-type]
    "no screen": (lambda: model().with_screen("x"), r"must be what mcdrop\.fit_screen gave, got str$"),  # type: ignore[arg-type]
    "no calibration": (lambda: model().with_calibration("x"), r"what mcdrop\.calibrate gave, got str$"),  # type: ignore[arg-type]
    "save no screen": (lambda: mcdrop.save(model(), "no", screen="x"), r"screen must be .* gave, got str$"),  # type: ignore[arg-type]
    "save no fit": (lambda: mcdrop.save(model(), "no", calibration="x"), "calibration must be .* gave, got str$"),  # type: ignore[arg-type]
    "task ''": (lambda: mcdrop.predict(net(), X, task=""), "unknown task ''; choose one of"),
    "task 0": (lambda: mcdrop.predict(net(), X, task=0), "unknown task 0; choose one of"),  # type: ignore[arg-type]
    "no forward": (lambda: mcdrop.register(Net, 5), "forward must be a function, got 5$"),  # type: ignore[arg-type]
    "flags 5": (lambda: mcdrop.register(Net, flags=5), r"flags must be a dict .*\{'mc': True\}, got 5$"),  # type: ignore[arg-type]
    "flags list": (lambda: mcdrop.register(Net, flags=["mc"]), r"flags must be a dict .*, got \['mc'\]$"),  # type: ignore[arg-type]
    "flag 5": (lambda: mcdrop.register(Net, flags={5: True}), "flags must be a dict of attributes"),  # type: ignore[dict-item]
    "one site": (lambda: masks(Site("a", (4,))), r"sites must be a list such as .*, got Site\(name='a'"),
    "no sites": (lambda: masks(None), "sites must be a list such as .*, got None$"),
    "names": (lambda: masks(["a"]), r"sites must be a list such as .*, got \['a'\]$"),
    "shape 3": (lambda: masks([Site("a", 3)]), r"shape of site 'a' must be whole numbers such as \(4,\), got 3$"),  # type: ignore[arg-type]
    "shape -1": (lambda: masks([Site("a", (-1,))]), r"shape of site 'a' must be .*, got \(-1,\)$"),
    "p True": (lambda: masks([Site("a", (4,), True)]), "drop rate p of site 'a' must be .*, got True$"),
    "no device": (
        lambda: mcdrop.wrap(net(), example=X, devices=["cpu", None]),
        "devices takes those of .*, got None$",
    ),
    "meta": (lambda: read(torch.empty(3, 2, device="meta")), "a plain tensor; one on the meta device holds no numbers"),
    "metas": (lambda: read([torch.empty(2, device="meta")]), "a plain tensor; one on the meta device holds no numbers"),
    "8 bits": (lambda: read(torch.ones(3, 2).to(torch.float8_e5m2)), r"torch\.float8_e5m2; give float\(\) of them$"),
    "nested": (lambda: read(torch.nested.nested_tensor([torch.ones(2)])), r"give to_padded_tensor\(0\.0\)$"),
    "nested y": (
        lambda: mcdrop.calibrate(model(), X, torch.nested.nested_tensor([torch.ones(2)]), passes=4),
        "targets must be a plain tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("which", WRONG)
def test_what_is_nearly_right_is_named_with_what_is(which: str) -> None:
    call, said = WRONG[which]
    with pytest.raises(InputError, match=said):
        call()


@pytest.mark.parametrize("place", [None, 5, b"folder", "a\0b"], ids=repr)
@pytest.mark.parametrize("door", ["export_onnx", "export_torch", "list_models", "load", "save"])
def test_a_place_for_files_is_a_text_or_a_path(door: str, place: Any) -> None:
    doors: dict[str, Callable[[], object]] = {
        "export_onnx": lambda: mcdrop.export_onnx(model(), place, passes=4),
        "export_torch": lambda: mcdrop.export_torch(model(), place, passes=4),
        "list_models": lambda: list_models(place),
        "load": lambda: mcdrop.load(place),
        "save": lambda: mcdrop.save(model(), place),
    }
    with pytest.raises(InputError, match=r"must be a text or a pathlib\.Path") as caught:
        doors[door]()
    assert str(caught.value).endswith(f"got {place!r}")


def test_a_folder_may_be_any_object_that_names_one(tmp_path: Path) -> None:
    class Named:
        def __fspath__(self) -> str:
            return str(tmp_path)

    assert list_models(Named()) == list_models(str(tmp_path)) == []  # type: ignore[arg-type]


def test_devices_are_given_alone_or_together_by_name_or_number() -> None:
    assert devices_of(None) == devices_of(()) == ()
    assert devices_of(0) == devices_of("cuda:0") == devices_of(np.int64(0)) == ("cuda:0",)
    assert devices_of([1, "cpu", torch.device("cpu")]) == ("cuda:1", "cpu", torch.device("cpu"))
    several: list[Any] = [True, 1.5, [[]], ["cpu", True]]
    for wrong in several:
        with pytest.raises(InputError, match="devices takes those of torch"):
            devices_of(wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"method": ["standardised"]}, {"method": "nope"}, {"task": "zzz"}, {"task": 5}, {"temperature": "a"},
        {"temperature": float("nan")}, {"noise": [1.0, 2.0]}, {"noise": [float("inf")]}, {"scale": []},
        {"levels": ["a"]}, {"shape": [5]},
    ],
    ids=str,
)  # fmt: skip
def test_what_only_looks_like_a_calibration_is_refused(change: dict[str, Any]) -> None:
    assert Calibration.from_dict(fitted()).to_dict() == fitted()
    with pytest.raises(ArtifactError, match="this is not a calibration"):
        Calibration.from_dict(fitted() | change)


def test_every_pass_is_asked_of_passes_that_were_kept() -> None:
    options = mcdrop.Options(passes=4, keep_samples=True)
    kept = mcdrop.interpret(model(), mcdrop.sample(model(), X, options.plan), options)
    assert kept.samples is not None
    np.testing.assert_allclose(kept.samples.mean(0), kept.mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="these passes were not kept; sample them with keep_samples=True"):
        mcdrop.interpret(model(), mcdrop.sample(model(), X, PLAN), options)
