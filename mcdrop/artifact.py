"""The model folder on disk: ``STORE/NAME/VERSION`` with ``model.toml`` and safetensors files. Nothing is unpickled.

The manifest holds the sha256 of every other file, and each file is hashed before it is parsed. Code never comes from
the folder: the factory is a function of an installed, allow-listed package.
"""

import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mcdrop.bank import Bank
from mcdrop.calibration import Calibration
from mcdrop.engine import PassPlan
from mcdrop.errors import ArtifactError, MCDropError
from mcdrop.model import Model, Options, wrap
from mcdrop.rows import Rows
from mcdrop.sampling import fingerprint
from mcdrop.screening import Screen
from mcdrop.store import FORMAT, MANIFEST, check_name, read_manifest, resolve, sha256, verify

__all__ = ["FACTORY_PACKAGES", "load", "save"]

WEIGHTS, EXAMPLE, SCREEN = "weights.safetensors", "example.safetensors", "screen.safetensors"
CALIBRATION = "calibration.json"
FACTORY_PACKAGES = ("mcdrop", "models", "timm", "torchvision", "transformers")

_FACTORY = re.compile(r"([a-z_][\w.]*):([A-Za-z_]\w*)", re.ASCII)


# -- writing -----------------------------------------------------------------------------------------------------------


def save(
    model: Model,
    folder: str | Path,
    *,
    factory: str,
    arguments: Mapping[str, Any] | None = None,
    screen: Screen | None = None,
    calibration: Calibration | None = None,
    name: str = "",
    version: str = "1",
    description: str = "",
    features: list[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model folder and reads it back; it is written beside and renamed, so it is whole or not there.

    Args:
        model: what ``wrap`` gave.
        folder: where, usually ``STORE/NAME/VERSION``.
        factory: "package.module:function" that builds the network without weights; see ``FACTORY_PACKAGES``.
        arguments: keyword arguments of the factory, as TOML can hold them.
        screen: fitted flags; None is the model's own.
        calibration: what ``calibrate`` gave; None is the model's own.
        name: of the model; by default the folder's parent's.
        version: of the model.
        description: one line for people.
        features: names of the columns of a single (N, F) input.
        overwrite: whether a folder that is there may be replaced.

    Raises:
        ArtifactError: the folder is there, or what was written does not load and answer as the model does.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise ArtifactError(f"{target} exists; choose another version or give overwrite=True")
    name = name or target.parent.name
    check_name(name)
    check_name(version)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    try:
        screen = screen or model.screen
        _write_files(model, beside, screen, calibration or model.calibration)
        head = {"name": name, "version": version, "description": description, "features": features or []}
        factory_part = {"factory": factory, "arguments": dict(arguments or {})}
        _write_manifest(model, beside, screen, head, factory_part)
        _check_same(model, load(beside), calibration or model.calibration)
        _swap(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _swap(beside: Path, target: Path) -> None:
    """Renames the new folder into place; an old one is moved aside first, and back if that fails."""
    beside.chmod(0o755)  # a temporary folder and its files are their owner's alone; a model is for whoever serves it
    for path in beside.iterdir():
        path.chmod(0o644)
    if not target.exists():
        beside.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=".replaced-", dir=target.parent)) / "old"
    target.rename(old)
    try:
        beside.rename(target)
    except OSError:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _write_files(model: Model, folder: Path, screen: Screen | None, calibration: Calibration | None) -> None:
    from safetensors.torch import save_model  # keeps tied weights tied

    save_model(model.module, str(folder / WEIGHTS))
    _write_rows(folder / EXAMPLE, model.example, {})
    if screen is not None:
        _write_rows(folder / SCREEN, screen.rows, {"scores": screen.scores, **_bank_arrays(screen.bank)})
    if calibration is not None:
        (folder / CALIBRATION).write_text(json.dumps(calibration.to_dict(), allow_nan=False), encoding="utf-8")


def _bank_arrays(bank: Bank | None) -> dict[str, Any]:
    if bank is None:
        return {}
    state = {f"bank.{name}": value for name, value in bank.state.items()}
    return {**state, **{f"typical.{name}": value for name, value in bank.typical.items()}}


def _write_rows(path: Path, rows: Rows, more: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    leaves = {f"input.{name}": _array(leaf) for name, leaf in rows.named()}
    save_file({**leaves, **{name: np.ascontiguousarray(value) for name, value in more.items()}}, str(path))


def _array(leaf: Any) -> Any:
    array = leaf.detach().cpu().numpy() if hasattr(leaf, "detach") else leaf
    return np.ascontiguousarray(array)


def _write_manifest(
    model: Model, folder: Path, screen: Screen | None, head: dict[str, Any], factory: dict[str, Any]
) -> None:
    import tomli_w

    manifest: dict[str, Any] = {
        "format": FORMAT,
        **head,
        "task": model.task,
        "weights": {"format": "safetensors", **factory},
        "sites": [{"name": site.name, "path": site.path, "kind": site.kind} for site in model.audit.live],
        "inputs": [
            {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "positional": i < model.positional}
            for i, spec in enumerate(model.inputs)
        ],
        "defaults": {key: getattr(model.defaults, key) for key in ("passes", "level", "interval", "seed")},
    }
    if screen is not None:
        plan = {"passes": screen.plan.passes, "seed": screen.plan.seed, "sampler": screen.plan.sampler}
        manifest["screen"] = {"score": screen.score, "fpr": float(screen.fpr), **plan}
        if screen.bank is not None:
            # TOML knows no null: a default layer is left out
            layer = {} if screen.bank.layer is None else {"layer": screen.bank.layer}
            manifest["screen"] |= {"distance": screen.bank.distance, **layer}
    manifest["sha256"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(tomli_w.dumps(manifest), encoding="utf-8")


def _check_same(model: Model, loaded: Model, calibration: Calibration | None) -> None:
    """The loaded model must answer as the saved one does, from the same sites, and be the one that was calibrated."""
    plan = PassPlan(4)
    ask = {"seed": plan.seed, "start": 0, "sampler": plan.sampler}
    ours = model.backend.forward(model.example, plan.passes, **ask)  # type: ignore[arg-type]
    theirs = loaded.backend.forward(loaded.example, plan.passes, **ask)  # type: ignore[arg-type]
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
        raise ArtifactError("the saved folder answers differently from the model: does the factory build this network?")
    if calibration is not None and fingerprint(loaded, calibration.plan) != calibration.fingerprint:
        raise ArtifactError("the calibration belongs to another model, or the weights have changed since; fit it again")


# -- reading -----------------------------------------------------------------------------------------------------------


def load(folder: str | Path) -> Model:
    """Reads a model folder, or the newest version inside ``STORE/NAME``.

    Raises:
        ModelNotFound: no model lies there.
        ArtifactError: a file differs from the manifest, the factory is not allowed, or the weights do not fit.
    """
    place = resolve(folder)
    manifest = read_manifest(place)
    verify(place, manifest)
    try:
        return _build(place, manifest)
    except MCDropError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{place / MANIFEST} does not describe a model: {type(error).__name__}: {error}") from error


def _build(place: Path, manifest: Mapping[str, Any]) -> Model:
    module = _network(manifest["weights"])
    _fill(module, place / WEIGHTS)
    positional = sum(bool(spec["positional"]) for spec in manifest["inputs"])
    example, _ = _read_rows(place / EXAMPLE, positional)
    given = example.args[0] if positional == 1 and not example.kwargs else (example.args or example.kwargs)
    if example.args and example.kwargs:
        raise ArtifactError(f"{place / EXAMPLE} mixes inputs by position and by name")
    model = wrap(module, example=given, task=manifest["task"])
    live = [(site.name, site.kind) for site in model.audit.live]
    promised = [(site["name"], site["kind"]) for site in manifest["sites"]]
    if live != promised:
        raise ArtifactError(f"{place}: the network has the live sites {live}, its manifest promises {promised}")
    model = replace(
        model, name=manifest["name"], version=manifest["version"], description=manifest.get("description", ""),
        features=manifest.get("features") or None, defaults=Options(**manifest["defaults"]),
    )  # fmt: skip
    model = model.with_screen(_read_screen(place, manifest.get("screen"), positional))
    return model.with_calibration(_read_calibration(place / CALIBRATION))


def _network(weights: Mapping[str, Any]) -> Any:
    """Calls the factory; on the meta device, so that nothing is initialised only to be overwritten."""
    import torch

    factory = str(weights["factory"])
    match = _FACTORY.fullmatch(factory)
    if match is None or match[1].split(".")[0] not in FACTORY_PACKAGES:
        allowed = ", ".join(FACTORY_PACKAGES)
        raise ArtifactError(f"factory {factory!r} must be 'package.module:function' of one of: {allowed}")
    try:
        function = getattr(importlib.import_module(match[1]), match[2])
    except (ImportError, AttributeError) as error:
        raise ArtifactError(f"factory {factory!r} cannot be imported: {error}") from error
    with torch.device("meta"):
        module = function(**weights.get("arguments", {}))
    if not isinstance(module, torch.nn.Module):
        raise ArtifactError(f"factory {factory!r} gave a {type(module).__name__}, not a torch.nn.Module")
    return module.eval()


def _fill(module: Any, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(str(path))
        tied = set(module.state_dict()) - set(state)
        module.load_state_dict(state, strict=False, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{path} does not fit the network: {str(error)[:500]}") from error
    unexpected = set(state) - set(module.state_dict())
    left = {name for name in tied if module.state_dict()[name].is_meta}
    if unexpected or left:
        raise ArtifactError(f"{path} does not fit the network: missing {sorted(left)}, unexpected {sorted(unexpected)}")


def _read_rows(path: Path, positional: int) -> tuple[Rows, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(str(path))
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}") from error
    leaves = {key.removeprefix("input."): value for key, value in arrays.items() if key.startswith("input.")}
    args = tuple(leaves.pop(str(i)) for i in range(positional))
    more = {key: value for key, value in arrays.items() if not key.startswith("input.")}
    return Rows.of(args or leaves), more


def _read_screen(place: Path, head: Mapping[str, Any] | None, positional: int) -> Screen | None:
    if head is None:
        return None
    rows, more = _read_rows(place / SCREEN, positional)
    plan = PassPlan(head["passes"], head["seed"], head["sampler"])
    bank = None
    if "distance" in head:
        parts = [
            {name.removeprefix(start): value for name, value in more.items() if name.startswith(start)}
            for start in ("bank.", "typical.")
        ]
        bank = Bank(head["distance"], head.get("layer"), *parts)
    return Screen(head["score"], rows, more["scores"].astype(np.float64), plan, head["fpr"], bank)


def _read_calibration(path: Path) -> Calibration | None:
    if not path.is_file():
        return None
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
