"""Masks that tell: under which it shows whatever a draw does, however rare its drops are."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mcdrop.masks import Site, sample_masks

__all__ = ["halved", "telling"]

_END = 2.0**-24  # how near to 0 and 1 uniform numbers come


def halved(sites: Sequence[Site]) -> list[Site]:
    """Gives sites that drop half of their units, but for those that drop all or none in every pass."""
    even = (site.kind == "bernoulli" and not site.constant for site in sites)
    return [replace(site, p=0.5) if half else site for site, half in zip(sites, even, strict=True)]


def telling(sites: Sequence[Site], passes: int, *, seed: int) -> dict[str, NDArray[np.float32]]:
    """Gives masks (T, ...) that tell passes apart however rare a drop is: half of the units drop.

    A third of uniform numbers is at either end, whatever chance they are compared with, and normal ones go four
    times as far as usual.
    """
    drawn = sample_masks(halved(sites), passes, seed=seed)
    for site in sites:
        if site.kind == "uniform":
            drawn[site.name] = np.clip(3 * drawn[site.name] - 1, _END, 1 - _END)
        elif site.kind == "normal":
            drawn[site.name] = 4 * drawn[site.name]
    return drawn
