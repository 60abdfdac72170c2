"""Random bits by counters: Philox 4x64-10 of numpy, keyed by the name of a stream (Salmon et al. 2011)."""

import hashlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stream", "bits"]

_COUNTER = 32  # bytes that one counter step gives: eight units of 32 bits, or 16 of 16
_SKIPPED = 2**8  # counters between two passes above which those that nobody wants are skipped
_SHORT = 2**12  # words that take less time than to let other threads run meanwhile
_LAST = 2**64 - 1
_MINE = threading.local()


class Stream(NamedTuple):
    """The random numbers of a block: their key, the units of a pass, how many are drawn, and from which on.

    ``first`` is a multiple of 16; ``chosen`` are those of the drawn ones that are wanted (None: all).
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


def bits(streams: Sequence[Stream], what: str, passes: range, dtype: type = np.uint32) -> NDArray[Any]:
    """Gives random bits for each wanted unit of each pass, (T, units), the streams side by side."""
    if len(streams) == 1:
        return _bits(streams[0], what, passes, dtype)
    words: NDArray[Any] = np.empty((len(passes), sum(stream.wanted for stream in streams)), dtype)
    begin = 0
    for stream in streams:
        words[:, begin : begin + stream.wanted] = _bits(stream, what, passes, dtype)
        begin += stream.wanted
    return words


def _bits(stream: Stream, what: str, passes: range, dtype: type) -> NDArray[Any]:
    """Gives those of one stream; a pass begins on a whole Philox counter."""
    units = _COUNTER // np.dtype(dtype).itemsize
    counters, few = -(-stream.units // units), -(-stream.drawn // units)
    digest = hashlib.blake2b(f"{stream.key}{what}".encode(), digest_size=16).digest()
    generator = _at(int.from_bytes(digest, "little"), passes.start * counters + stream.first // units)
    words: NDArray[np.uint64]
    unwanted = passes.step * counters - few
    if unwanted < _SKIPPED:
        rows = passes[-1] + 1 - passes.start
        words = _raw(generator, rows * counters * 4).reshape(rows, -1)[:: passes.step]
    else:
        words = np.empty((len(passes), few * 4), np.uint64)
        for one in words:
            one[:] = _raw(generator, few * 4)
            generator.advance(unwanted)
    _MINE.generator = generator
    each = words.astype("<u8", copy=False).view(np.dtype(dtype).newbyteorder("<"))
    return each[:, : stream.drawn] if stream.chosen is None else np.take(each, stream.chosen, axis=1)


def _at(key: int, counter: int) -> np.random.Philox:
    """Gives a generator set to a key and a counter: this thread's last one, since a new one takes eight times as long.

    It is nobody else's meanwhile, such as a signal handler's, until it is put back.
    """
    generator: np.random.Philox = vars(_MINE).pop("generator", None) or np.random.Philox(key=0)
    generator.state = {
        "bit_generator": "Philox", "state": {"key": _words_of(key, 2), "counter": _words_of(counter, 4)},
        "buffer": _words_of(0, 4), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
    }  # fmt: skip
    return generator


def _words_of(number: int, count: int) -> NDArray[np.uint64]:
    return np.frombuffer(number.to_bytes(8 * count, "little"), "<u8").astype(np.uint64)


def _raw(generator: np.random.Philox, count: int) -> NDArray[np.uint64]:
    """Gives the next words of a generator; many of them let other threads run meanwhile, as ``random_raw`` does not."""
    if count <= _SHORT:
        return generator.random_raw(count)
    return np.random.Generator(generator).integers(0, _LAST, count, dtype=np.uint64, endpoint=True)
