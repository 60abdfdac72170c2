"""One forward pass seen from outside: what it draws, what escapes control, what it writes to."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mcdrop.forward import forward
from mcdrop.generators import Noted, made_since, noting, out_of_sight, own_generator
from mcdrop.intercept import Interception
from mcdrop.masks import Site, sample_masks
from mcdrop.mixing import NUMBERS_READ, Result, result_of
from mcdrop.outputs import Pick
from mcdrop.reach import held
from mcdrop.rewound import rewinding
from mcdrop.rows import Rows
from mcdrop.rules import RULES
from mcdrop.standing import kept_tensors, memory_of
from mcdrop.volatile import Left
from mcdrop.written import own_tensor_dicts

__all__ = [
    "ALL_HIGH",
    "ALL_LOW",
    "Draw",
    "Recorder",
    "Spy",
    "caller",
    "draws",
    "extreme",
    "module_paths",
    "nowhere",
    "record",
]


ALL_LOW, ALL_HIGH = -1, -2  # in place of a seed: all is dropped and numbers are as small as can be, or the opposite
_EXTREMES = {
    ALL_LOW: {"bernoulli": 0.0, "uniform": 0.0, "normal": -3.0},
    ALL_HIGH: {"bernoulli": 1.0, "uniform": 1 - 2.0**-24, "normal": 3.0},
}


def extreme(kind: str, which: int) -> float:
    """Gives the number that a kind of draw has everywhere in a pass that is ``ALL_LOW`` or ``ALL_HIGH``."""
    return _EXTREMES[which][kind]


_READ = {"_local_scalar_dense.default", *(f"Tensor.{read.__name__}" for read in NUMBERS_READ)}


@dataclass(frozen=True)
class Draw:
    """One draw as the forward pass asked for it."""

    kind: str
    shape: tuple[int, ...]
    p: float
    path: str


def module_paths(module: nn.Module) -> dict[int, str]:
    """Maps the id of every module of a tree to its path."""
    return {id(child): path for path, child in module.named_modules()}


def caller(paths: dict[int, str]) -> str:
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

    lift: Tensor | None = None

    def __init__(
        self, paths: dict[int, str], device: torch.device, *, seed: int | None, force: Callable[[str], bool],
        low: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Takes the module paths; with ``seed=None`` every draw gets its expectation, with an extreme one the same.

        Draws of the modules in ``low`` get the lowest numbers.

        ``force`` says of a module path whether a dropout call there that is switched off drops all the same.
        """
        self.draws: list[Draw] = []
        self.lanes: list[str] = []  # paths of draws that are others in each lane of a vmap
        self.off: list[str | None] = []
        self.forced: set[int] = set()
        self._paths = paths
        self._device = device
        self._seed, self._low = seed, low
        self._force = force

    def draw(self, kind: str, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Notes the draw and gives numbers of its whole shape."""
        site = Site(f"site{len(self.draws)}", shape, p, kind)
        self.draws.append(Draw(kind, shape, p, caller(self._paths)))
        if _differs_in_vmap():
            self.lanes.append(self.draws[-1].path)
        if self._seed is None:
            return None
        seed = ALL_LOW if self.draws[-1].path in self._low else self._seed
        if seed in _EXTREMES:
            return torch.full(shape, extreme(kind, seed)).to(self._device)
        return torch.as_tensor(np.asarray(sample_masks([site], 1, seed=self._seed)[site.name][0])).to(self._device)

    def forces(self, p: float) -> bool:
        """Notes a dropout call that is switched off."""
        path = caller(self._paths)
        self.off.append(path if p > 0 else None)
        if p > 0 and self._force(path):
            self.forced.add(len(self.off) - 1)
            return True
        return False


def _differs_in_vmap() -> bool:
    """Whether this is inside of a ``torch.vmap`` of the network's own whose lanes draw other numbers each."""
    inner = torch._C._functorch.peek_interpreter_stack()
    if inner is None or inner.key() != torch._C._functorch.TransformType.Vmap:
        return False
    lanes = torch._C._functorch.CVmapInterpreterPtr(inner).randomness()
    return bool(lanes == torch._C._functorch.RandomnessType.Different)


@dataclass(repr=False)  # torch writes a mode into its errors
class Spy(TorchDispatchMode):
    """Notes random operations that no rule caught and the size of each result; diverts a write to a watched tensor."""

    paths: dict[int, str]
    watched: dict[int, str]
    escaped: list[tuple[str, str]] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    swapped: set[str] = field(default_factory=set)
    rewound: set[str] = field(default_factory=set)
    results: list[Result] = field(default_factory=list)
    generators: Noted = field(default_factory=list)
    drawn: Callable[[], int] = int

    def __post_init__(self) -> None:
        """Sets up the mode itself."""
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Looks at one operation and runs it."""
        kwargs = kwargs or {}
        given = named(func, args, kwargs)
        if draws(func, args, kwargs):
            self.escaped.append((caller(self.paths), str(func).removeprefix("aten.")))
        diverted = {name: value.clone() for name, value in given.items() if self._is_write(func, given, name, value)}
        if diverted:
            names = [argument.name for argument in func._schema.arguments]
            args = tuple(diverted.get(name, value) for name, value in zip(names, args, strict=False))
            kwargs = {name: diverted.get(name, value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        arguments = [*args, *kwargs.values()]
        self.note(str(func).removeprefix("aten."), result, arguments, counted=_counts(func, arguments))
        return result

    def note(self, name: str, result: Any, given: Sequence[Any], *, counted: bool = False) -> None:
        """Notes what an operation made; of several values the first tells what it was made of."""
        for place, value in enumerate(result if isinstance(result, tuple | list) else (result,)):
            if not isinstance(value, Tensor) or memory_of(value) not in self.watched:
                taken = () if place else given
                self.results.append(result_of(name, value, taken, drawn=self.drawn(), counted=counted))

    @property
    def by_values(self) -> bool:
        """Whether numbers were read out of torch, or sizes follow from values: others may go another way."""
        return any(one.counted or one.name in _READ for one in self.results)

    def _is_write(self, func: Any, given: dict[str, Any], name: str, value: Any) -> bool:
        """Whether an operation writes to this argument and it is watched; then it gets a copy to write to."""
        if not isinstance(value, Tensor) or not value.numel():
            return False
        owner = self.watched.get(memory_of(value) or 0)
        if owner is None:
            return False
        said = any(
            a.name == name and a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        )
        # batch norm's own kernels write to the running statistics without saying so in their schema
        unsaid = "batch_norm" in str(func) and bool(given.get("training")) and name in ("running_mean", "running_var")
        if said or unsaid:
            self.written.add(owner)
        return said or unsaid


def _counts(func: Any, given: Sequence[Any]) -> bool:
    """Whether the size of what an operation gives follows from values; by index only from what is true and false."""
    if torch.Tag.dynamic_output_shape not in getattr(func, "tags", ()):
        return False
    if func is not torch.ops.aten.index.Tensor:
        return True
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in given[1])


def draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws from a torch generator.

    Attention and, on a GPU, recurrent layers are tagged so even where their rate is 0 or their dropout is off.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    defaults = {one.name: one.default_value for one in func._schema.arguments if one.has_default_value()}
    given = defaults | named(func, args, kwargs)
    rate = given.get("dropout_p", given.get("dropout"))
    return rate is None or bool(rate and given.get("train", True))


def named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the arguments of an operation by name."""
    return {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}


def watched(module: nn.Module) -> dict[int, str]:
    """Maps the storage address of every parameter, buffer and plain attribute to its name."""
    state = (*kept_tensors(module), *module.named_buffers(), *module.named_parameters())  # of a view, its base
    return {place: name for name, tensor in state if tensor.numel() and (place := memory_of(tensor)) is not None}


def nowhere(path: str) -> bool:
    """Forces nothing."""
    return False


def _readings(spy: Spy) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Rules that note when numbers are read out of torch."""

    def rule_of(function: Callable[..., Any]) -> Callable[..., Any]:
        def rule(mode: Interception, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            spy.note(f"Tensor.{function.__name__}", None, [tensor])
            return function(tensor, *args, **kwargs)

        return rule

    return {function: rule_of(function) for function in NUMBERS_READ}


def record(
    module: nn.Module, rows: Rows, pick: Pick, *, seed: int | None, force: Callable[[str], bool] = nowhere,
    draws: list[Draw] | None = None, low: Collection[str] = (), rewinds: bool = False,
) -> tuple[Recorder, Spy]:  # fmt: skip
    """Runs one pass and gives what it drew, also in ``draws`` where it fails, and what the spy saw.

    Only with ``rewinds``, which takes twice as long, it sees where states of generators are put back.
    """
    paths, leaf = module_paths(module), rows.leaves[0]

    def watch(drawn: list[Draw], pick: Pick) -> tuple[Recorder, Spy, Callable[[], bool]]:
        source = Recorder(paths, leaf.device, seed=seed, force=force, low=low)
        source.draws = drawn

        def count() -> int:
            return len(drawn) if any(draw.kind != "bernoulli" or draw.p for draw in drawn) else 0

        spy = Spy(paths, watched(module), drawn=count)
        rules = noting({**RULES, **_readings(spy)}, spy.generators)

        def run() -> bool:
            seen = rewinding(lambda: len(drawn), lambda: spy.rewound.add(caller(paths))) if rewinds else nullcontext()
            places = own_tensor_dicts(module, spy.written, spy.swapped, spy.tied)
            with places, spy, Interception(source, rules), seen:
                forward(module, rows, pick)
            return bool(spy.escaped)

        return source, spy, run

    def again() -> None:
        left = Left(module)
        try:
            watch([], lambda result: leaf)[2]()
        finally:
            left.put_back()

    stays = [*kept_tensors(module)]  # where a forward sets others, so that none of these takes the memory of one
    source, spy, run = watch([] if draws is None else draws, pick)
    with own_generator():
        before = held(module)
        spy.escaped += [("", name) for name in (*out_of_sight(run, again), *made_since(before, module))]
    spy.escaped += [(path, "a draw in torch.vmap with randomness='different'") for path in source.lanes]
    del stays
    return source, spy
