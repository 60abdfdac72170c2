"""The model folder on disk: ``STORE/NAME/VERSION`` with ``model.toml`` and the network's file. Nothing is unpickled.

The manifest holds the sha256 of every other file, and each file is hashed before it is parsed. Code never comes from
the folder: a network is a graph, or weights for a function of an installed, allow-listed package (see ``formats``).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcdrop.beside import CALIBRATION, check_screen, read_beside, screen_head, write_beside
from mcdrop.calibration import Calibration
from mcdrop.engine import PassPlan
from mcdrop.errors import ArtifactError, InputError, MCDropError, ModelRefused, UnknownName
from mcdrop.formats import FORMATS, Source, check_features, default_format, load_file, same_numbers
from mcdrop.model import Model, Options, check_columns, check_fitted, check_model
from mcdrop.placing import anew, check_replaceable
from mcdrop.sampling import fingerprint
from mcdrop.screening import Screen
from mcdrop.store import FORMAT, MANIFEST, is_plain_file, name_and_version, read_manifest, resolve, verify
from mcdrop.store import sha256 as hash_of
from mcdrop.streams import path_of
from mcdrop.wrapping import devices_of

__all__ = ["CALIBRATION", "load", "save"]

_DEFAULTS = ("passes", "level", "interval", "seed", "sampler", "tolerance", "exact_last")


# -- writing -----------------------------------------------------------------------------------------------------------


def save(
    model: Model,
    folder: str | Path,
    *,
    factory: str | None = None,
    format: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    screen: Screen | None = None,
    calibration: Calibration | None = None,
    name: str = "",
    version: str | None = None,
    description: str = "",
    features: list[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model folder and reads it back; it is written beside and renamed, so it is whole or not there.

    Args:
        model: what ``wrap`` gave.
        folder: where, usually ``STORE/NAME/VERSION``.
        factory: "package.module:function" that builds the network without weights, defined in one of
            ``mcdrop.factory.FACTORY_MODULES``; for the format "safetensors".
        format: one of ``FORMATS``; None is "safetensors" with a factory, else "onnx" for a graph, "pt2" for a module.
        arguments: keyword arguments of the factory, as TOML can hold them.
        screen: fitted flags; None is the model's own.
        calibration: what ``calibrate`` gave; None is the model's own.
        name: of the model; by default the folder's parent's.
        version: of the model; by default the folder's own name, or "1" where that cannot be one.
        description: one line for people.
        features: names of the columns of a single (N, F) input; None are the model's, [] none.
        overwrite: whether a saved model that is there, or an empty folder, may be replaced.

    Raises:
        ArtifactError: the folder is there, or holds more than a model, or cannot be written, or what was written does
            not load, answer and screen as the model does.
        InputError: no path, a screen or calibration that is none, features that are not one name for each column,
            arguments without names, or defaults that the format cannot give.
    """
    check_model(model)
    check_fitted(screen, calibration)
    if not isinstance(arguments, Mapping | None):
        raise InputError(f"arguments must be those of the factory by name, as in {{'width': 64}}, got {arguments!r}")
    named = features if features is not None else model.features or []
    check_columns(named, model.inputs)
    target = _target(folder, overwrite)
    format = format or default_format(model, factory)
    UnknownName.check("format", format, FORMATS)
    name, version = name_and_version(target, name, version)
    with anew(target, overwrite=overwrite) as beside:
        screen = screen or model.screen
        said: dict[str, Any] = {"factory": factory, "arguments": dict(arguments or {})} if factory else {}
        weights = {"format": format, **said, **FORMATS[format].write(model, beside / FORMATS[format].file, said)}
        by_name = FORMATS[format].by_name
        write_beside(beside, model, screen, calibration or model.calibration, by_name=by_name)
        head = {"name": name, "version": version, "description": description, "features": named}
        _write_manifest(model, beside, screen, head, weights, by_name)
        there = model.audit.devices[:1] if FORMATS[format].movable else ()
        try:
            loaded = load(beside, devices=there)
        except ModelRefused as error:  # such as onnxruntime, which multiplies no bfloat16
            raise ModelRefused(f"{error}{_instead(model, format)}") from error
        _check_same(model, loaded, calibration or model.calibration, format)
    return target


def _target(folder: str | Path, overwrite: bool) -> Path:
    target = path_of(folder)
    check_replaceable(target, overwrite=overwrite)
    return target


def _write_manifest(
    model: Model, folder: Path, screen: Screen | None, head: dict[str, Any], weights: dict[str, Any], by_name: bool
) -> None:
    import tomli_w

    manifest: dict[str, Any] = {
        "format": FORMAT,
        **head,
        "task": model.task,
        **({"reads": model.reads} if model.reads else {}),
        **({"injected": model.audit.injected} if model.audit.injected else {}),
        "weights": weights,
        "sites": [{"name": site.name, "path": site.path, "kind": site.kind} for site in model.audit.live],
        "inputs": [
            {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "positional": here}
            for spec, here in ((spec, not by_name or i < model.positional) for i, spec in enumerate(model.inputs))
        ],
        "defaults": {key: value for key in _DEFAULTS if (value := getattr(model.defaults, key)) is not None},
    }
    if screen is not None:
        manifest["screen"] = screen_head(screen)
    manifest["sha256"] = {path.name: hash_of(path) for path in sorted(folder.iterdir())}
    try:
        (folder / MANIFEST).write_text(tomli_w.dumps(manifest), encoding="utf-8")
    except (TypeError, ValueError) as error:  # no type of TOML, or half a character, which UTF-8 cannot say
        raise ArtifactError(f"the manifest cannot hold what was given to save: {error}") from None


def _instead(model: Model, form: str) -> str:
    """What keeps a torch network as it is, its precision and its few digits, where a graph does not."""
    return "; save it with format='pt2'" if form == "onnx" and default_format(model, None) == "pt2" else ""


def _check_same(model: Model, loaded: Model, calibration: Calibration | None, form: str) -> None:
    """The loaded model must answer as the saved one does, from the same sites, and be the one that was calibrated."""
    both, sampler = (model, loaded), PassPlan().sampler
    passes = [one.backend.forward(one.example, 4, seed=0, start=0, sampler=sampler) for one in both]
    off = [one.backend.deterministic(one.example) for one in both]
    apart = [not same_numbers(*pair) for pair in (passes, off)]
    if any(apart):
        raise ArtifactError(
            "the saved graph gives the same passes as this network, but not its output in eval: it knows the draws "
            "only by their expectation, which is another output here; save it with factory="
            if form != "safetensors" and not apart[0]
            else "the saved folder answers differently from the model: the factory or the format is wrong"
            + _instead(model, form)
        )
    if calibration is not None and fingerprint(loaded, calibration.plan) != calibration.fingerprint:
        raise ArtifactError("the calibration belongs to another model, or the weights have changed since; fit it again")
    check_features(loaded, form, loaded.screen, fitted=model)
    if loaded.defaults.exact_last:  # a server would refuse it, and with it all the models beside it
        model.backend.block(model.example, exact_last=True)
        try:
            loaded.backend.block(loaded.example, exact_last=True)
        except InputError as error:
            said = f"the model's defaults ask for exact_last=True, which the format {form!r} cannot give: {error}"
            raise InputError(said + _instead(model, form)) from None


# -- reading -----------------------------------------------------------------------------------------------------------


def load(
    folder: str | Path,
    *,
    sha256: str | None = None,
    task: str | None = None,
    example: Any = None,
    output: str | int | None = None,
    inject: Mapping[str, float] | None = None,
    devices: Any = (),
) -> Model:
    """Reads a model folder, the newest version inside ``STORE/NAME``, or a bare ONNX or ``.pt2`` file.

    Args:
        folder: where it lies.
        sha256: what the file must have; of a folder its ``model.toml``, which pins all others.
        task: of a bare file, as for ``wrap``; a folder knows its own, as it does all that follows.
        example: a few rows for a bare file; an ONNX graph can do without.
        output: name or position of the output to read of a bare file.
        inject: drop rates by the names of nodes of a bare ONNX file after which a dropout is put.
        devices: of torch, such as "cuda", on which a torch network runs; several share the rows out. None is the CPU.

    Raises:
        ModelNotFound: no model lies there.
        ArtifactError: a file differs from the manifest or the pin, could run code, does not fit the network, or cannot
            be read.
        InputError: a device that cannot be used, no path, a pin that is no text, or what only a bare file is read with.
    """
    if not isinstance(sha256, str | None):
        raise InputError(f"sha256 must be a text of 64 hexadecimal digits, as sha256sum gives it, got {sha256!r}")
    devices = tuple(map(str, devices_of(devices)))
    folder = path_of(folder)
    if is_plain_file(folder):
        return load_file(
            folder, sha256=sha256, task="regression" if task is None else task, example=example, output=output,
            inject=inject, devices=devices,
        )  # fmt: skip
    place = resolve(folder)
    if any(given is not None for given in (task, example, output, inject)):
        raise InputError("task, example, output and inject are for bare files; a model folder knows its own")
    manifest = read_manifest(place, pin=sha256)
    try:
        verify(place, manifest)
        return _build(place, manifest, devices)
    except MCDropError:
        raise
    except FileNotFoundError as error:
        raise ArtifactError(f"{place} changed while it was read: {error.filename} is gone; load it again") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{place / MANIFEST} does not describe a model: {type(error).__name__}: {error}") from error


def _build(place: Path, manifest: Mapping[str, Any], devices: tuple[str, ...]) -> Model:
    weights = manifest["weights"]
    UnknownName.check("format", weights["format"], FORMATS)
    form = FORMATS[weights["format"]]
    # before the network, which takes its time: the folder may be written anew meanwhile
    rows, screen, calibration = read_beside(place, manifest)
    example = rows.args[0] if len(rows.args) == 1 else (rows.args or rows.kwargs)
    source = Source(place / form.file, weights, manifest["sha256"].get(form.file, ""), devices)
    model = form.read(source, example, manifest["task"])
    names = [str(spec["name"]) for spec in manifest["inputs"]]
    if not form.by_name and len(names) == len(model.inputs):  # a graph's own names are the exporter's
        specs = zip(model.inputs, names, strict=True)
        model = replace(model, inputs=tuple(replace(spec, name=name) for spec, name in specs))
    _check_promises(place, model, manifest)
    model = replace(
        model, name=manifest["name"], version=manifest["version"], description=manifest.get("description", ""),
        features=manifest.get("features") or None, defaults=Options(**manifest["defaults"]),
        reads=str(manifest.get("reads", "")),  # "" in older folders, whose fits knew nothing of it
        audit=replace(model.audit, injected=manifest.get("injected") or model.audit.injected),
    )  # fmt: skip
    check_screen(place, model, screen)
    check_features(model, weights["format"], screen)
    return model.with_screen(screen).with_calibration(calibration)


def _check_promises(place: Path, model: Model, manifest: Mapping[str, Any]) -> None:
    """What a manifest says of the network must be so, because others read it there."""
    live = [(site.name, site.kind) for site in model.audit.live]
    promised = [(site["name"], site["kind"]) for site in manifest["sites"]]
    if live != promised:
        raise ArtifactError(f"{place}: the network has the live sites {live}, its manifest promises {promised}")
    inputs = [(spec.name, spec.dtype, [*spec.shape]) for spec in model.inputs]
    told = [(spec["name"], spec["dtype"], spec["shape"]) for spec in manifest["inputs"]]
    if inputs != told:
        raise ArtifactError(f"{place}: the network takes {inputs}, its manifest promises {told}")
    texts = all(isinstance(manifest.get(name, ""), str) for name in ("description", "injected"))
    if not texts:
        raise ArtifactError(f"{place / MANIFEST} must hold texts as description and injected")
    try:
        check_columns(manifest.get("features", []), model.inputs)
    except InputError as error:
        raise ArtifactError(f"{place / MANIFEST}: {error}") from None
