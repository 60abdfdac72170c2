"""One pass of a shadow with some training flags on: what it draws, gives and leaves, and whose flag it reads."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from mcdrop.forward import out_of_memory
from mcdrop.one_order import apart, repeats
from mcdrop.outputs import Pick
from mcdrop.record import Draw, record
from mcdrop.rows import Rows
from mcdrop.shadow import takes_masks
from mcdrop.volatile import Left

__all__ = ["Observation", "Observer", "Readers", "altered", "same", "steady", "unwatched", "watched"]

_LOOKS_UP = nn.Module.__getattr__.__code__

Readers = dict[int, list[bool]]


class _Flags(dict[str, Any]):
    """A module's submodules, where torch looks for the training flag once it is no attribute: notes who asks for it.

    Classes stay as they are, since a forward may go by them.
    """

    owner: nn.Module
    training: bool
    readers: Readers
    plain: dict[str, Any]

    def __contains__(self, name: object) -> bool:
        """Has the flag where the module looks an attribute up; not where it sets one."""
        if name == "training" and sys._getframe(1).f_code is _LOOKS_UP:
            return True
        return super().__contains__(name)

    def __missing__(self, name: str) -> bool:
        """Gives the flag, and notes whether its owner asks by itself."""
        if name != "training":
            raise KeyError(name)
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__getattr__" and frame.f_back is not None:
            frame = frame.f_back
        self.readers.setdefault(id(self.owner), []).append(frame.f_locals.get("self") is self.owner)
        return self.training


def watched(children: Iterable[nn.Module], readers: Readers) -> list[nn.Module]:
    """Has modules note in ``readers`` that their ``training`` is read, and whether by themselves; gives those that do.

    A flag that is set anew is a plain attribute again, and none that is noted.
    """
    found = [child for child in children if "training" in child.__dict__]
    for child in found:
        flags = _Flags(child._modules)
        flags.owner, flags.training, flags.readers, flags.plain = child, child.training, readers, child._modules
        child.__dict__["_modules"] = flags
        del child.__dict__["training"]
    return found


def unwatched(children: Iterable[nn.Module]) -> None:
    """Takes away what was added to modules, and makes their flags what they were."""
    for child in children:
        flags = child.__dict__["_modules"]
        assert isinstance(flags, _Flags)
        child.__dict__.update(training=flags.training, _modules=flags.plain)


@contextmanager
def _noting(module: nn.Module, readers: Readers) -> Iterator[None]:
    """Collects whose ``training`` is read, by id, and of each time whether by itself; what is added is taken away."""
    children = watched(module.modules(), readers)
    try:
        yield
    finally:
        unwatched(children)


@dataclass(frozen=True)
class Observation:
    """What was seen of one pass.

    ``rates`` are kind, rate and module of each draw, ``values`` all tensors that came out, ``picked`` the one that is
    read (None where nothing is found); ``changed`` are attributes, as (module, name). ``readers`` are those of
    ``Observer``; ``escaped`` are the draws that no rule controls, as (module, operation); ``by_values`` says whether
    values, or how many they are, may have told the way. ``again`` runs such a pass anew.
    """

    draws: int
    rates: tuple[tuple[str, float, str], ...]
    structure: tuple[Any, ...]
    values: list[Tensor]
    picked: Tensor | None
    written: frozenset[str]
    changed: frozenset[tuple[str, str]]
    readers: Readers
    escaped: tuple[tuple[str, str], ...]
    by_values: bool
    again: Callable[[], "Observation"]


_Read = Callable[[Observation], list[Tensor]]


def same(one: Observation, other: Observation, values: _Read | None = None) -> bool:
    """Whether two passes gave the same numbers, or ``values`` of them, but for the order of sums."""
    return not apart(one, other, (one.again, other.again), values or _values)


def steady(first: Observation, *, looks: int) -> bool:
    """Whether passes like a first one give the same numbers each time, but for the order of sums."""
    return repeats(first, first.again, _values, looks=looks)


def _values(seen: Observation) -> list[Tensor]:
    return seen.values


def altered(seen: Observation, base: Observation) -> str:
    """Says what a pass in training mode writes to or changes and one in eval does not; empty where there is nothing."""
    written, changed = seen.written - base.written, seen.changed - base.changed
    if written:
        return f"writes to {', '.join(sorted(written))} in training mode"
    return f"changes its attribute {min(changed)[1]} in training mode" if changed else ""


class Observer:
    """Runs passes of a shadow, all from the same start; flags are off but for those that are asked for.

    ``readers`` are the ids of the modules whose flag the latest pass read, also where it failed, and of each time
    whether the module did so by itself; without ``notes`` there are none, and flags are plain attributes as ever.
    """

    def __init__(self, module: nn.Module, rows: Rows, pick: Pick) -> None:
        """Takes a shadow, and rows on its device."""
        self.module, self._rows, self._pick = module, rows, pick
        self.readers: Readers = {}
        self.notes = True

    def base(self, seed: int, on: Collection[nn.Module] = ()) -> Observation:
        """Gives a first pass; a network that needs its flag as an attribute is looked at without notes from then on."""
        try:
            return self.observe(on, seed=seed)
        except (KeyError, AttributeError):
            self.notes = False
            return self.observe(on, seed=seed)

    def observe(
        self, on: Collection[nn.Module], *, seed: int, drawn: list[Draw] | None = None, low: Collection[str] = ()
    ) -> Observation:
        """Gives a pass with some flags on; ``drawn`` takes its draws, also where it fails.

        Draws of the modules in ``low`` get the lowest numbers.
        """
        again = partial(self.observe, (*on,), seed=seed, low=low)
        with self._started(on):
            return self._seen(again, seed, drawn, low)

    def goes_on(self, on: Collection[nn.Module], *, seed: int) -> bool:
        """Whether a pass that goes on from what one before it left gives other numbers under the same draws."""

        def both() -> list[Observation]:
            with self._started(on):
                return [self._seen(partial(again, place), seed, None, ()) for place in range(2)]

        def again(place: int) -> Observation:
            return both()[place]

        first, second = both()
        return not same(first, second)

    def attempt(self, on: Collection[nn.Module], drawn: list[Draw], *, seed: int) -> Observation | None:
        """Gives a pass of flags that may not go together; None where it fails."""
        try:
            return self.observe(on, seed=seed, drawn=drawn)
        except Exception as error:
            if out_of_memory(error):
                raise
            return None

    def counts(self, seen: Observation, base: Observation) -> bool:
        """Whether all that a pass in training mode leaves, and one in eval does not, are whole numbers."""
        changed = seen.changed - base.changed
        kinds = {type(vars(self.module.get_submodule(path)).get(name)) for path, name in changed}
        return kinds == {int} and seen.written <= base.written

    @contextmanager
    def _started(self, on: Collection[nn.Module]) -> Iterator[None]:
        """Switches some flags on, and puts back what passes leave."""
        kept, left = [(child, dict(child.__dict__)) for child in self.module.modules()], Left(self.module)
        try:
            for child in on:
                child.training = True
            yield
        finally:
            for child, attributes in kept:  # counters and the like: passes start where the user's module is
                child.__dict__.update(attributes)  # never empty: other threads may run a captured graph meanwhile
                for name in child.__dict__.keys() - attributes.keys():
                    del child.__dict__[name]
            left.put_back()
            for child in on:  # where it is no plain attribute
                child.training = False

    def _seen(
        self, again: Callable[[], Observation], seed: int, drawn: list[Draw] | None, low: Collection[str]
    ) -> Observation:
        before, raw = _attributes(self.module), list[Any]()

        def keep(result: Any) -> Tensor:
            raw.append(result)
            return next(leaf for leaf in _flat(result)[0] if isinstance(leaf, Tensor))

        self.readers = {}
        with _noting(self.module, self.readers) if self.notes else nullcontext():
            source, spy = record(self.module, self._rows, keep, seed=seed, draws=drawn, low=low)
        leaves, spec = _flat(raw[0])
        values = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        structure = (str(spec), *((tuple(value.shape), value.dtype) for value in values))
        changed = frozenset(key for key, value in _attributes(self.module).items() if before.get(key) != value)
        try:
            picked = self._pick(raw[0])
        except Exception:  # in training mode it may return something else
            picked = None
        rates = tuple((draw.kind, draw.p, draw.path) for draw in source.draws)
        draws = len(source.draws) + len(spy.escaped)
        return Observation(
            draws, rates, structure, values, picked, frozenset(spy.written), changed, self.readers,
            tuple(spy.escaped), spy.by_values, again,
        )  # fmt: skip


def _flat(result: Any) -> tuple[list[Any], Any]:
    """Gives what a network returned as a list, and how it was nested; of an object unknown to torch, its values."""
    leaves, spec = _pytree.tree_flatten(result)
    known = any(isinstance(leaf, Tensor) for leaf in leaves) or not hasattr(result, "__dict__")
    return (leaves, spec) if known else _pytree.tree_flatten(vars(result))


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Plain values that modules keep about themselves, such as step counters; rates of dropout show in its draws."""
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in child.__dict__.items()
        if isinstance(value, bool | int | float | str)
        and name != "training"
        and not (name == "p" and takes_masks(child))
    }
