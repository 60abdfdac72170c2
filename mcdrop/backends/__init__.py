"""What runs a network's passes: one Protocol, one module for each runtime, each loaded only when it is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mcdrop.masks import Site
from mcdrop.moments import Summing
from mcdrop.rows import Rows

__all__ = ["Backend", "Block", "Plain"]


class Block(Protocol):
    """Rows that are ready for passes: what comes before the first draw is computed once for all of them."""

    @property
    def most(self) -> int:
        """How many passes of these rows should be run at a time, at least 1."""

    def forward(self, passes: int, *, seed: int, start: int, sampler: str) -> NDArray[np.floating[Any]]:
        """Gives the outputs of passes ``start`` to ``start + passes``: (T, N, ...)."""

    def sums_there(self, passes: int) -> bool:
        """Whether so many are somewhere else, such as on a GPU, and take longer to move than to sum up there."""

    def summed(
        self, passes: int, *, seed: int, start: int, sampler: str, summing: Summing
    ) -> NDArray[np.float64] | None:
        """Gives what is made of the same passes where they are; None where the memory there is out."""

    def deterministic(self) -> NDArray[np.floating[Any]]:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""


class Backend(Protocol):
    """A network whose draws are masks.

    ``chunk_bytes`` is what the activations of one chunk of passes may take.
    """

    chunk_bytes: int

    def block(self, rows: Rows, *, exact_last: bool = False, rides: bool = True) -> Block:
        """Gives rows ready for passes with the weights of today.

        With ``exact_last`` outputs are mean and variance over the last mask in closed form, (T, N, ..., 2 D). Where
        the output with every draw off ``rides``, it may be made with the first passes, which takes less than by itself.

        Raises:
            InputError: there is no closed form.
        """

    def forward(self, rows: Rows, passes: int, *, seed: int, start: int, sampler: str) -> NDArray[np.floating[Any]]:
        """Gives the outputs of passes ``start`` to ``start + passes``: (T, N, ...)."""

    def deterministic(self, rows: Rows) -> NDArray[np.floating[Any]]:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""

    def features(self, rows: Rows, layer: str | None) -> NDArray[np.float32]:
        """Gives the output of a named layer, or by default what enters the last linear one, with draws off: (N, F)."""

    def sites(self, rows: Rows) -> Sequence[Site]:
        """Gives the draws of a pass that are on."""

    def digest(self) -> str:
        """Gives a sha256 over the weights."""

    def row_bytes(self, rows: Rows) -> int:
        """Gives the memory that one pass of one row needs, in bytes, roughly from above."""

    def pass_bytes(self, rows: Rows) -> int:
        """Gives the memory that a further pass of one row in the same chunk needs."""

    def shared_bytes(self, rows: Rows) -> int:
        """Gives the memory that a further pass needs besides, for all rows together, such as weights under a mask."""


@dataclass(frozen=True)
class Plain:
    """A block of a backend that looks after the part before the first draw by itself."""

    backend: Backend
    rows: Rows

    @property
    def most(self) -> int:
        """How many passes of these rows should be run at a time."""
        needed = max(1, self.backend.pass_bytes(self.rows)) * self.rows.count + self.backend.shared_bytes(self.rows)
        return max(1, self.backend.chunk_bytes // needed)

    def forward(self, passes: int, *, seed: int, start: int, sampler: str) -> NDArray[np.floating[Any]]:
        """Gives the outputs of some passes."""
        return self.backend.forward(self.rows, passes, seed=seed, start=start, sampler=sampler)

    def sums_there(self, passes: int) -> bool:
        """Says no: outputs are arrays already."""
        return False

    def summed(self, passes: int, *, seed: int, start: int, sampler: str, summing: Summing) -> None:
        """Gives None."""

    def deterministic(self) -> NDArray[np.floating[Any]]:
        """Gives the outputs with every draw off."""
        return self.backend.deterministic(self.rows)
