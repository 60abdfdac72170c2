"""The only randomness in mcdrop: a mask is a pure function of (seed, site, pass).

Numbers come from Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based
generator: pass ``t`` of a site reads its own stretch of the counter, so passes can be drawn in any order, in any
chunks, on any machine, and are equal to the bit. No global generator is read or moved.

A site's units are laid out in dyadic blocks (edges 0, 1, 16, 32, 64, ...) along each axis, every block with its own
key. So where a shape follows the input (sequence length, image size), the mask of the longer input extends the shorter
one's.

To add a sampler, add one line to ``SAMPLERS``; to add a kind of draw, one to ``KINDS``.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError, UnknownName
from mcdrop.philox import Stream
from mcdrop.samplers import BLOCKS, SAMPLERS, Sampler

__all__ = ["BLOCKS", "KINDS", "SAMPLERS", "SEED_LIMIT", "Site", "draw", "is_whole", "sample_masks"]

SEED_LIMIT = 2**64
_FIRST_EDGE = 16
_UNITS = 2**13  # of small blocks that are drawn together
_SPLIT = 2**14  # of a large one
_ALIGNED = 16  # pieces begin with a multiple of it
_MANY = 2**22  # numbers, above which threads gain more than they lose by waiting for each other in Python

Masks = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Site:
    """One random draw of a network's forward pass.

    ``name`` numbers the draws in order of execution and keys the random stream; ``path`` is the module that draws.
    ``shape`` is the shape of what one pass draws for one row; ``p`` is the share that is dropped (bernoulli only).
    """

    name: str
    shape: tuple[int, ...]
    p: float = 0.5
    kind: str = "bernoulli"
    path: str = ""

    @property
    def constant(self) -> bool:
        """Whether every pass drops, or keeps, all units: also a rate that masks do not tell from 0 or 1."""
        return self.kind == "bernoulli" and _threshold(self.p) in (0, 2**32)


def sample_masks(sites: Sequence[Site], passes: int, *, seed: int, start: int = 0, sampler: str = "iid") -> Masks:
    """Gives the draws of passes ``start`` to ``start + passes``: site name -> (T, ...shape of the site), float32.

    A bernoulli site gives 1 for kept and 0 for dropped units (not rescaled), a uniform one numbers in [0, 1), a normal
    one standard normal numbers.

    >>> site = Site("drop", (4,), 0.5)
    >>> whole = sample_masks([site], 3, seed=7)["drop"]
    >>> tail = sample_masks([site], 2, seed=7, start=1)["drop"]
    >>> bool((whole[1:] == tail).all())
    True

    Raises:
        InputError: what are no sites, a shape that is none, a seed outside 0 to 2**64 - 1, no passes, a first one below
            0, a drop rate outside [0, 1], or an unknown sampler or kind.
    """
    listed = list(sites) if isinstance(sites, Iterable) else [None]
    if not all(isinstance(site, Site) for site in listed):
        raise InputError(f"sites must be a list such as [mcdrop.Site('drop', (4,))], got {sites!r}")
    drawn = {site.name: draw(site, passes, seed=seed, start=start, sampler=sampler) for site in listed}
    return {name: values.astype(np.float32, copy=False) for name, values in drawn.items()}


def draw(site: Site, passes: int, *, seed: int, start: int = 0, sampler: str = "iid", threads: int = 1) -> NDArray[Any]:
    """Gives the draws of one site as ``sample_masks`` does, but kept and dropped units as true and false.

    Many of them are drawn by some ``threads`` at once.

    Raises:
        InputError: as for ``sample_masks``.
    """
    _check(site, passes, seed, start, sampler)
    kind, numbers = KINDS[site.kind], SAMPLERS[sampler]
    if site.constant:
        return np.full((passes, *site.shape), not _threshold(site.p), kind.dtype)
    values: NDArray[Any] = np.empty((passes, *site.shape), kind.dtype)

    def fill(pieces: Sequence[_Piece]) -> None:
        streams = [piece.stream(f"{seed}/{site.name}") for piece in pieces]
        drawn = kind.draw(numbers, streams, start, passes, site.p)
        ends = itertools.accumulate(piece.wanted for piece in pieces)
        for piece, end in zip(pieces, ends, strict=True):
            values[(slice(None), *piece.place)] = drawn[:, end - piece.wanted : end].reshape(passes, *piece.sizes)

    together = _together(itertools.chain.from_iterable(map(_pieces, _blocks(site.shape))))
    _side_by_side(fill, together, 1 if values.size < _MANY else threads)
    return values


def _side_by_side(work: Callable[[Any], None], parts: Iterator[Any], threads: int) -> None:
    """Does a work's parts by so many threads, this one among them; an error in one of them ends all, and is raised.

    Where no further thread can be had, as while Python ends, those that there are do it.
    """
    turn, errors = threading.Lock(), list[BaseException]()

    def following() -> Any:
        with turn:
            return next(parts, None)

    def run() -> None:
        try:
            while not errors and (part := following()) is not None:
                work(part)
        except BaseException as error:  # also an interruption, which reaches the main thread alone
            errors.append(error)

    others = [threading.Thread(target=run, name="mcdrop-masks") for _ in range(threads - 1)]
    try:
        with suppress(RuntimeError):
            for other in others:
                other.start()
        run()
        _join(others)
    except BaseException as error:  # between parts
        errors.append(error)
        _join(others)
    if errors:
        raise errors[0]


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        if thread.ident is not None:  # which was started
            thread.join()


def is_whole(value: object) -> bool:
    """Says whether it is a whole number, of Python or numpy; a truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check(site: Site, passes: int, seed: int, start: int, sampler: str) -> None:
    if not is_whole(seed) or not 0 <= seed < SEED_LIMIT:
        raise InputError(f"seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
    if not is_whole(passes) or passes < 1:
        raise InputError(f"passes must be a whole number above 0, got {passes!r}")
    if not is_whole(start) or not 0 <= start < SEED_LIMIT:
        raise InputError(f"start must be a whole number from 0 to 2**64 - 1, got {start!r}")
    UnknownName.check("sampler", sampler, SAMPLERS)
    UnknownName.check("kind of draw", site.kind, KINDS)
    shape = site.shape if isinstance(site.shape, tuple | list) else (None,)
    if not all(is_whole(size) and size >= 0 for size in shape):
        raise InputError(f"the shape of site {site.name!r} must be whole numbers such as (4,), got {site.shape!r}")
    number = isinstance(site.p, int | float | np.number) and not isinstance(site.p, bool)
    if site.kind == "bernoulli" and not (number and 0 <= site.p <= 1):
        raise InputError(f"the drop rate p of site {site.name!r} must be a number from 0 to 1, got {site.p!r}")


@dataclass(frozen=True)
class _Piece:
    """Units of a dyadic block that follow one another in its stream, or the whole block.

    ``place`` is where they lie, clipped to the shape, and ``extent`` how many there are along each axis if they are not
    clipped; ``block`` is the first unit of the block, of ``units`` in all, and ``first`` their place in its stream.
    """

    place: tuple[slice, ...]
    extent: tuple[int, ...]
    block: tuple[int, ...]
    units: int
    first: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """The extent within the shape."""
        return tuple(part.stop - part.start for part in self.place)

    @property
    def wanted(self) -> int:
        return math.prod(self.sizes)

    @property
    def drawn(self) -> tuple[int, ...]:
        """The extent of what is drawn for them: all rows that are within the shape."""
        return (*self.sizes[:1], *self.extent[1:])

    def stream(self, key: str) -> Stream:
        """Gives their random numbers."""
        drawn, chosen = self.drawn, None
        if self.sizes != drawn:
            chosen = np.arange(math.prod(drawn)).reshape(drawn)[tuple(map(slice, self.sizes))].reshape(-1)
        return Stream(f"{key}/{'.'.join(map(str, self.block))}", self.units, math.prod(drawn), self.first, chosen)


def _pieces(block: _Piece) -> Iterator[_Piece]:
    """Cuts a large block: along its last axes, so that the units of a piece follow one another."""
    if math.prod(block.drawn) <= _SPLIT:
        yield block
        return
    axis, step = _cut(block.extent)
    inner = [math.prod(block.extent[place + 1 :]) for place in range(axis + 1)]
    before = [range(part.start, part.stop) for part in block.place[:axis]]
    for steps in itertools.product(*before, range(block.place[axis].start, block.place[axis].stop, step)):
        ends = [*(one + 1 for one in steps[:-1]), min(steps[-1] + step, block.place[axis].stop)]
        cut = tuple(map(slice, steps, ends))
        extent = (*(part.stop - part.start for part in cut), *block.extent[axis + 1 :])
        first = sum((one - begin) * size for one, begin, size in zip(steps, block.block, inner, strict=False))
        yield _Piece((*cut, *block.place[axis + 1 :]), extent, block.block, block.units, first)


def _cut(extent: Sequence[int]) -> tuple[int, int]:
    """Gives the axis along which a block is cut and the steps of a piece, all of which begin with a multiple of 16."""
    for axis in range(len(extent)):
        inner = math.prod(extent[axis + 1 :])
        whole = _ALIGNED // math.gcd(_ALIGNED, inner)
        if inner <= _SPLIT or whole > 1:
            break
    return axis, max(whole, _SPLIT // inner // whole * whole)


def _together(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Puts pieces into groups: many small ones are drawn in as few calls as a large one."""
    some: list[_Piece] = []
    units = 0
    for piece in pieces:
        if some and units + piece.wanted > _UNITS:
            yield some
            some, units = [], 0
        some.append(piece)
        units += piece.wanted
    if some:
        yield some


def _blocks(shape: tuple[int, ...]) -> Iterator[_Piece]:
    """The dyadic blocks that cover a shape."""
    axes = [list(_edges(size)) for size in shape]
    for parts in itertools.product(*axes):
        place = tuple(slice(low, min(high, size)) for (low, high), size in zip(parts, shape, strict=True))
        extent = tuple(high - low for low, high in parts)
        yield _Piece(place, extent, tuple(low for low, _ in parts), math.prod(extent))


def _edges(size: int) -> Iterator[tuple[int, int]]:
    low, high = 0, 1
    while low < size:
        yield low, high
        low, high = high, max(_FIRST_EDGE, 2 * high)


class Kind(NamedTuple):
    """A kind of draw: the type of its numbers, and what makes them of a sampler's, streams, passes and a rate."""

    dtype: type
    draw: Callable[[Sampler, Sequence[Stream], int, int, float], NDArray[Any]]


def _bernoulli(sampler: Sampler, streams: Sequence[Stream], start: int, passes: int, p: float) -> NDArray[np.bool_]:
    return sampler.kept(streams, start, passes, _threshold(p))


def _threshold(p: float) -> int:
    """Of 32 random bits those below it drop."""
    return round(p * 2**32)


def _uniform(sampler: Sampler, streams: Sequence[Stream], start: int, passes: int, p: float) -> NDArray[np.float32]:
    # 24 bits, so that the largest number is still below 1 in float32
    words = sampler.words(streams, start, passes)
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def _normal(sampler: Sampler, streams: Sequence[Stream], start: int, passes: int, p: float) -> NDArray[np.float32]:
    from scipy.special import ndtri  # here, because ``import mcdrop`` needs numpy alone

    return ndtri((sampler.words(streams, start, passes) + 0.5) * 2.0**-32).astype(np.float32)


KINDS = {
    "bernoulli": Kind(np.bool_, _bernoulli),
    "normal": Kind(np.float32, _normal),
    "uniform": Kind(np.float32, _uniform),
}
