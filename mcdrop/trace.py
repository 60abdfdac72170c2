"""One forward pass seen from outside: which draws it makes, which axis follows the rows, what escapes control."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mcdrop.intercept import Given, Interception, Layout
from mcdrop.masks import Site, sample_masks
from mcdrop.outputs import Pick
from mcdrop.rows import Rows

__all__ = [
    "Draw",
    "Layouts",
    "NoOverride",
    "StateWrite",
    "Trace",
    "forward",
    "one_pass",
    "record",
    "to_tensors",
    "trace",
]

Layouts = Sequence[Layout | None]

_FEW, _MORE = 3, 5  # two row counts; what differs between their draws is the axis of the rows


@dataclass(frozen=True)
class Draw:
    """One draw as the forward pass asked for it."""

    kind: str
    shape: tuple[int, ...]
    p: float
    path: str


@dataclass(frozen=True)
class Trace:
    """What one forward pass of an input signature does.

    ``unclear`` names the draws whose axis of the rows could not be told; ``escaped`` lists (module, operation) of draws
    that no rule controls; ``row_bytes`` is the largest result of one operation, in bytes a row.
    """

    sites: tuple[Site, ...]
    layouts: tuple[Layout | None, ...]
    unclear: tuple[str, ...]
    escaped: tuple[tuple[str, str], ...]
    row_bytes: int


class StateWrite(Exception):
    """A forward pass was about to write to a parameter or buffer; it was stopped before it did."""

    def __init__(self, name: str) -> None:
        """Takes the name of the tensor."""
        super().__init__(name)
        self.name = name


def one_pass(module: nn.Module, rows: Rows, pick: Pick, layouts: Layouts, masks: Sequence[Tensor | None]) -> Tensor:
    """Runs one pass with given masks, one for each draw, and gives the picked output, (N, ...)."""
    with Interception(Given(masks, layouts)):
        return forward(module, rows, pick)


def to_tensors(rows: Rows, module: nn.Module) -> Rows:
    """Gives fresh tensors on the module's device, floating leaves in the module's floating type."""
    state = [*module.parameters(), *module.buffers()]
    device = state[0].device if state else torch.device("cpu")
    dtype = next((t.dtype for t in state if t.is_floating_point()), torch.get_default_dtype())

    def convert(leaf: Any) -> Tensor:
        tensor = leaf if isinstance(leaf, Tensor) else torch.as_tensor(np.asarray(leaf))
        # always a copy: a network may write to its input, and the input is the user's
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    return rows.map(convert)


def forward(module: nn.Module, rows: Rows, pick: Pick) -> Tensor:
    """Runs the module on its own copy of the rows and gives the picked output, (N, ...)."""
    args = tuple(leaf.clone() for leaf in rows.args)
    kwargs = {name: leaf.clone() for name, leaf in rows.kwargs.items()}
    output = pick(module(*args, **kwargs))
    return output.unsqueeze(-1) if output.dim() == 1 else output


def module_paths(module: nn.Module) -> dict[int, str]:
    """Maps the id of every module of a tree to its path."""
    return {id(child): path for path, child in module.named_modules()}


def _caller(paths: dict[int, str]) -> str:
    """The innermost module of the tree on the Python stack: who draws. Needs no hook on anybody's module."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            return paths[id(owner)]
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class Recorder:
    """A source that notes every draw and answers it from a seed, or with expectations."""

    def __init__(self, paths: dict[int, str], device: torch.device, *, seed: int | None) -> None:
        """Takes the module paths; with ``seed=None`` every draw gets its expectation."""
        self.draws: list[Draw] = []
        self._paths = paths
        self._device = device
        self._seed = seed

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Notes the draw and gives numbers of its whole shape."""
        site = Site(f"site{len(self.draws)}", shape, p, kind)
        self.draws.append(Draw(kind, shape, p, _caller(self._paths)))
        if self._seed is None:
            return None
        return torch.from_numpy(sample_masks([site], 1, seed=self._seed)[site.name][0]).to(self._device)


@dataclass
class Spy(TorchDispatchMode):
    """Notes random operations that no rule caught and the sizes of results; stops a write to a watched tensor."""

    paths: dict[int, str]
    watched: dict[int, str]
    escaped: list[tuple[str, str]] = field(default_factory=list)
    largest: int = 0

    def __post_init__(self) -> None:
        """Sets up the mode itself."""
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Looks at one operation and runs it."""
        kwargs = kwargs or {}
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        if _draws(func, given):
            self.escaped.append((_caller(self.paths), str(func).removeprefix("aten.")))
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._refuse_write(value)
        # batch norm's own kernels write to the running statistics without saying so in their schema
        if "batch_norm" in str(func) and given.get("training") and isinstance(given.get("running_mean"), Tensor):
            self._refuse_write(given["running_mean"])
        result = func(*args, **kwargs)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.watched:
                self.largest = max(self.largest, value.numel() * value.element_size())
        return result

    def _refuse_write(self, tensor: Tensor) -> None:
        name = self.watched.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if name is not None:
            raise StateWrite(name)


def _draws(func: Any, given: dict[str, Any]) -> bool:
    """Whether an operation draws from a torch generator; attention is tagged so even with a rate of 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    return "scaled_dot_product" not in str(func) or bool(given.get("dropout_p"))


class _Foreign:
    """Notices draws from Python's and numpy's global generators."""

    def __init__(self) -> None:
        self._before = self._state()

    @staticmethod
    def _state() -> tuple[Any, Any]:
        # read only, to see whether it moved
        numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
        return random.getstate(), repr(numpy["state"]["pos"]) + numpy["state"]["key"].tobytes().hex()

    def moved(self) -> list[tuple[str, str]]:
        python, numpy = (a != b for a, b in zip(self._before, self._state(), strict=True))
        return [("", name) for name, moved in (("Python's random", python), ("numpy.random", numpy)) if moved]


@contextmanager
def own_generator() -> Iterator[None]:
    """Leaves torch's global generators as they were, whatever escapes control inside."""
    with torch.random.fork_rng(), torch.no_grad():
        yield


def watched(module: nn.Module) -> dict[int, str]:
    """Maps the storage address of every parameter and buffer to its name."""
    state = (*module.named_parameters(), *module.named_buffers())
    return {tensor.untyped_storage().data_ptr(): name for name, tensor in state if tensor.numel()}


def record(
    module: nn.Module, rows: Rows, pick: Pick, *, seed: int | None
) -> tuple[Tensor, list[Draw], Spy, list[tuple[str, str]]]:
    """Runs one pass: its output, its draws, what the spy saw, and draws from foreign generators."""
    paths = module_paths(module)
    leaf = next(leaf for _, leaf in rows.named())
    source, spy, foreign = Recorder(paths, leaf.device, seed=seed), Spy(paths, watched(module)), _Foreign()
    with own_generator(), spy, Interception(source):
        output = forward(module, rows, pick)
    return output, source.draws, spy, foreign.moved()


def repeat_rows(rows: Rows, count: int) -> Rows:
    """Gives ``count`` rows, the given ones over and over."""
    return rows.take(torch.arange(count, device=next(leaf for _, leaf in rows.named()).device) % rows.count)


def trace(module: nn.Module, rows: Rows, pick: Pick) -> Trace:
    """Finds the draws of one input signature and the axis of each that follows the rows.

    The module runs on three and on five rows: the axis whose size differs is the rows' axis, and what is left of it
    when it is divided by the rows (such as attention heads) belongs to one row. A draw that does not differ (a
    weight's) is shared by all rows.
    """
    _, few, spy, foreign = record(module, repeat_rows(rows, _FEW), pick, seed=0)
    try:
        _, more, _, _ = record(module, repeat_rows(rows, _MORE), pick, seed=0)
    except (RuntimeError, ValueError, IndexError, AssertionError):  # a network that is built for one batch size
        more = []
    sites, layouts, unclear = [], [], []
    for index, draw in enumerate(few):
        other = more[index].shape if len(more) == len(few) else None
        layout, clear = _layout(draw.shape, other)
        shape = draw.shape if layout is None else layout.unit_shape(draw.shape)
        sites.append(Site(f"site{index}", shape, draw.p, draw.kind, draw.path))
        layouts.append(layout)
        if not clear:
            unclear.append(f"site{index}")
    return Trace(tuple(sites), tuple(layouts), tuple(unclear), (*spy.escaped, *foreign), -(-spy.largest // _FEW))


def _layout(few: tuple[int, ...], more: tuple[int, ...] | None) -> tuple[Layout | None, bool]:
    """The layout of a draw from its shapes for three and five rows, and whether they tell it."""
    if more is None or len(more) != len(few):
        return None, False
    differing = [axis for axis, (a, b) in enumerate(zip(few, more, strict=True)) if a != b]
    if not differing:
        return None, True
    axis = differing[0]
    if len(differing) > 1 or few[axis] % _FEW or few[axis] // _FEW * _MORE != more[axis]:
        return None, False
    return Layout(axis, few[axis] // _FEW), True


class NoOverride(TorchFunctionMode):
    """Changes nothing, but keeps torch off its fused paths, so that eval runs what the passes run."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function."""
        return func(*args, **(kwargs or {}))
