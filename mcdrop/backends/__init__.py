"""What runs a network's passes: one Protocol, one module for each runtime, each loaded only when it is used."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mcdrop.rows import Rows

__all__ = ["Backend"]


class Backend(Protocol):
    """A network whose draws are masks.

    ``chunk_bytes`` is what the activations of one chunk of passes may take.
    """

    chunk_bytes: int

    def forward(self, rows: Rows, passes: int, *, seed: int, start: int, sampler: str) -> NDArray[np.float32]:
        """Gives the outputs of passes ``start`` to ``start + passes``: (T, N, ...)."""

    def deterministic(self, rows: Rows) -> NDArray[np.float32]:
        """Gives the outputs with every draw off, as in plain eval: (N, ...)."""

    def row_bytes(self, rows: Rows) -> int:
        """Gives the memory that one pass of one row needs, in bytes, roughly from above."""
