"""Masks that tell: under which it shows whatever a draw does, however rare its drops are."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mcdrop.masks import Site, sample_masks

__all__ = ["telling"]

_END = 2.0**-24  # how near to 0 and 1 uniform numbers come


def telling(sites: Sequence[Site], passes: int, *, seed: int) -> dict[str, NDArray[np.float32]]:
    """Gives masks (T, ...) that tell passes apart however rare a drop is: half of the units drop.

    A third of uniform numbers is at either end, whatever chance they are compared with, and normal ones go four
    times as far as usual.
    """
    even = [replace(site, p=0.5) if site.kind == "bernoulli" else site for site in sites]
    drawn = sample_masks(even, passes, seed=seed)
    for site in sites:
        if site.kind == "uniform":
            drawn[site.name] = np.clip(3 * drawn[site.name] - 1, _END, 1 - _END)
        elif site.kind == "normal":
            drawn[site.name] = 4 * drawn[site.name]
    return drawn
