"""Masks as arrays, the latest kept: what a backend without torch draws."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from mcdrop.locks import new_lock
from mcdrop.masks import BLOCKS, Site, sample_masks

__all__ = ["Drawn", "LatestMasks"]

Drawn = Mapping[str, NDArray[Any]]  # site name -> its draws (T, ...); a site that is not there is at its expectation


class LatestMasks:
    """The masks that were used last, bounded in bytes; safe to use from several threads."""

    def __init__(self, most: int) -> None:
        """Takes the bound; what was drawn last is kept in any case."""
        self._most = most
        self._held: dict[object, Drawn] = {}
        self._lock = new_lock()

    def get(self, sites: Sequence[Site], passes: int, *, seed: int, start: int, sampler: str) -> Drawn:
        """Gives the draws of some passes; passes that depend on one another are drawn together, once."""
        size = next((size for size, _ in BLOCKS[sampler]), 1)
        begin, end = start, start + passes
        if passes < size:
            begin, end = begin // size * size, -(-end // size) * size
        key = (*sites, begin, end, seed, sampler)
        with self._lock:
            found = self._held.pop(key, None)
        if found is None:
            found = sample_masks(sites, end - begin, seed=seed, start=begin, sampler=sampler)
        with self._lock:
            self._held[key] = found
            while len(self._held) > 1 and self._bytes() > self._most:
                del self._held[next(iter(self._held))]
        return {name: masks[start - begin : start - begin + passes] for name, masks in found.items()}

    def _bytes(self) -> int:
        return sum(masks.nbytes for found in self._held.values() for masks in found.values())
