"""How a network lies on disk: one entry of ``FORMATS`` for each format, and bare files that are a whole network.

To add a format, add two functions and one line to ``FORMATS``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mcdrop.barefile import kind_of, read_plain
from mcdrop.engine import ROUNDING
from mcdrop.errors import ArtifactError, InputError
from mcdrop.graphs import graph_of
from mcdrop.model import Model
from mcdrop.rows import Rows
from mcdrop.screening import Screen
from mcdrop.store import FILE_BYTES
from mcdrop.wrapping import wrap, wrap_graph

__all__ = [
    "FORMATS", "Format", "Source", "check_features", "default_format", "load_file", "positional", "same_numbers",
]  # fmt: skip

_RUNNING = ("compile", "precision", "tuning")  # of what wrap was asked for, how passes are run


@dataclass(frozen=True)
class Source:
    """The network's file, what the manifest says of the weights, the file's sha256, and the devices to run it on."""

    path: Path
    said: Mapping[str, Any]
    sha256: str
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A format: the file's name in a model folder, how it is written, and how it is read.

    ``write`` takes the model, the file and what the manifest is to say of the weights, and gives what it says besides.
    ``read`` takes the source, the example and the task. ``by_name`` says whether inputs may be given to the network by
    name; where they may not, they go by position. ``movable`` says whether it may run on any device of torch.
    """

    file: str
    write: Callable[[Model, Path, Mapping[str, Any]], dict[str, Any]]
    read: Callable[[Source, Any, str], Model]
    by_name: bool = False
    movable: bool = True


def positional(rows: Rows) -> Rows:
    """Gives the same rows with every leaf by position."""
    return Rows(rows.leaves, {}, rows.count)


# -- weights and a factory ---------------------------------------------------------------------------------------------


def _write_weights(model: Model, path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    from safetensors.torch import save_model  # keeps tied weights tied

    if not said.get("factory"):
        raise InputError("weights alone are no network: give factory='package.module:function', or format='onnx'")
    save_model(model.module, str(path))
    return {"wrap": _wrap_options(model)} if model.asked else {}


def _wrap_options(model: Model) -> dict[str, Any]:
    """What the network was wrapped with, as a manifest can hold it: types of modules become the paths they meant."""
    from mcdrop.discover import matching  # here, because a graph needs no torch

    options = dict(model.asked)
    if callable(options.get("output")):
        raise InputError("an output that a function picks cannot be saved; wrap with its name or position")
    for name in ("include", "exclude"):
        paths = [path for which in options.get(name, ()) for path in matching(model.module, which)]
        options |= {name: paths} if paths else {}
    return options


def _read_weights(source: Source, example: Any, task: str) -> Model:
    from mcdrop.factory import fill, network  # here, because a graph needs no torch

    module = network(source.said)
    # not given a name: the bytes are freed as soon as the network has its weights
    fill(module, read_plain(source.path, sha256=source.sha256, most=FILE_BYTES), str(source.path))
    return _wrapped(module, example, task, source.devices, source.said.get("wrap", {}))


def _wrapped(module: Any, example: Any, task: str, devices: Sequence[str], options: Mapping[str, Any]) -> Model:
    """Wraps a torch network on the first of the devices, and shares the rows out where there are more."""
    from mcdrop.forward import moved

    here = devices[0] if devices else "cpu"
    # what was timed on a CPU says nothing of another device
    asked = {**options, "tuning": options.get("tuning", {}) if here == "cpu" else {}}
    return wrap(moved(module, here), example=example, task=task, devices=devices if len(devices) > 1 else (), **asked)


# -- graphs ------------------------------------------------------------------------------------------------------------


def _write_graph(model: Model, path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """A graph as it was given, or a torch network as a graph that still draws; both keep the name of their weights."""
    graph = graph_of(model)
    path.write_bytes(graph.data)
    return {"digest": model.weights, "output": graph.output, "inject": dict(graph.inject)}


def _read_graph(source: Source, example: Any, task: str) -> Model:
    _check_stays(source.devices)
    data, said = read_plain(source.path, sha256=source.sha256), source.said
    inject = {str(node): float(p) for node, p in said.get("inject", {}).items()}
    asked = {"task": task, "output": said.get("output"), "inject": inject, "digest": said["digest"]}
    return _wrap_graph(data, source.path, example=example, **asked)


def _wrap_graph(data: bytes, path: Path, **asked: Any) -> Model:
    """Wraps a graph; one that is damaged is named by its file."""
    try:
        return wrap_graph(data, **asked)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _check_stays(devices: Sequence[str]) -> None:
    if any(device != "cpu" for device in devices):
        raise InputError(f"an ONNX graph runs on the CPU, not on {', '.join(devices)}; a torch network runs there")


def _write_program(model: Model, path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    from mcdrop.programs import exported

    path.write_bytes(exported(model.backend, model.example))
    running = {name: model.asked[name] for name in _RUNNING if name in model.asked}
    return {"digest": model.weights, **({"wrap": running} if running else {})}


def _read_program(source: Source, example: Any, task: str) -> Model:
    data, asked = read_plain(source.path, sha256=source.sha256), source.said.get("wrap", {})
    running = {name: asked[name] for name in _RUNNING if name in asked}
    model = _wrap_program(data, str(source.path), example, task, source.devices, running)
    if "digest" not in source.said:  # as in older folders
        return model
    # a program holds as weights what a network may keep beside its own
    return replace(model, saved_as={model.backend.digest(): str(source.said["digest"])})


def _wrap_program(
    data: bytes, name: str, example: Any, task: str, devices: Sequence[str], options: Mapping[str, Any]
) -> Model:
    from mcdrop.any_rows import fixed_rows
    from mcdrop.programs import lost_attention, read_program

    module = read_program(data, name, device=devices[0] if devices else "cpu")
    try:
        model = _wrapped(module, example, task, devices, options)
    except InputError as error:
        if type(error) is not InputError or not (said := fixed_rows(module, example)):
            raise
        raise InputError(f"{error}; {said}") from error
    lost = lost_attention(module)
    if not lost:
        return model
    warning = (
        f"attention without dropout at {', '.join(lost)}: an export in eval mode loses its rate; if the network was "
        "trained with it, save it with mcdrop.save(mcdrop.wrap(network, ...), folder, format='pt2')"
    )
    return replace(model, audit=replace(model.audit, warnings=(*model.audit.warnings, warning)))


FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", _write_graph, _read_graph, movable=False),
    "pt2": Format("model.pt2", _write_program, _read_program),
    "safetensors": Format("weights.safetensors", _write_weights, _read_weights, by_name=True),
}


def default_format(model: Model, factory: str | None) -> str:
    """Gives the format that a model is saved in where none is asked for."""
    if factory:
        return "safetensors"
    return "onnx" if not hasattr(model.module, "named_modules") else "pt2"


def same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether what a network gave is the same but for rounding: one near 0 has that of its output's usual numbers."""
    if one.shape != other.shape:
        return False
    sizes = np.ma.masked_invalid(np.abs(one))
    usual = np.ma.median(sizes, axis=tuple(range(max(one.ndim - 1, 1))), keepdims=True)  # type: ignore[no-untyped-call]
    near = np.maximum(ROUNDING / 10, ROUNDING * np.ma.filled(usual, 0.0))
    return bool(np.isclose(one, other, rtol=ROUNDING, atol=near, equal_nan=True).all())


def check_features(model: Model, form: str, screen: Screen | None, *, fitted: Model | None = None) -> None:
    """Refuses a model from a folder that does not give the hidden features that its screen compares.

    Args:
        model: what was read.
        form: the format that it lay in.
        screen: of the model; one that compares no hidden features needs none.
        fitted: the model that was saved, where it is there to be compared with.

    Raises:
        ArtifactError: it gives none, or others.
    """
    bank = None if screen is None else screen.bank
    if bank is None:
        return
    try:
        found = model.backend.features(model.example, bank.layer)
        bank.measure(found)
    except InputError as error:
        why = str(error)
    else:
        ours = found if fitted is None else fitted.backend.features(fitted.example, bank.layer)
        if same_numbers(found, ours):
            return
        why = "what enters another layer is read there"
    others = [f"format={name!r}" for name in ("onnx", "pt2") if name != form and bank.layer is None]
    raise ArtifactError(
        f"the screen compares hidden features, and from format {form!r} the network does not give those that it was "
        f"fitted on ({why}); save it with {' or '.join(['factory=', *others])}"
    )


# -- bare files --------------------------------------------------------------------------------------------------------


def load_file(
    path: Path, *, sha256: str | None, task: str, example: Any, output: Any, inject: Mapping[str, float] | None,
    devices: Sequence[str] = (),
) -> Model:  # fmt: skip
    """Reads a network from a file that is not in a model folder.

    Raises:
        ArtifactError: it is not ONNX or ``.pt2``, could run code, or is not the file that was pinned.
        InputError: a ``.pt2`` needs example rows, or a device cannot be used.
    """
    data = read_plain(path, sha256=sha256)
    if kind_of(data, str(path)) == "onnx":
        _check_stays(devices)
        model = _wrap_graph(data, path, example=example, task=task, output=output, inject=inject)
        return replace(model, name=path.stem)
    if inject:
        raise InputError("inject is for ONNX graphs; a .pt2 file keeps its dropout")
    if example is None:
        raise InputError(f"{path} needs example rows: mcdrop.load(path, task=..., example=rows)")
    return replace(_wrap_program(data, str(path), example, task, devices, {"output": output}), name=path.stem)
