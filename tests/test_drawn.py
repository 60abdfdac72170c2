"""Masks that are kept as arrays: the passes asked for, drawn once for all of a block."""

import numpy as np
import pytest

from mcdrop.drawn import LatestMasks
from mcdrop.masks import SAMPLERS, Site, sample_masks

SITES = [Site("site0", (7, 30), 0.3), Site("site1", (5,), kind="normal")]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_they_are_the_masks_of_the_passes(sampler: str) -> None:
    latest = LatestMasks(10**6)
    for start, passes in ((0, 100), (3, 1), (4, 1), (15, 4), (100, 1), (3, 1)):
        found = latest.get(SITES, passes, seed=2, start=start, sampler=sampler)
        expected = sample_masks(SITES, passes, seed=2, start=start, sampler=sampler)
        for site in SITES:
            np.testing.assert_array_equal(found[site.name], expected[site.name])


def test_passes_of_one_block_are_drawn_once_whatever_the_bound() -> None:
    latest = LatestMasks(1)
    first, second = (latest.get(SITES, 1, seed=2, start=start, sampler="balanced")["site0"] for start in (32, 47))
    assert np.shares_memory(first.base, second.base)
    other = latest.get(SITES, 1, seed=2, start=48, sampler="balanced")["site0"]
    assert not np.shares_memory(first.base, other.base)
    assert not np.shares_memory(first.base, latest.get(SITES, 1, seed=2, start=32, sampler="balanced")["site0"].base)
