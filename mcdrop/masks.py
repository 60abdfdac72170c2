"""The only randomness in mcdrop: a mask is a pure function of (seed, site, pass).

Numbers come from Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based
generator: pass ``t`` of a site reads its own stretch of the counter, so passes can be drawn in any order, in any
chunks, on any machine, and are equal to the bit. No global generator is read or moved.

A site's units are laid out in dyadic blocks (edges 0, 1, 16, 32, 64, ...) along each axis, every block with its own
key. So where a shape follows the input (sequence length, image size), the mask of the longer input extends the shorter
one's.

To add a sampler, add one function and one line to ``SAMPLERS``; to add a kind of draw, one line to ``KINDS``.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcdrop.errors import InputError, UnknownName

__all__ = ["BLOCKS", "KINDS", "SAMPLERS", "SEED_LIMIT", "Site", "sample_masks"]

SEED_LIMIT = 2**64
_FIRST_EDGE = 16
_SMALL, _LARGE = 16, 64  # passes of a balanced block; larger ones begin with pass 64
_AT_ONCE = 2**18  # numbers that are stratified together: few calls where they are few, little memory where many
_UNITS = 2**13  # of small blocks that are drawn together
_PIECE = 2**13  # units that are ranked together
_SKIPPED = 2**10  # counters of a pass above which those that nobody wants are skipped

# The orders of four things that leave the first in its place, two bits for each; shifted by xor they are all orders.
_ORDERS = np.array([sum(x << 2 * (i + 1) for i, x in enumerate(o)) for o in itertools.permutations((1, 2, 3))], "u4")

Masks = dict[str, NDArray[np.float32]]
Words = NDArray[np.uint32]


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
        InputError: a seed outside 0 to 2**64 - 1, or an unknown sampler or kind.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise InputError(f"seed must be between 0 and 2**64 - 1, got {seed}")
    if sampler not in SAMPLERS:
        raise UnknownName("sampler", sampler, SAMPLERS)
    draw = SAMPLERS[sampler]
    masks = {}
    for site in sites:
        if site.kind not in KINDS:
            raise UnknownName("kind of draw", site.kind, KINDS)
        words = np.empty((passes, *site.shape), np.uint32)
        for some in _together(_blocks(site.shape)):
            streams = [Stream(f"{seed}/{site.name}/{block.name}", block.units, block.wanted) for block in some]
            drawn = draw(streams, start, passes)
            ends = np.cumsum([stream.wanted for stream in streams])
            for block, part in zip(some, np.split(drawn, ends[:-1], axis=1), strict=True):
                words[(slice(None), *block.place)] = part.reshape(passes, *block.kept)[block.clip]
        masks[site.name] = KINDS[site.kind](words, site.p)
    return masks


class Stream(NamedTuple):
    """The random numbers of a block: their key, the units of a pass, and of how many, the first, they are wanted."""

    key: str
    units: int
    wanted: int


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
    def kept(self) -> tuple[int, ...]:
        """The extent without what is clipped of the first axis, which comes last and is not drawn."""
        return (*(part.stop - part.start for part in self.place[:1]), *self.extent[1:])

    @property
    def wanted(self) -> int:
        return math.prod(self.kept)

    @property
    def clip(self) -> tuple[slice, ...]:
        return (slice(None), *(slice(0, part.stop - part.start) for part in self.place))


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


def _philox(streams: Sequence[Stream], what: str, start: int, passes: int) -> Words:
    """Gives 32 random bits for each wanted unit of each pass, (T, units), the streams side by side."""
    if len(streams) == 1:
        return _one_philox(streams[0], what, start, passes)
    words = np.empty((passes, sum(stream.wanted for stream in streams)), np.uint32)
    begin = 0
    for stream in streams:
        words[:, begin : begin + stream.wanted] = _one_philox(stream, what, start, passes)
        begin += stream.wanted
    return words


def _one_philox(stream: Stream, what: str, start: int, passes: int) -> Words:
    """Gives those of one stream; a pass begins on a whole Philox counter."""
    # one counter step gives four 64-bit words, so eight units
    counters, few = -(-stream.units // 8), -(-stream.wanted // 8)
    digest = hashlib.blake2b(f"{stream.key}{what}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"), counter=start * counters)
    if counters - few < _SKIPPED:
        words: NDArray[np.uint64] = generator.random_raw(passes * counters * 4)
    else:
        words = np.empty((passes, few * 4), np.uint64)
        for one in words:
            one[:] = generator.random_raw(few * 4)
            generator.advance(counters - few)
    return words.astype("<u8", copy=False).view("<u4").reshape(passes, -1)[:, : stream.wanted]


def _iid(streams: Sequence[Stream], start: int, passes: int) -> Words:
    """Independent passes."""
    return _philox(streams, "", start, passes)


def _balanced(streams: Sequence[Stream], start: int, passes: int) -> Words:
    """Passes stratified in blocks of 16: within a block each unit's numbers fall once in every 16th of [0, 1).

    A unit with drop rate p is so dropped floor(16 p) or ceil(16 p) times a block, while each single pass stays exactly
    Bernoulli with independent units (Latin hypercube sampling, McKay, Beckman and Conover 1979, along the passes). From
    pass 64 on, four such blocks make one of 64, whose numbers fall once in every 64th (nested strata, Owen 1995): few
    passes have enough blocks to tell their error by, and many have a smaller one.
    """
    units = sum(stream.wanted for stream in streams)
    words = np.empty((passes, units), np.uint32)
    stretch = _LARGE * max(1, _AT_ONCE // (_LARGE * units))
    for begin in range(start - start % stretch, start + passes, stretch):
        low, high = max(start, begin), min(start + passes, begin + stretch)
        words[low - start : high - start] = _stratified(streams, low, high)
    return words


def _stratified(streams: Sequence[Stream], low: int, high: int) -> Words:
    """Gives the balanced words of passes ``low`` to ``high``."""
    blocks = np.arange(low // _SMALL, -(-high // _SMALL))
    begin, count = blocks[0] * _SMALL, len(blocks) * _SMALL
    order = _philox(streams, "/order", begin, count)
    sixteenth = _ranks(order.reshape(len(blocks), _SMALL, -1))
    strata = sixteenth.reshape(order.shape).astype(np.uint32) << np.uint32(28)
    inside = _philox(streams, "/inside", begin, count) >> np.uint32(4)
    nested = blocks * _SMALL >= _LARGE
    if nested.any():
        place = slice(count - nested.sum() * _SMALL, None)
        quarter = _quarters(streams, blocks[nested], sixteenth[nested])
        inside[place] = (inside[place] >> np.uint32(2)) | (quarter.reshape(inside[place].shape) << np.uint32(26))
    return (strata | inside)[low - begin : high - begin]


def _quarters(streams: Sequence[Stream], blocks: NDArray[np.int64], sixteenth: NDArray[np.uint8]) -> Words:
    """Gives each of the passes of a large block that share a 16th a quarter of it, (blocks, 16, units)."""
    whole, place = np.divmod(blocks, _LARGE // _SMALL)
    wholes = whole[-1] + 1 - whole[0]
    words = _philox(streams, "/quarter", whole[0] * _SMALL, wholes * _SMALL).reshape(wholes, _SMALL, -1)
    chance = np.take_along_axis(words[whole - whole[0]], sixteenth.astype(np.intp), axis=1)
    orders = np.take(_ORDERS, (chance >> np.uint32(2)) % np.uint32(len(_ORDERS)))
    quarter: Words = ((orders >> (2 * place[:, None, None]).astype(np.uint32)) ^ chance) & np.uint32(3)
    return quarter


def _ranks(order: Words) -> NDArray[np.uint8]:
    """Ranks the passes of each block (blocks, 16, units), the earlier first where two are equal.

    Each is compared with all later ones at once, in pieces that stay in the cache: for 16 numbers that is several times
    as fast as sorting them.
    """
    blocks, count, units = order.shape
    flat = np.ascontiguousarray(order.transpose(1, 0, 2)).reshape(count, -1)
    ranks = np.empty(flat.shape, np.uint8)
    ranks[:] = np.arange(count - 1, -1, -1, dtype=np.uint8)[:, None]  # as if all later ones were smaller
    for begin in range(0, flat.shape[1], _PIECE):
        words, found = flat[:, begin : begin + _PIECE], ranks[:, begin : begin + _PIECE]
        for place in range(count - 1):
            before = (words[place] <= words[place + 1 :]).view(np.uint8)
            found[place + 1 :] += before
            found[place] -= np.add.reduce(before, axis=0, dtype=np.uint8)
    return np.ascontiguousarray(ranks.reshape(count, blocks, units).transpose(1, 0, 2))


def _bernoulli(words: Words, p: float) -> NDArray[np.float32]:
    return (words >= round(p * 2**32)).astype(np.float32)


def _uniform(words: Words, p: float) -> NDArray[np.float32]:
    # 24 bits, so that the largest number is still below 1 in float32
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def _normal(words: Words, p: float) -> NDArray[np.float32]:
    from scipy.special import ndtri  # here, because ``import mcdrop`` needs numpy alone

    return ndtri((words + 0.5) * 2.0**-32).astype(np.float32)


# Passes that depend on one another: sizes of blocks, and the pass with which the first of each size begins.
BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {"balanced": ((_SMALL, 0), (_LARGE, _LARGE)), "iid": ()}
SAMPLERS: dict[str, Callable[[Sequence[Stream], int, int], Words]] = {"balanced": _balanced, "iid": _iid}
KINDS: dict[str, Callable[[Words, float], NDArray[np.float32]]] = {
    "bernoulli": _bernoulli,
    "normal": _normal,
    "uniform": _uniform,
}
