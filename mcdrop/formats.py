"""How a network lies on disk: one entry of ``FORMATS`` for each format, and bare files that are a whole network.

To add a format, add two functions and one line to ``FORMATS``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcdrop.barefile import kind_of, read_plain
from mcdrop.errors import InputError
from mcdrop.graphs import graph_of
from mcdrop.model import Model
from mcdrop.rows import Rows
from mcdrop.wrapping import wrap, wrap_graph

__all__ = ["FORMATS", "Format", "default_format", "load_file", "positional"]


@dataclass(frozen=True)
class Format:
    """A format: the file's name in a model folder, how it is written, and how it is read.

    ``write`` takes the model, the file and what the manifest is to say of the weights, and gives what it says besides.
    ``read`` takes the file, what the manifest says of the weights, the example, the task and the sha256. ``by_name``
    says whether inputs may be given to the network by name; where they may not, they go by position.
    """

    file: str
    write: Callable[[Model, Path, Mapping[str, Any]], dict[str, Any]]
    read: Callable[[Path, Mapping[str, Any], Any, str, str], Model]
    by_name: bool = False


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


def _read_weights(path: Path, said: Mapping[str, Any], example: Any, task: str, sha256: str) -> Model:
    from mcdrop.factory import fill, network  # here, because a graph needs no torch

    module = network(said)
    fill(module, path)
    return wrap(module, example=example, task=task, **{"tuning": {}, **said.get("wrap", {})})


# -- graphs ------------------------------------------------------------------------------------------------------------


def _write_graph(model: Model, path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """A graph as it was given, or a torch network as a graph that still draws; both keep the name of their weights."""
    graph = graph_of(model)
    path.write_bytes(graph.data)
    return {"digest": model.backend.digest(), "output": graph.output, "inject": dict(graph.inject)}


def _read_graph(path: Path, said: Mapping[str, Any], example: Any, task: str, sha256: str) -> Model:
    data = read_plain(path, sha256=sha256)
    inject = {str(node): float(p) for node, p in said.get("inject", {}).items()}
    return wrap_graph(data, example=example, task=task, output=said.get("output"), inject=inject, digest=said["digest"])


def _write_program(model: Model, path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    from mcdrop.programs import exported

    path.write_bytes(exported(model.backend, model.example))
    return {}


def _read_program(path: Path, said: Mapping[str, Any], example: Any, task: str, sha256: str) -> Model:
    return _wrap_program(read_plain(path, sha256=sha256), str(path), example, task, None)


def _wrap_program(data: bytes, name: str, example: Any, task: str, output: Any) -> Model:
    from mcdrop.programs import lost_attention, read_program

    module = read_program(data, name)
    model = wrap(module, example=example, task=task, output=output, tuning={})
    lost = lost_attention(module)
    if not lost:
        return model
    warning = (
        f"attention without dropout at {', '.join(lost)}: an export in eval mode loses its rate; if the network was "
        "trained with it, save it with mcdrop.save(mcdrop.wrap(network, ...), folder, format='pt2')"
    )
    return replace(model, audit=replace(model.audit, warnings=(*model.audit.warnings, warning)))


FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", _write_graph, _read_graph),
    "pt2": Format("model.pt2", _write_program, _read_program),
    "safetensors": Format("weights.safetensors", _write_weights, _read_weights, by_name=True),
}


def default_format(model: Model, factory: str | None) -> str:
    """Gives the format that a model is saved in where none is asked for."""
    if factory:
        return "safetensors"
    return "onnx" if not hasattr(model.module, "named_modules") else "pt2"


# -- bare files --------------------------------------------------------------------------------------------------------


def load_file(
    path: Path, *, sha256: str | None, task: str, example: Any, output: Any, inject: Mapping[str, float] | None
) -> Model:
    """Reads a network from a file that is not in a model folder.

    Raises:
        ArtifactError: it is not ONNX or ``.pt2``, could run code, or is not the file that was pinned.
        InputError: a ``.pt2`` needs example rows.
    """
    data = read_plain(path, sha256=sha256)
    if kind_of(data, str(path)) == "onnx":
        model = wrap_graph(data, example=example, task=task, output=output, inject=inject)
        return replace(model, name=path.stem)
    if inject:
        raise InputError("inject is for ONNX graphs; a .pt2 file keeps its dropout")
    if example is None:
        raise InputError(f"{path} needs example rows: mcdrop.load(path, task=..., example=rows)")
    return replace(_wrap_program(data, str(path), example, task, output), name=path.stem)
