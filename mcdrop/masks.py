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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError, UnknownName
from mcdrop.samplers import BLOCKS, SAMPLERS, Sampler, Stream

__all__ = ["BLOCKS", "KINDS", "SAMPLERS", "SEED_LIMIT", "Site", "draw", "is_whole", "sample_masks"]

SEED_LIMIT = 2**64
_FIRST_EDGE = 16
_UNITS = 2**13  # of small blocks that are drawn together
_SPLIT = 2**16  # of a large one
_EIGHT = 8  # pieces begin with a multiple of it

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


def draw(site: Site, passes: int, *, seed: int, start: int = 0, sampler: str = "iid") -> NDArray[Any]:
    """Gives the draws of one site as ``sample_masks`` does, but kept and dropped units as true and false.

    Raises:
        InputError: as for ``sample_masks``.
    """
    _check(site, passes, seed, start, sampler)
    kind, numbers = KINDS[site.kind], SAMPLERS[sampler]
    if site.kind == "bernoulli" and site.p in (0, 1):
        return np.full((passes, *site.shape), not site.p, kind.dtype)
    values: NDArray[Any] = np.empty((passes, *site.shape), kind.dtype)
    for some in _together(_blocks(site.shape)):
        drawn: NDArray[Any] = np.empty((passes, sum(block.wanted for block in some)), kind.dtype)
        for streams, part in _parts(f"{seed}/{site.name}", some, drawn):
            part[:] = kind.draw(numbers, streams, start, passes, site.p)
        ends = np.cumsum([block.wanted for block in some])
        for block, part in zip(some, np.split(drawn, ends[:-1], axis=1), strict=True):
            values[(slice(None), *block.place)] = part.reshape(passes, *block.sizes)
    return values


def is_whole(value: object) -> bool:
    """Says whether it is a whole number, of Python or numpy; a truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check(site: Site, passes: int, seed: int, start: int, sampler: str) -> None:
    if not is_whole(seed) or not 0 <= seed < SEED_LIMIT:
        raise InputError(f"seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
    if not is_whole(passes) or passes < 1:
        raise InputError(f"passes must be a whole number above 0, got {passes!r}")
    if not is_whole(start) or start < 0:
        raise InputError(f"start must be a whole number from 0, got {start!r}")
    UnknownName.check("sampler", sampler, SAMPLERS)
    UnknownName.check("kind of draw", site.kind, KINDS)
    shape = site.shape if isinstance(site.shape, tuple | list) else (None,)
    if not all(is_whole(size) and size >= 0 for size in shape):
        raise InputError(f"the shape of site {site.name!r} must be whole numbers such as (4,), got {site.shape!r}")
    number = isinstance(site.p, int | float | np.number) and not isinstance(site.p, bool)
    if site.kind == "bernoulli" and not (number and 0 <= site.p <= 1):
        raise InputError(f"the drop rate p of site {site.name!r} must be a number from 0 to 1, got {site.p!r}")


@dataclass(frozen=True)
class _Block:
    """A dyadic block of a shape: where it lies, clipped to the shape, and its whole extent."""

    place: tuple[slice, ...]
    extent: tuple[int, ...]

    @property
    def name(self) -> str:
        return ".".join(str(part.start) for part in self.place)

    @property
    def units(self) -> int:
        return math.prod(self.extent)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The extent within the shape."""
        return tuple(part.stop - part.start for part in self.place)

    @property
    def wanted(self) -> int:
        return math.prod(self.sizes)

    def stream(self, key: str, first: int = 0, drawn: int | None = None) -> Stream:
        """Gives its random numbers: from a unit on so many, or those of all rows that are within the shape."""
        drawn = math.prod((*self.sizes[:1], *self.extent[1:])) if drawn is None else drawn
        chosen = self._chosen()
        if chosen is not None:
            inner = math.prod(self.extent[1:])
            chosen = (np.arange(0, drawn, inner)[:, None] + chosen).reshape(-1)
        return Stream(f"{key}/{self.name}", self.units, drawn, first, chosen)

    def _chosen(self) -> NDArray[np.int64] | None:
        """Which units of a step along the first axis are within the shape; None where all are."""
        if self.sizes[1:] == self.extent[1:]:
            return None
        step = np.arange(math.prod(self.extent[1:])).reshape(self.extent[1:])
        return step[tuple(map(slice, self.sizes[1:]))].reshape(-1)

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Cuts a large one: the first unit, how many are drawn, and how many of them are wanted."""
        inner, kept = math.prod(self.extent[1:]), math.prod(self.sizes[1:])
        if kept == inner:
            for first in range(0, self.wanted, _SPLIT):
                size = min(_SPLIT, self.wanted - first)
                yield first, size, size
            return
        rows = self.sizes[0]
        step = max(_EIGHT, _SPLIT // inner // _EIGHT * _EIGHT)
        for row in range(0, rows, step):
            size = min(step, rows - row)
            yield row * inner, size * inner, size * kept


def _parts(key: str, blocks: Sequence[_Block], drawn: NDArray[Any]) -> Iterator[tuple[Sequence[Stream], NDArray[Any]]]:
    """What is drawn at a time, and where it goes: several blocks, or pieces of a large one."""
    if len(blocks) > 1:
        yield [block.stream(key) for block in blocks], drawn
        return
    begin = 0
    for first, size, wanted in blocks[0].pieces():
        yield [blocks[0].stream(key, first, size)], drawn[:, begin : begin + wanted]
        begin += wanted


def _together(blocks: Iterator[_Block]) -> Iterator[list[_Block]]:
    """Cuts blocks into groups: many small ones are drawn in as few calls as a large one."""
    some: list[_Block] = []
    units = 0
    for block in blocks:
        if some and units + block.wanted > _UNITS:
            yield some
            some, units = [], 0
        some.append(block)
        units += block.wanted
    if some:
        yield some


def _blocks(shape: tuple[int, ...]) -> Iterator[_Block]:
    """The dyadic blocks that cover a shape."""
    axes = [list(_edges(size)) for size in shape]
    for parts in itertools.product(*axes):
        place = tuple(slice(low, min(high, size)) for (low, high), size in zip(parts, shape, strict=True))
        yield _Block(place, tuple(high - low for low, high in parts))


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
    return sampler.kept(streams, start, passes, round(p * 2**32))


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
