"""A network made ready to be sampled: discovered once, audited, with its task and the shapes of its inputs."""

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mcdrop.audit import Audit
from mcdrop.backends import Backend
from mcdrop.calibration import Calibration
from mcdrop.engine import PassPlan
from mcdrop.errors import InputError, MissingExtra, UnknownName
from mcdrop.intervals import INTERVALS, check_level
from mcdrop.rows import Rows
from mcdrop.screening import Screen
from mcdrop.summaries import TASKS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["InputSpec", "Model", "Options", "wrap", "wrap_graph"]

_EXAMPLE_ROWS = 8


@dataclass(frozen=True)
class Options:
    """What may be asked of a prediction.

    Raises:
        InputError: an option outside its range, or an unknown interval.
    """

    passes: int = 100
    level: float = 0.95
    interval: str = "student_t"
    seed: int = 0
    keep_samples: bool = False
    sampler: str = "balanced"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        """Checks at the door."""
        check_level(self.level)
        if self.interval not in INTERVALS:
            raise UnknownName("interval", self.interval, INTERVALS)
        assert self.plan

    @property
    def plan(self) -> PassPlan:
        """The passes that these options need."""
        keep = self.keep_samples or INTERVALS[self.interval].needs_samples
        return PassPlan(self.passes, self.seed, self.sampler, keep, self.tolerance)


@dataclass(frozen=True)
class InputSpec:
    """One input: its name, its numpy type, and its shape with -1 for the rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A network whose every random draw is a mask; made by ``wrap`` or ``load``, safe to share between threads.

    ``features`` names the columns of a single (N, F) input, or is None. ``module`` is the user's own, untouched.
    """

    module: Any
    backend: Backend
    audit: Audit
    task: str
    inputs: tuple[InputSpec, ...]
    positional: int
    example: Rows
    defaults: Options = Options()
    screen: Screen | None = None
    calibration: Calibration | None = None
    name: str = ""
    version: str = ""
    description: str = ""
    features: list[str] | None = None
    references: dict[Any, Any] = field(default_factory=dict, repr=False)  # scores of the screen's rows, by plan
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def with_screen(self, screen: Screen | None) -> "Model":
        """Gives the same model with a fitted screen."""
        return replace(self, screen=screen, references={}, lock=threading.Lock())

    def with_calibration(self, calibration: Calibration | None) -> "Model":
        """Gives the same model with a calibration; it holds for the passes, seed and weights it was fitted with."""
        audit = replace(self.audit, calibrated=calibration is not None)
        return replace(self, calibration=calibration, audit=audit, references={}, lock=threading.Lock())

    def rows(self, x: Any) -> Rows:
        """Reads inputs and checks them against what the network was wrapped with.

        Raises:
            InputError: unusable rows, unknown or missing names, or a wrong number of axes or columns.
        """
        rows = self._placed(x)
        named = [*rows.named()]
        if len(named) != len(self.inputs):
            raise InputError(f"the network takes {len(self.inputs)} inputs ({self._names()}), got {len(named)}")
        checked = iter([_fit(leaf, spec) for (_, leaf), spec in zip(named, self.inputs, strict=True)])
        return rows.map(lambda leaf: next(checked))

    def _placed(self, x: Any) -> Rows:
        """Puts inputs given by name where the network takes them."""
        if not isinstance(x, Mapping):
            rows = Rows.of(x)
            if rows.kwargs or len(rows.args) == self.positional:
                return rows
            raise InputError(f"the network takes inputs by name: {self._names()}; got {len(rows.args)} without names")
        names = [spec.name for spec in self.inputs]
        if sorted(map(str, x)) != sorted(names):
            raise InputError(f"inputs must be named {', '.join(names)}; got {', '.join(map(str, x)) or 'none'}")
        rows = Rows.of({name: x[name] for name in names})
        leaves = [leaf for _, leaf in rows.named()]
        by_name = dict(zip(names[self.positional :], leaves[self.positional :], strict=True))
        return Rows(tuple(leaves[: self.positional]), by_name, rows.count)

    def _names(self) -> str:
        return ", ".join(spec.name for spec in self.inputs)


def _fit(leaf: Any, spec: InputSpec) -> Any:
    """Checks one leaf against its specification and gives it in the specified type."""
    wanted = ("N", *spec.shape[1:])
    # a real (N, F) input has F columns; longer inputs and token ids may vary in length
    wide = spec.dtype.startswith("float") and leaf.ndim == 2 and leaf.shape[1] != wanted[-1]
    if leaf.ndim != len(spec.shape) or wide:
        got = ("N", *leaf.shape[1:])
        raise InputError(f"input {spec.name!r} must have the shape {_shape(wanted)}, got {_shape(got)}")
    if hasattr(leaf, "detach"):
        return _fit_tensor(leaf, spec)
    if np.dtype(spec.dtype).kind in "iu" and leaf.dtype.kind == "f" and (leaf != np.floor(leaf)).any():
        raise InputError(f"input {spec.name!r} must be whole numbers, got {leaf[leaf != np.floor(leaf)][0]:g}")
    with np.errstate(over="ignore"):
        fitted = leaf.astype(spec.dtype)
    if fitted.dtype.kind == "f" and not np.isfinite(fitted).all():
        raise InputError(f"input {spec.name!r} holds numbers that are too large for {spec.dtype}")
    return fitted


def _fit_tensor(leaf: Any, spec: InputSpec) -> Any:
    """The same for a tensor, which keeps its device and, where it is a real number's, its precision."""
    real = spec.dtype.startswith("float")
    if real == leaf.is_floating_point():
        return leaf
    if real:
        return leaf.double() if spec.dtype == "float64" else leaf.float()
    if bool((leaf != leaf.floor()).any()):
        raise InputError(f"input {spec.name!r} must be whole numbers, got {leaf[leaf != leaf.floor()][0]:g}")
    return leaf.long()


def _shape(axes: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, axes))}{',' if len(axes) == 1 else ''})"


def wrap(
    module: "nn.Module | Model",
    *,
    example: Any,
    task: str = "regression",
    output: str | int | Callable[[Any], Any] | None = None,
    include: Sequence[str | type] = (),
    exclude: Sequence[str | type] = (),
    force_literal: bool = False,
    strict: bool = True,
    memory: int | str = "auto",
) -> Model:
    """Discovers a network's random draws once and gives a model that can be sampled.

    Args:
        module: any ``torch.nn.Module``; it is not modified, and later changes of its weights are seen. Or an ONNX
            graph: a path, a model of onnx or a session of onnxruntime (see ``wrap_graph``).
        example: a few real rows: an array or tensor, a tuple of positional inputs, or a dict of keyword inputs; the
            first dimension of each is the rows.
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

    Raises:
        InputError: an unknown task, or an example that the network cannot take.
        NoStochasticSite: nothing in the network is random.
        UncontrolledDraw: something in it is random and cannot be controlled.
    """
    if isinstance(module, Model) or not hasattr(module, "named_modules"):
        return module if isinstance(module, Model) else wrap_graph(module, example=example, task=task, output=output)
    from mcdrop.backends.torch import TorchBackend  # here, because a model of another backend needs no torch
    from mcdrop.diagnose import diagnose
    from mcdrop.discover import Overrules, discover
    from mcdrop.outputs import picker

    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    rows, pick = Rows.of(example), picker(output)
    rows = rows.take(slice(0, _EXAMPLE_ROWS))
    overrules = Overrules(tuple(include), tuple(exclude), force_literal, strict)
    try:
        found = discover(module, rows, pick, overrules)
    except InputError:
        if not _all_whole(rows):
            raise
        rows = rows.map(lambda leaf: leaf.astype(np.float32) if isinstance(leaf, np.ndarray) else leaf.float())
        found = discover(module, rows, pick, overrules)  # whole numbers may stand for real ones, as in [[1], [2]]
    backend = TorchBackend(found.live, found.plain, pick, found.off, found.force)
    if memory != "auto":
        backend.chunk_bytes = _bytes(memory)
    audit = diagnose(backend, rows, found.audit)
    TASKS[task].statistics.of(backend.deterministic(rows).astype(np.float64)[None])
    return Model(
        module=module, backend=backend, audit=audit, task=task,
        inputs=_specs(module, rows), positional=len(rows.args), example=rows,
    )  # fmt: skip


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
        source: a path, the bytes of a file, a model of onnx or a session of onnxruntime.
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
    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    rows = None if example is None else Rows.of(example).take(slice(0, _EXAMPLE_ROWS))
    found = discover_graph(source, rows, output=output, inject=inject, digest=digest)
    TASKS[task].statistics.of(found.backend.deterministic(found.rows).astype(np.float64)[None])
    leaves = [leaf for _, leaf in found.rows.named()]
    pairs = zip(found.inputs, leaves, strict=True)
    inputs = (InputSpec(one.name, one.dtype, (-1, *leaf.shape[1:])) for one, leaf in pairs)
    return Model(
        module=found.graph, backend=found.backend, audit=found.audit, task=task,
        inputs=tuple(inputs), positional=len(leaves), example=found.rows,
    )  # fmt: skip


def _bytes(memory: int | str) -> int:
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise InputError(f"memory must be 'auto' or a whole number of bytes above 0, got {memory!r}")
    return memory


def _all_whole(rows: Rows) -> bool:
    return all(np.dtype(str(leaf.dtype).removeprefix("torch.")).kind in "iub" for _, leaf in rows.named())


def _specs(module: Any, rows: Rows) -> tuple[InputSpec, ...]:
    """Names positional inputs as the module's forward does."""
    try:
        signature = inspect.signature(module.forward).parameters.values()
        parameters = [parameter.name for parameter in signature if parameter.kind < parameter.VAR_POSITIONAL]
    except (TypeError, ValueError):
        parameters = []
    double = any(str(parameter.dtype) == "torch.float64" for parameter in module.parameters())
    specs = []
    for index, (name, leaf) in enumerate(rows.named()):
        label = parameters[index] if index < len(rows.args) and index < len(parameters) else name
        dtype = str(leaf.dtype).removeprefix("torch.")
        if "float" in dtype:
            dtype = "float64" if double else "float32"
        specs.append(InputSpec(label, dtype, (-1, *leaf.shape[1:])))
    return tuple(specs)
