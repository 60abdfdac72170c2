"""Where the random numbers of masks come from: counters of Philox 4x64-10, independent or stratified over the passes.

A sampler gives 32 random bits for each unit of each pass, or says at once which of them reach a threshold: most units
of stratified passes are told by their stratum alone, so that takes a fraction of the time.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCKS", "SAMPLERS", "Sampler", "Stream"]

_SMALL, _LARGE = 16, 64  # passes of a balanced block; larger ones begin with pass 64
_AT_ONCE = 2**18  # numbers that are stratified together: few calls where they are few, little memory where many
_PIECE = 2**14  # units that are ranked together
_FEW = 2**14  # units whose words are rather drawn for all 16 strata at once, in fewer calls
_SKIPPED = 2**10  # counters of a pass above which those that nobody wants are skipped
_LAST = 2**64 - 1
_EIGHT = 8  # one counter step gives four 64-bit words, so eight units

# The orders of four things that leave the first in its place, two bits for each; shifted by xor they are all orders.
_ORDERS = np.array([sum(x << 2 * (i + 1) for i, x in enumerate(o)) for o in itertools.permutations((1, 2, 3))], "u4")

Words = NDArray[np.uint32]
Kept = NDArray[np.bool_]


class Stream(NamedTuple):
    """The random numbers of a block: their key, the units of a pass, how many are drawn, and from which on.

    ``first`` is a multiple of eight; ``chosen`` are those of the drawn ones that are wanted (None: all).
    """

    key: str
    units: int
    drawn: int
    first: int = 0
    chosen: NDArray[np.int64] | None = None

    @property
    def wanted(self) -> int:
        """How many are wanted."""
        return self.drawn if self.chosen is None else len(self.chosen)


class Sampler(NamedTuple):
    """What it gives for streams side by side, from a first pass on for so many: (T, units).

    ``words`` are 32 random bits each, ``kept`` says which of them reach a threshold of at most 2**32.
    """

    words: Callable[[Sequence[Stream], int, int], Words]
    kept: Callable[[Sequence[Stream], int, int, int], Kept]


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
    counters, few = -(-stream.units // _EIGHT), -(-stream.drawn // _EIGHT)
    digest = hashlib.blake2b(f"{stream.key}{what}".encode(), digest_size=16).digest()
    first = start * counters + stream.first // _EIGHT
    generator = np.random.Philox(key=int.from_bytes(digest, "little"), counter=first)
    if counters - few < _SKIPPED:
        words = _raw(generator, passes * counters * 4)
    else:
        words = np.empty((passes, few * 4), np.uint64)
        for one in words:
            one[:] = _raw(generator, few * 4)
            generator.advance(counters - few)
    each = words.astype("<u8", copy=False).view("<u4").reshape(passes, -1)
    return each[:, : stream.drawn] if stream.chosen is None else np.take(each, stream.chosen, axis=1)


def _raw(generator: np.random.Philox, count: int) -> NDArray[np.uint64]:
    """Gives the next words of a generator, and lets other threads run meanwhile, as its own ``random_raw`` does not."""
    return np.random.Generator(generator).integers(0, _LAST, count, dtype=np.uint64, endpoint=True)


# -- independent passes ------------------------------------------------------------------------------------------------


def _iid_words(streams: Sequence[Stream], start: int, passes: int) -> Words:
    return _philox(streams, "", start, passes)


def _iid_kept(streams: Sequence[Stream], start: int, passes: int, threshold: int) -> Kept:
    return _philox(streams, "", start, passes) >= threshold


# -- balanced passes ---------------------------------------------------------------------------------------------------


def _balanced_words(streams: Sequence[Stream], start: int, passes: int) -> Words:
    """Passes stratified in blocks of 16: within a block each unit's numbers fall once in every 16th of [0, 1).

    A unit with drop rate p is so dropped floor(16 p) or ceil(16 p) times a block, while each single pass stays exactly
    Bernoulli with independent units (Latin hypercube sampling, McKay, Beckman and Conover 1979, along the passes). From
    pass 64 on, four such blocks make one of 64, whose numbers fall once in every 64th (nested strata, Owen 1995): few
    passes have enough blocks to tell their error by, and many have a smaller one.
    """

    def made(blocks: NDArray[np.int64], nested: slice) -> Words:
        sixteenth, inside = _sixteenths(streams, blocks), _of_blocks(streams, "/inside", blocks) >> np.uint32(4)
        if len(blocks[nested]):
            place, chance = _chances(streams, blocks[nested])
            chance = np.take_along_axis(chance, sixteenth[nested].astype(np.intp), axis=1)
            inside[nested] = (inside[nested] >> np.uint32(2)) | (_quarters(chance, place) << np.uint32(26))
        words: Words = (sixteenth.astype(np.uint32) << np.uint32(28)) | inside
        return words

    return _in_stretches(made, np.uint32, streams, start, passes)


def _balanced_kept(streams: Sequence[Stream], start: int, passes: int, threshold: int) -> Kept:
    """The same passes: the quarter and what is inside of it matter in the one 16th that the threshold lies in."""
    stratum, rest = divmod(threshold, 2**28)
    edge, finer = divmod(rest, 2**26)

    def made(blocks: NDArray[np.int64], nested: slice) -> Kept:
        above, there = _above(_of_blocks(streams, "/order", blocks), stratum)
        if not rest:
            return above | there
        inside = _of_blocks(streams, "/inside", blocks)
        within = inside >= rest << 4
        if len(blocks[nested]):
            place, chance = _chances(streams, blocks[nested], stratum)
            quarter = _quarters(chance, place)
            within[nested] = (inside[nested] >= finer << 6) & (quarter == edge) | (quarter > edge)
        within &= there
        within |= above
        return within

    return _in_stretches(made, np.bool_, streams, start, passes)


def _in_stretches(
    made: Callable[[NDArray[np.int64], slice], NDArray[Any]], dtype: type, streams: Sequence[Stream], start: int,
    passes: int,
) -> NDArray[Any]:  # fmt: skip
    """Puts together what is made of blocks of 16 passes (blocks, 16, units), some at a time.

    It is told which of them are parts of blocks of 64, by their places.
    """
    units = sum(stream.wanted for stream in streams)
    found: NDArray[Any] = np.empty((passes, units), dtype)
    together = max([units, *(stream.drawn for stream in streams)])
    stretch = _LARGE * max(1, _AT_ONCE // (_LARGE * max(1, together)))
    for edge in range(start - start % stretch, start + passes, stretch):
        low, high = max(start, edge), min(start + passes, edge + stretch)
        blocks = np.arange(low // _SMALL, -(-high // _SMALL))
        each = made(blocks, slice(np.searchsorted(blocks, _LARGE // _SMALL), None)).reshape(-1, units)
        begin = int(blocks[0]) * _SMALL
        found[low - start : high - start] = each[low - begin : high - begin]
    return found


def _of_blocks(streams: Sequence[Stream], what: str, blocks: NDArray[np.int64]) -> Words:
    """The words of blocks of 16 passes that follow one another, (blocks, 16, units)."""
    words = _philox(streams, what, int(blocks[0]) * _SMALL, len(blocks) * _SMALL)
    return words.reshape(len(blocks), _SMALL, -1)


def _sixteenths(streams: Sequence[Stream], blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
    return _ranks(_of_blocks(streams, "/order", blocks))


def _chances(
    streams: Sequence[Stream], blocks: NDArray[np.int64], stratum: int | None = None
) -> tuple[NDArray[np.uint32], Words]:
    """Each block's place in its block of 64, and what the quarters of a 16th follow from: (blocks, 16 or 1, units)."""
    whole, place = np.divmod(blocks, _LARGE // _SMALL)
    wholes = np.arange(whole[0], whole[-1] + 1)
    if stratum is not None and sum(stream.drawn for stream in streams) > _FEW:
        words = np.stack([_philox(streams, "/quarter", int(one) * _SMALL + stratum, 1) for one in wholes])
    else:
        words = _of_blocks(streams, "/quarter", wholes)[
            :, slice(None) if stratum is None else slice(stratum, stratum + 1)
        ]
    return place.astype(np.uint32)[:, None, None], words[whole - whole[0]]


def _quarters(chance: Words, place: NDArray[np.uint32]) -> Words:
    """Gives each of the passes of a block of 64 that share a 16th a quarter of it."""
    orders: Words = np.take(_ORDERS, (chance >> np.uint32(2)) % np.uint32(len(_ORDERS)))
    quarter: Words = ((orders >> (2 * place).astype(np.uint32)) ^ chance) & np.uint32(3)
    return quarter


def _above(order: Words, rank: int) -> tuple[Kept, Kept]:
    """Says which passes of each block (blocks, 16, units) rank above a place, and which one is there.

    That one's word alone is found, by a part of a sorting network.
    """
    blocks, count, units = order.shape
    flat = np.ascontiguousarray(order.transpose(1, 0, 2)).reshape(count, -1)
    above, there = np.empty(flat.shape, np.bool_), np.empty(flat.shape, np.bool_)
    for begin in range(0, flat.shape[1], _PIECE):
        piece = slice(begin, begin + _PIECE)
        words = flat[:, piece]
        found = _ranked(words, rank)
        np.greater(words, found, out=above[:, piece])
        np.equal(words, found, out=there[:, piece])
        if np.count_nonzero(there[:, piece]) > words.shape[1]:  # some are equal, and the earlier comes first
            ranks = _ranks(words[None])[0]
            above[:, piece], there[:, piece] = ranks > rank, ranks == rank
    by_block = (count, blocks, units)
    above, there = (np.ascontiguousarray(one.reshape(by_block).transpose(1, 0, 2)) for one in (above, there))
    return above, there


def _ranked(words: Words, rank: int) -> Words:
    """Gives the word of a rank in each column of (16, units)."""
    rows: list[Words] = list(words)
    own = [False] * len(words)  # what is not its own stays as it is
    for one, other, lower, upper in _NETWORKS[rank]:
        a, b = rows[one], rows[other]
        if lower and upper:
            rows[one] = np.minimum(a, b)
            rows[other] = np.maximum(a, b, out=b if own[other] else None)
        elif lower:
            rows[one] = np.minimum(a, b, out=a if own[one] else None)
        else:
            rows[other] = np.maximum(a, b, out=b if own[other] else None)
        own[one], own[other] = own[one] or lower, own[other] or upper
    return rows[rank]


def _network(rank: int) -> list[tuple[int, int, bool, bool]]:
    """Gives the steps of Batcher's odd-even merge sort (1968) of 16 that one rank depends on, in their order.

    A step puts the lower of two into the first place and the upper into the second, and says which are needed.
    """
    needed, steps = {rank}, []
    for one, other in reversed([*_merge_sort(range(_SMALL))]):
        if {one, other} & needed:
            steps.append((one, other, one in needed, other in needed))
            needed |= {one, other}
    return steps[::-1]


def _merge_sort(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    if len(places) > 1:
        half = len(places) // 2
        yield from _merge_sort(places[:half])
        yield from _merge_sort(places[half:])
        yield from _merge(places)


def _merge(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    if len(places) == 2:
        yield places[0], places[1]
        return
    yield from _merge(places[::2])
    yield from _merge(places[1::2])
    yield from zip(places[1:-1:2], places[2::2], strict=True)


_NETWORKS = [_network(rank) for rank in range(_SMALL)]


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


# Passes that depend on one another: sizes of blocks, and the pass with which the first of each size begins.
BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {"balanced": ((_SMALL, 0), (_LARGE, _LARGE)), "iid": ()}
SAMPLERS = {"balanced": Sampler(_balanced_words, _balanced_kept), "iid": Sampler(_iid_words, _iid_kept)}
