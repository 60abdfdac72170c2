"""Blocks of passes that depend on one another, and which of them tell the Monte Carlo error."""

from typing import NamedTuple

__all__ = ["FEWEST_BLOCKS", "Blocks", "Share", "shares"]

Blocks = tuple[tuple[int, int], ...]  # their sizes, and the pass with which the first of each size begins

FEWEST_BLOCKS = 4  # fewer block means say too little about their own spread


class Share(NamedTuple):
    """Passes whose error the blocks of one size tell: ``number`` of the ``whole`` ones there are.

    ``place`` is that of the size among all.
    """

    place: int
    size: int
    begin: int
    whole: int
    number: int


def shares(count: int, blocks: Blocks) -> tuple[list[Share], int]:
    """Divides passes among the sizes of which there are enough blocks, the largest first; and says how many are left.

    Blocks that begin anew are independent. Parts of a block are negatively dependent: taking those that are left over
    as independent, and all of them where the larger blocks are too few to tell, errs on the wide side.
    """
    found, left = [], count
    for place in reversed(range(len(blocks))):
        size, begin = blocks[place]
        whole = (count - begin) // size
        if whole >= FEWEST_BLOCKS:
            number = min(whole, left // size)
            found.append(Share(place, size, begin, whole, number))
            left -= number * size
    return found, left
