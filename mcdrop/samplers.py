"""Where the random numbers of masks come from: counters of Philox 4x64-10, independent or stratified over the passes.

A sampler gives 32 random bits for each unit of each pass, or says at once which of them reach a threshold: most units
of stratified passes are told by their stratum alone, so that takes a fraction of the time.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcdrop.philox import Stream, bits

__all__ = ["BLOCKS", "SAMPLERS", "Sampler"]

_SMALL, _LARGE = 16, 64  # passes of a balanced block; larger ones begin with pass 64
_AT_ONCE = 2**18  # numbers that are stratified together: few calls where they are few, little memory where many
_PIECE = 2**14  # units that are ranked together
_LOW = np.uint16(_SMALL - 1)
_PLACES = np.arange(_SMALL, dtype=np.uint16)[:, None]

# The orders of four things that leave the first in its place, two bits for each; shifted by xor they are all orders.
_ORDERS = np.array([sum(x << 2 * (i + 1) for i, x in enumerate(o)) for o in itertools.permutations((1, 2, 3))], "u4")

Words = NDArray[np.uint32]
Keys = NDArray[np.uint16]
Kept = NDArray[np.bool_]


class Sampler(NamedTuple):
    """What it gives for streams side by side, from a first pass on for so many: (T, units).

    ``words`` are 32 random bits each, ``kept`` says which of them reach a threshold of at most 2**32.
    """

    words: Callable[[Sequence[Stream], int, int], Words]
    kept: Callable[[Sequence[Stream], int, int, int], Kept]


# -- independent passes ------------------------------------------------------------------------------------------------


def _iid_words(streams: Sequence[Stream], start: int, passes: int) -> Words:
    return bits(streams, "", range(start, start + passes))


def _iid_kept(streams: Sequence[Stream], start: int, passes: int, threshold: int) -> Kept:
    return _iid_words(streams, start, passes) >= threshold


# -- balanced passes ---------------------------------------------------------------------------------------------------


def _balanced_words(streams: Sequence[Stream], start: int, passes: int) -> Words:
    """Passes stratified in blocks of 16: within a block each unit's numbers fall once in every 16th of [0, 1).

    A unit with drop rate p is so dropped floor(16 p) or ceil(16 p) times a block, while each single pass stays exactly
    Bernoulli with independent units (Latin hypercube sampling, McKay, Beckman and Conover 1979, along the passes). From
    pass 64 on, four such blocks make one of 64, whose numbers fall once in every 64th (nested strata, Owen 1995): few
    passes have enough blocks to tell their error by, and many have a smaller one.
    """

    def made(blocks: range, nested: int) -> Words:
        inside = _of_blocks(streams, "/inside", blocks) >> np.uint32(4)
        if blocks[nested:]:
            chance, place = _chances(streams, blocks[nested:])
            inside[nested:] = (inside[nested:] >> np.uint32(2)) | (_quarters(chance, place) << np.uint32(26))
        inside |= _PLACES.astype(np.uint32) << np.uint32(28)
        return _by_rank(inside, _ranks(_order(streams, blocks)))

    return _in_stretches(made, np.uint32, streams, start, passes)


def _balanced_kept(streams: Sequence[Stream], start: int, passes: int, threshold: int) -> Kept:
    """The same passes: what is inside of a 16th matters in the one that the threshold lies in, and is drawn for it."""
    stratum, rest = divmod(threshold, 2**28)
    edge, finer = divmod(rest, 2**26)

    def made(blocks: range, nested: int) -> Kept:
        above, there = _above(_order(streams, blocks), stratum)
        if not rest:
            return above | there
        inside = _of_blocks(streams, "/inside", blocks, stratum)
        within = inside >= rest << 4
        if blocks[nested:]:
            quarter = _quarters(*_chances(streams, blocks[nested:], stratum))
            within[nested:] = (inside[nested:] >= finer << 6) & (quarter == edge) | (quarter > edge)
        there &= within
        there |= above
        return there

    return _in_stretches(made, np.bool_, streams, start, passes)


def _in_stretches(
    made: Callable[[range, int], NDArray[Any]], dtype: type, streams: Sequence[Stream], start: int, passes: int
) -> NDArray[Any]:
    """Puts together what is made of blocks of 16 passes (blocks, 16, units), some at a time.

    It is told which of them are parts of blocks of 64, by the place of the first one.
    """
    units = sum(stream.wanted for stream in streams)
    found: NDArray[Any] = np.empty((passes, units), dtype)
    together = max([units, *(stream.drawn for stream in streams)])
    stretch = _LARGE * max(1, _AT_ONCE // (_LARGE * max(1, together)))
    for edge in range(start - start % stretch, start + passes, stretch):
        low, high = max(start, edge), min(start + passes, edge + stretch)
        blocks = range(low // _SMALL, -(-high // _SMALL))
        each = made(blocks, max(0, _LARGE // _SMALL - blocks.start)).reshape(-1, units)
        begin = blocks.start * _SMALL
        found[low - start : high - start] = each[low - begin : high - begin]
    return found


def _order(streams: Sequence[Stream], blocks: range) -> Keys:
    """Gives the keys whose ranks are the passes' 16ths, (blocks, 16, units)."""
    keys: Keys = bits(streams, "/order", range(blocks.start * _SMALL, blocks.stop * _SMALL), np.uint16)
    return _told_apart(keys.reshape(len(blocks), _SMALL, -1))


def _told_apart(keys: Keys) -> Keys:
    """Makes 16 random bits of each pass 12 and four that differ, in place.

    Where the former are equal the latter decide: the pass's place, shifted by xor with four random bits of the first
    pass, so that no place comes first more often than another one.
    """
    shift = (keys[:, :1] & _LOW) ^ _LOW
    keys |= _LOW
    keys ^= shift
    keys ^= _PLACES
    return keys


def _of_blocks(streams: Sequence[Stream], what: str, blocks: range, stratum: int | None = None) -> Words:
    """The words of blocks' 16ths, or of one of these: (blocks, 16 or 1, units)."""
    first, last = blocks.start * _SMALL, blocks.stop * _SMALL
    passes = range(first, last) if stratum is None else range(first + stratum, last, _SMALL)
    words = bits(streams, what, passes)
    return words.reshape(len(blocks), -1, words.shape[1])


def _chances(streams: Sequence[Stream], blocks: range, stratum: int | None = None) -> tuple[Words, Words]:
    """What the quarters of a 16th follow from, (blocks, 16 or 1, units), and each block's place in its block of 64."""
    whole, place = np.divmod(np.asarray(blocks), _LARGE // _SMALL)
    words = _of_blocks(streams, "/quarter", range(whole[0], whole[-1] + 1), stratum)
    return words[whole - whole[0]], place.astype(np.uint32)[:, None, None]


def _quarters(chance: Words, place: Words) -> Words:
    """Gives each of the passes of a block of 64 that share a 16th a quarter of it."""
    orders: Words = np.take(_ORDERS, (chance >> np.uint32(2)) % np.uint32(len(_ORDERS)))
    quarter: Words = ((orders >> (2 * place).astype(np.uint32)) ^ chance) & np.uint32(3)
    return quarter


def _above(order: Keys, rank: int) -> tuple[Kept, Kept]:
    """Says which passes of each block (blocks, 16, units) rank above a place, and which one is there.

    That one's key alone is found, by a part of a sorting network.
    """
    above, there = np.empty(order.shape, np.bool_), np.empty(order.shape, np.bool_)
    for piece in _in_pieces(order):
        keys = order[piece]
        found = _ranked(keys, rank)[:, None]
        np.greater(keys, found, out=above[piece])
        np.equal(keys, found, out=there[piece])
    return above, there


def _in_pieces(order: NDArray[Any]) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts the units so that all passes of a piece stay in the cache."""
    blocks, _, units = order.shape
    step = max(1, _PIECE // blocks)
    for begin in range(0, units, step):
        yield slice(None), slice(None), slice(begin, begin + step)


def _ranked(keys: Keys, rank: int) -> Keys:
    """Gives the key of a rank, (blocks, units)."""
    rows: list[Keys] = [keys[:, place] for place in range(_SMALL)]
    own = [False] * _SMALL  # what is not its own stays as it is
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


def _ranks(order: Keys) -> NDArray[np.uint8]:
    """Ranks the passes of each block (blocks, 16, units).

    Each is compared with all later ones at once, in pieces that stay in the cache: for 16 numbers that is several times
    as fast as sorting them.
    """
    ranks = np.empty(order.shape, np.uint8)
    ranks[:] = np.arange(_SMALL - 1, -1, -1, dtype=np.uint8)[:, None]  # as if all later ones were smaller
    for piece in _in_pieces(order):
        keys, found = order[piece], ranks[piece]
        for place in range(_SMALL - 1):
            before = (keys[:, place, None] < keys[:, place + 1 :]).view(np.uint8)
            found[:, place + 1 :] += before
            found[:, place] -= np.add.reduce(before, axis=1, dtype=np.uint8)
    return ranks


def _by_rank(words: Words, ranks: NDArray[np.uint8]) -> Words:
    """Gives each pass the word of its 16th."""
    units = words.shape[2]
    firsts = np.arange(len(words))[:, None, None] * (_SMALL * units) + np.arange(units)
    found, flat = np.empty_like(words), words.reshape(-1)
    for piece in _in_pieces(ranks):
        places = ranks[piece].astype(np.intp)
        places *= units
        places += firsts[piece]
        np.take(flat, places, out=found[piece], mode="wrap")  # which are all within; it need not look
    return found


# Passes that depend on one another: sizes of blocks, and the pass with which the first of each size begins.
BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {"balanced": ((_SMALL, 0), (_LARGE, _LARGE)), "iid": ()}
SAMPLERS = {"balanced": Sampler(_balanced_words, _balanced_kept), "iid": Sampler(_iid_words, _iid_kept)}
