"""Generators of random numbers: which move out of sight, what stays as it was, which are seeded in every pass.

Global generators are one for the whole process, and other threads may draw from them at any time. Only what a network
draws itself says something of it, and only that is put back: else numbers of the other threads would come twice. Those
that code keeps for itself are found by what it can reach.
"""

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mcdrop.intercept import Interception
from mcdrop.reach import MOST, Held, reached

__all__ = [
    "Noted", "doubted", "known", "made_since", "moved_on", "noting", "out_of_sight", "own_generator", "stepped",
    "with_private",
]  # fmt: skip

Noted = list[tuple[torch.Generator, Tensor]]  # generators that draws were given, with their states then

_TRIES = 8  # others draw in all of so many passes, and in no wait twice as long, less than once in a million times
_MOST = 20  # where others draw
_SECONDS = 0.002  # the shortest wait
_NEW = 10_000  # objects behind what a pass leaves, which are looked through in each one
_TOO_MUCH = "holds more objects than are looked through for generators of its own; others may draw out of sight"


class _Access(NamedTuple):
    """How a generator is read, put back, and moved on by a number."""

    state: Callable[[], Any]
    put_back: Callable[[Any], None]
    step: Callable[[], object]


def _torch_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_torch(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


_TORCH = "torch's generator in another thread"  # in this one its operations are seen
_GLOBAL = {
    "Python's random": _Access(random.getstate, random.setstate, random.random),
    "numpy.random": _Access(
        lambda: np.random.get_state(legacy=False),  # noqa: NPY002
        np.random.set_state,
        np.random.random_sample,
    ),
    _TORCH: _Access(_torch_state, _set_torch, lambda: torch.rand(1, device="cpu")),
}
_PRIVATE: dict[type, Callable[[Any], _Access]] = {
    random.Random: lambda one: _Access(one.getstate, one.setstate, one.random),
    np.random.RandomState: lambda one: _Access(lambda: one.get_state(legacy=False), one.set_state, one.random_sample),
    np.random.Generator: lambda one: _of_words(one.bit_generator),
    np.random.BitGenerator: lambda one: _of_words(one),
}


def _of_words(one: Any) -> _Access:
    return _Access(lambda: one.state, lambda state: setattr(one, "state", state), one.random_raw)


@dataclass
class _Own:
    """The generators that are known in an ``own_generator``, as they were before it, by name.

    ``kept`` are those that code keeps for itself, ``drawn`` those that its network draws from, ``doubted`` those where
    nobody knows.
    """

    known: dict[str, _Access]
    before: dict[str, Any]
    kept: list[Any]
    drawn: set[str] = field(default_factory=set)
    doubted: set[str] = field(default_factory=set)


_NOW = threading.local()  # its ``own`` are those of this thread, the innermost last


def known() -> dict[str, _Access]:
    """Gives the generators that are known in this ``own_generator``, by what they are called."""
    return _NOW.own[-1].known  # type: ignore[no-any-return]


def with_private(module: nn.Module, *, most: int = MOST) -> list[str]:
    """Lets this ``own_generator`` know those of numpy and Python that a network's code keeps for itself by now.

    Says so where the network holds too much to be looked through.
    """
    own, found = _NOW.own[-1], reached(module, tuple(_PRIVATE), most=most)
    for one in _unknown(found.found):
        if (access := _access(one)) is not None:
            own.kept.append(one)
            number = sum(name.partition(" (")[0] == _called(one) for name in own.known) + 1
            name = f"{_called(one)} ({number})" if number > 1 else _called(one)
            own.known[name], own.before[name] = access, access.state()
    return [] if found.whole else [f"{type(module).__name__} {_TOO_MUCH}"]


def made_since(before: Held, module: nn.Module) -> list[str]:
    """Names the generators that attributes hold which held something else before: each pass begins without them."""
    new = _unknown(reached(module, tuple(_PRIVATE), most=_NEW, since=before).found)
    return [*dict.fromkeys(f"{_called(one)} that a pass makes" for one in new)]


def _unknown(generators: Sequence[Any]) -> list[Any]:
    shared = [getattr(draw, "__self__", None) for draw in (random.random, np.random.random_sample)]
    known = {*map(id, (*shared, *_NOW.own[-1].kept))}
    return [one for one in generators if id(one) not in known]


def _called(generator: Any) -> str:
    kind = type(generator)
    return f"a {kind.__module__.split('._')[0].removesuffix('.mtrand')}.{kind.__name__}"


def _access(generator: Any) -> _Access | None:
    """How a generator is read; None where it has no state, as one of the system, or one that is half made."""
    try:
        access = next(made for kind, made in _PRIVATE.items() if isinstance(generator, kind))(generator)
        access.state()
    except Exception:
        return None
    return access


def stepped(name: str) -> None:
    """Lets a generator be a number further."""
    known()[name].step()


def _states(names: Collection[str]) -> dict[str, Any]:
    return {name: known()[name].state() for name in names}


def _moved(before: Mapping[str, Any]) -> set[str]:
    """Names the generators that stand elsewhere than before."""
    return {name for name, state in _states(before).items() if _told(state) != _told(before[name])}


def _told(state: Any) -> Any:
    """What a state is told by; of torch's the one of the CPU."""
    if isinstance(state, dict):
        return {key: _told(value) for key, value in state.items()}
    if isinstance(state, tuple) and isinstance(state[0], Tensor):
        return state[0].numpy().tobytes()
    return state.tobytes() if isinstance(state, np.ndarray) else state


@contextmanager
def own_generator() -> Iterator[None]:
    """Leaves the generators that a network draws from inside (``out_of_sight``) as they were, and no others."""
    outer: list[_Own] = getattr(_NOW, "own", [])
    own = _Own({**outer[-1].known}, {}, [*outer[-1].kept]) if outer else _Own({**_GLOBAL}, {}, [])
    _NOW.own = [*outer, own]
    own.before |= _states(own.known)
    try:
        with torch.no_grad():
            yield
    finally:
        _NOW.own = outer
        for name in own.drawn:
            own.known[name].put_back(own.before[name])
        for around in outer[-1:]:
            around.drawn |= own.drawn & around.known.keys()
            around.doubted |= own.doubted & around.known.keys()


def doubted(name: str) -> list[str]:
    """Says of which generators nobody could tell in this ``own_generator`` whether a network draws from them."""
    names = sorted(_NOW.own[-1].doubted - _NOW.own[-1].drawn)
    return [f"something else draws from {one} all the time: it cannot be told whether {name} does" for one in names]


def out_of_sight(run: Callable[[], bool], again: Callable[[], object]) -> list[str]:
    """Runs a pass in ``own_generator``, and names those it knows that the pass draws from out of sight.

    ``run`` says whether operations of this thread drew from torch's, and ``again`` runs the same pass once more. Where
    others draw meanwhile, a pass in which nothing moved tells, and a wait without one.
    """
    own, before, began = _NOW.own[-1], _states(known()), time.perf_counter()
    earlier = {name for one in _NOW.own for name in one.drawn}

    def drawn(moved: set[str], again: Callable[[], object]) -> set[str]:
        seconds, new = max(time.perf_counter() - began, _SECONDS), moved - earlier
        return moved & earlier | (_of_the_pass(new, again, seconds) if new else set())

    def once_more() -> None:
        with suppress(Exception):  # as before
            again()

    try:
        seen = {_TORCH} if run() else set()
    except BaseException as error:
        moved = _moved(before)
        own.drawn |= drawn(moved, once_more) if isinstance(error, Exception) else moved & earlier
        raise
    found = drawn(_moved(before) - seen, again)
    own.drawn |= found | seen
    return [name for name in known() if name in found]


def _of_the_pass(moved: set[str], again: Callable[[], object], seconds: float) -> set[str]:
    """Names those of the generators that move in every pass, or are seeded in every one, and in none of the waits."""
    others: set[str] = set()
    ways = {name: {"moves", "is seeded"} for name in moved}
    for number in range(_MOST):
        others |= _meanwhile(moved, 2 * seconds)
        moved = _once_more(moved - (others & {_TORCH}), others, ways, again)
        if not moved & others and (not moved or number + 1 >= _TRIES):
            break
    _NOW.own[-1].doubted |= moved & others
    return moved - others


def _once_more(
    names: set[str], others: set[str], ways: Mapping[str, set[str]], again: Callable[[], object]
) -> set[str]:
    """Names those of some generators that move in another pass, or are seeded anew where no others draw.

    Of the ``ways`` of those from which nobody else draws only the one that they go is left: a network draws alike in
    all passes.
    """
    before = _states(names)
    if names:
        again()
    moved = _moved(before)
    seeded = _seeded({name for name in names - moved - others if "is seeded" in ways[name]}, again)
    for name in names - others:
        ways[name] &= {"moves"} if name in moved else {"is seeded"}
    return {name for name in moved | seeded if name in others or ways[name]}


def _seeded(names: set[str], again: Callable[[], object]) -> set[str]:
    """Names those of some generators that a pass does not leave a number further: it puts them where it always does."""
    before, seeded = _states(names), set[str]()
    for name in names:
        stepped(name)
    further = _states(names)
    if names:
        again()
    for name in names:  # each at once, so that hardly anybody draws between the two
        if _moved({name: further[name]}):
            seeded.add(name)
        else:
            known()[name].put_back(before[name])
    return seeded


def _meanwhile(names: set[str], seconds: float) -> set[str]:
    """Names those of some generators that move without a pass."""
    before = _states(names)
    if names:
        time.sleep(seconds)
    return _moved(before)


def noting(rules: Mapping[Callable[..., Any], Callable[..., Any]], noted: Noted) -> dict[Any, Callable[..., Any]]:
    """Gives the same rules, which note the generator that a draw is given."""

    def noted_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
        def run(mode: Interception, *args: Any, **kwargs: Any) -> Any:
            generator = kwargs.get("generator")
            if generator is not None:
                noted.append((generator, generator.get_state()))
            return rule(mode, *args, **kwargs)

        return run

    return {function: noted_rule(rule) for function, rule in rules.items()}


@contextmanager
def moved_on(noted: Noted) -> Iterator[None]:
    """Lets generators be some numbers further for the while; one that is then found as it was has been seeded anew."""
    before = [(generator, generator.get_state()) for generator, _ in noted]
    for generator, _ in before:
        torch.rand(1, generator=generator, device=generator.device)
    try:
        yield
    finally:
        for generator, state in reversed(before):
            generator.set_state(state)
