"""A network becomes a model: its draws are discovered, proved and audited, once."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mcdrop.audit import Audit
from mcdrop.errors import InputError, MissingExtra, UnknownName
from mcdrop.masks import is_whole
from mcdrop.model import InputSpec, Model, not_a_network
from mcdrop.reads import reads_of
from mcdrop.rows import Rows, check_dense, column_names
from mcdrop.summaries import TASKS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["devices_of", "each_once", "wrap", "wrap_graph"]

_EXAMPLE_ROWS = 8


def wrap(
    module: "nn.Module | Model",
    *,
    example: Any,
    task: str = "regression",
    output: str | int | Callable[[Any], Any] | None = None,
    include: str | type | Sequence[str | type] = (),
    exclude: str | type | Sequence[str | type] = (),
    force_literal: bool = False,
    strict: bool = True,
    memory: int | str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    devices: Any = (),
    tuning: Mapping[str, Any] | None = None,
) -> Model:
    """Discovers a network's random draws once and gives a model that can be sampled.

    Args:
        module: any ``torch.nn.Module``; it is not modified. Later changes of its weights are seen, those of its layers,
            hooks, drop rates and other settings are not: wrap it again. Or an ONNX graph: a path, a model of onnx, what
            ``torch.onnx.export(dynamo=True)`` gives, or a session of onnxruntime (see ``wrap_graph``).
        example: a few real rows: an array or tensor, a tuple of positional inputs, or a dict of keyword inputs; the
            first dimension of each is the rows. Of a data frame the model keeps the columns' names, and finds them in
            later ones.
        task: one of ``TASKS``: "regression", "gaussian" (mean and log-variance) or "classification" (logits).
        output: the name or position of the output to read where the network returns several, or a function that
            picks it.
        include: paths or types of modules whose training behaviour is switched on whatever the probe says of it.
        exclude: paths or types of modules whose draws stay off.
        force_literal: whether dropout calls with a literal ``training=False`` drop as well.
        strict: whether a draw of training that cannot be controlled refuses the network; False makes it a warning in
            the audit.
        memory: bytes that the activations of one chunk of passes may take; "auto" is about a CPU's cache, which is
            fastest there.
        precision: of the passes of a float32 network, and of the output with all draws off that comes with them:
            "fp32", "bf16" (its matrix products and convolutions are several times faster on processors that have the
            instructions) or "tf32" (on CUDA devices). The audit states its error in standard deviations of the passes.
        compile: whether torch's compiler takes the captured passes; it is paid for here and at new sizes.
        devices: several devices to share the rows out to, each with a copy of the network, or a single one, such as
            "cuda:0" or its number; none is the network's own.
        tuning: choices that were timed before, ``chunk`` and ``kept_from`` of an audit, to be taken as they are; {} is
            the usual ones. None times them here, so that the last digits of two models of one network may differ.

    Raises:
        InputError: an unknown task, precision or device, a class of networks, or an example that the network cannot
            take.
        ModelRefused: a precision whose error is too large, or a network that cannot be captured for it.
        NoStochasticSite: nothing in the network is random.
        UncontrolledDraw: something in it is random and cannot be controlled.
    """
    if isinstance(module, Model) or not hasattr(module, "named_modules"):
        if precision != "fp32" or compile or devices_of(devices):
            raise InputError("precision, compile and devices are for torch modules; an ONNX graph runs as it is")
        return module if isinstance(module, Model) else wrap_graph(module, example=example, task=task, output=output)
    from mcdrop.diagnose import diagnose  # here, because a model of another backend needs no torch
    from mcdrop.discover import Overrules
    from mcdrop.outputs import picker

    _check(module, example, task, precision)
    rows, pick, devices = Rows.of(example, hint=Rows.ONE_ROW), picker(output), devices_of(devices)
    for leaf in rows.leaves:
        check_dense(leaf, "an example")
    overrules = Overrules(each_once(include, "include"), each_once(exclude, "exclude"), force_literal, strict)
    rows, several, seen = _discovered(module, rows, pick, overrules)
    backend = _backend(seen, pick, memory, precision, compile, _tuning(tuning))
    audit = diagnose(backend, several, seen.audit)
    TASKS[task].statistics.of(backend.deterministic(rows).astype(np.float64)[None])
    backend = _shared_out(backend, devices)
    asked = _unusual({**vars(overrules), "output": output, "precision": precision, "compile": compile}, audit)
    return Model(
        module=module, backend=backend, audit=replace(audit, devices=backend.devices), task=task, asked=asked,
        inputs=_specs(module, rows), positional=len(rows.args), example=rows, reads=reads_of(output),
        features=column_names(example),
    )  # fmt: skip


def _backend(seen: Any, pick: Any, memory: int | str, precision: str, compile: bool, tuning: Any) -> Any:
    """Gives the backend of a network whose draws are known."""
    from mcdrop.backends.torch import TorchBackend

    backend = TorchBackend(
        seen.live, seen.plain, pick, seen.excluded, seen.force, precision, compile, tuning, seen.beside,
        flags=seen.flags,
    )  # fmt: skip
    backend.plans.knows(seen.rows, seen.found)
    backend.chunk_bytes = backend.chunk_bytes if memory == "auto" else _bytes(memory)
    return backend


def _shared_out(backend: Any, devices: Sequence[Any]) -> Any:
    """Gives the backend of one device, or one that shares the rows out to several."""
    if not devices:
        return backend
    from mcdrop.sharded import ShardedBackend

    return ShardedBackend(backend, devices)


def devices_of(devices: Any) -> tuple[Any, ...]:
    """Gives several devices, or a single one, as a tuple; None is none, and a whole number the CUDA device's.

    Raises:
        InputError: one of them is something else.
    """
    single = isinstance(devices, str) or not isinstance(devices, Iterable)
    several = () if devices is None else (devices,) if single else tuple(devices)
    wrong = [one for one in several if not (isinstance(one, str) or is_whole(one) or hasattr(one, "type"))]
    if wrong:
        raise InputError(f"devices takes those of torch such as 'cuda:0', or their numbers, got {wrong[0]!r}")
    return tuple(f"cuda:{one}" if is_whole(one) else one for one in several)


def each_once(given: Any, name: str, kinds: tuple[type, ...] = (str, type)) -> tuple[Any, ...]:
    """Gives several paths, or paths and types, each once; a single one too.

    Raises:
        InputError: one of them is something else.
    """
    several = tuple(given) if isinstance(given, Iterable) and not isinstance(given, kinds) else (given,)
    wrong = [one for one in several if not isinstance(one, kinds)]
    if wrong:
        types = " or types of modules" if type in kinds else ""
        raise InputError(f"{name} takes paths as in named_modules(){types}, got {wrong[0]!r}")
    return tuple(dict.fromkeys(several))


def _check(module: Any, example: Any, task: str, precision: str) -> None:
    from mcdrop.planning import check_precision  # here, because a graph needs no torch

    if isinstance(module, type):
        raise not_a_network(module)
    inputs = example.values() if isinstance(example, Mapping) else example if isinstance(example, tuple) else ()
    if any(isinstance(one, Mapping) for one in inputs):
        raise InputError(
            "an input of the example is a dict, which has no rows: for a network that takes one, wrap a module whose "
            "forward(self, **inputs) hands them on as a dict, and give that dict as the example"
        )
    UnknownName.check("task", task, TASKS)
    check_precision(module, precision)


def _tuning(given: Mapping[str, Any] | None) -> Any:
    from mcdrop.plan import Tuning  # here, because a graph needs no torch

    if not isinstance(given, Mapping | None):
        raise InputError(f"tuning must be a dict such as {{}} or an audit's {{'chunk': 1.0}}, got {given!r}")
    return None if given is None else Tuning.of(given)


def _unusual(asked: dict[str, Any], audit: Audit) -> dict[str, Any]:
    """What was asked of ``wrap`` besides its defaults, and what was timed, where it is not the usual."""
    parameters = inspect.signature(wrap).parameters
    unusual = {name: value for name, value in asked.items() if value != parameters[name].default}
    timed = {"chunk": audit.chunk, "kept_from": audit.kept_from}
    if timed != {"chunk": 1.0, "kept_from": None}:
        unusual["tuning"] = {name: value for name, value in timed.items() if value is not None}
    return unusual


def _few(rows: Rows) -> Rows:
    """Gives the rows that a model holds on to, without the data set that they are cut from."""
    return rows.take(slice(0, _EXAMPLE_ROWS)).copy()


def _discovered(module: Any, rows: Rows, pick: Any, overrules: Any) -> tuple[Rows, Rows, Any]:
    """Gives few rows and all as the network takes them: whole numbers may stand for real ones, as in [[1], [2]]."""
    from mcdrop.digits import digits
    from mcdrop.discover import UNUSABLE, discover
    from mcdrop.flags import in_front
    from mcdrop.forward import place_of

    def discovered(rows: Rows) -> tuple[Rows, Rows, Any]:
        seen = discover(module, rows, pick, overrules)
        rows = in_front(rows, seen.front)
        return _few(rows), rows, seen

    device, _ = place_of([*module.parameters(), *module.buffers()])
    with digits(device):
        try:
            return discovered(rows)
        except InputError as error:
            if not _all_whole(rows):
                raise
            whole = error
        real = rows.map(lambda leaf: leaf.astype(np.float32) if isinstance(leaf, np.ndarray) else leaf.float())
        try:
            return discovered(real)
        except InputError as error:  # of token ids only the first error speaks
            raise whole if str(error).startswith(UNUSABLE) else error from None


def wrap_graph(
    source: Any,
    *,
    example: Any = None,
    task: str = "regression",
    output: Any = None,
    inject: Mapping[str, float] | None = None,
    digest: str | None = None,
) -> Model:
    """Discovers the draws of an ONNX graph and gives a model that runs on onnxruntime.

    Args:
        source: a path, the bytes of a file, a model of onnx, what ``torch.onnx.export(dynamo=True)`` gives, or a
            session of onnxruntime.
        example: as for ``wrap``; None makes rows up.
        task: as for ``wrap``, and so is the output's name or position.
        output: the output to read; None is the only one of real numbers.
        inject: drop rates by the names of nodes after which a dropout is put.
        digest: what names the weights; None is the sha256 of the graph.

    Raises:
        ArtifactError: it is no sound ONNX model in one piece.
        ModelRefused: dropout was lost in export, or something is drawn that no mask can stand for.
    """
    try:
        from mcdrop.onnx_discover import discover_graph
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx") from None
    UnknownName.check("task", task, TASKS)
    rows = None if example is None else _few(Rows.of(example))
    found = discover_graph(source, rows, output=output, inject=inject, digest=digest)
    TASKS[task].statistics.of(found.backend.deterministic(found.rows).astype(np.float64)[None])
    leaves = found.rows.leaves
    pairs = zip(found.inputs, leaves, strict=True)
    inputs = (InputSpec(one.name, one.dtype, (-1, *leaf.shape[1:])) for one, leaf in pairs)
    return Model(
        module=found.graph, backend=found.backend, audit=found.audit, task=task,
        inputs=tuple(inputs), positional=len(leaves), example=found.rows, reads=reads_of(output),
        features=column_names(example),
    )  # fmt: skip


def _bytes(memory: int | str) -> int:
    if not is_whole(memory) or int(memory) < 1:
        raise InputError(f"memory must be 'auto' or a whole number of bytes above 0, got {memory!r}")
    return int(memory)


def _all_whole(rows: Rows) -> bool:
    return all(np.dtype(str(leaf.dtype).removeprefix("torch.")).kind in "iub" for leaf in rows.leaves)


def _specs(module: Any, rows: Rows) -> tuple[InputSpec, ...]:
    """Names positional inputs as the module's forward does."""
    from mcdrop.forward import place_of

    try:
        signature = inspect.signature(module.forward).parameters.values()
        parameters = [parameter.name for parameter in signature if parameter.kind < parameter.VAR_POSITIONAL]
    except (TypeError, ValueError):
        parameters = []
    double = str(place_of([*module.parameters(), *module.buffers()])[1]) == "torch.float64"
    specs = []
    for index, (name, leaf) in enumerate(rows.named()):
        label = parameters[index] if index < len(rows.args) and index < len(parameters) else name
        # the name of a numpy type says nothing of the order of its bytes, which is the example's alone
        dtype = leaf.dtype.name if isinstance(leaf, np.ndarray) else str(leaf.dtype).removeprefix("torch.")
        if "float" in dtype:
            dtype = "float64" if double else "float32"
        specs.append(InputSpec(label, dtype, (-1, *leaf.shape[1:])))
    return tuple(specs)
