"""What differs from pass to pass in what a network draws: a rate may, but not which draws there are."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from torch import nn

from mcdrop.errors import UncontrolledDraw
from mcdrop.mixing import read_after
from mcdrop.record import Draw, Recorder, Spy

__all__ = ["leaving_off", "random_rates"]


def random_rates(
    module: nn.Module, first: tuple[Recorder, Spy], others: Sequence[tuple[Recorder, Spy]]
) -> frozenset[int]:
    """Gives the dropouts whose rate differs from pass to pass, by their place among the draws.

    Raises:
        UncontrolledDraw: the draws themselves differ, so that none can be told from the next.
    """
    draws = first[0].draws
    rates, ours = set(), [(draw.kind, draw.shape) for draw in draws]
    for other, spy in others:
        theirs = [(draw.kind, draw.shape) for draw in other.draws]
        if theirs != ours:
            same = next(i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
            if _counted(draws[same:], other.draws[same:]):
                raise UncontrolledDraw(_routed([draws, *(one.draws for one, _ in others)]))
            number = read_after(first[1].results, spy.results) or same  # the one that tells need not be the latest
            off = leaving_off(module, draws[number - 1].path) if number else ""
            raise UncontrolledDraw(
                f"which random numbers a pass draws is random itself, after draw {number} of it: draw all in every "
                f"pass, and use them where they are wanted{off}"
            )
        rates |= {i for i, (a, b) in enumerate(zip(draws, other.draws, strict=True)) if a.p != b.p}
    return frozenset(rates)


def leaving_off(module: nn.Module, path: str) -> str:
    """Says how a draw of the module at a path is left off, after what else would help; its flag need not rule it."""
    name = path or "the root module"
    if module.get_submodule(path).training:
        return (
            ", or set its rate to 0 where the network is built (layerdrop=0 or the like), or leave all draws of "
            f"{name} itself off: exclude={[path]}"
        )
    return (
        f"; the draw of {name} does not go by its training flag, so exclude leaves it on: set its rate to 0 where the "
        "network is built (layerdrop, layer_dropout or the like)"
    )


def _counted(ours: Sequence[Draw], theirs: Sequence[Draw]) -> bool:
    """Whether the first draws that differ are one draw for other numbers of entries."""
    if not ours or not theirs or not ours[0].shape or not theirs[0].shape:
        return False
    one, other = ours[0], theirs[0]
    return (one.kind, one.path, one.shape[1:]) == (other.kind, other.path, other.shape[1:])


def _routed(passes: Iterable[Sequence[Draw]]) -> str:
    """Says which modules draw for other numbers of entries from pass to pass."""
    each: list[dict[str, list[tuple[int, ...]]]] = []
    for draws in passes:
        each.append({})
        for draw in draws:
            each[-1].setdefault(draw.path, []).append(draw.shape)
    known = dict.fromkeys(path for one in each for path in one)
    paths = [path for path in known if any(one.get(path) != each[0].get(path) for one in each)]
    return (
        "for how many entries a pass draws is random itself, as where tokens are routed to experts by what was dropped "
        f"before: draw for all tokens at once, or leave these draws off: exclude={paths}"
    )
