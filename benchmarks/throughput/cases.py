"""The cases: rows and passes of each network.

Batches of 1, 32 and 256 rows, 100 and 1000 passes, and fewer where the plain loop would take more than some seconds.
The first case of each network is the quick one; in the one marked compiled the compiled way runs too, which needs up
to a minute before its first answer.
"""

from dataclasses import dataclass

__all__ = ["CASES", "MEMORY_CASES", "MEMORY_WAYS", "Case"]


@dataclass(frozen=True)
class Case:
    """A network's name, rows and passes."""

    network: str
    rows: int
    passes: int
    compiled: bool = False


CASES = [
    Case("M1", 1, 100),
    Case("M1", 1, 1000),
    Case("M1", 32, 100, compiled=True),
    Case("M1", 32, 1000),
    Case("M1", 256, 100),
    Case("M1", 256, 1000),
    Case("M2", 1, 100),
    Case("M2", 1, 1000),
    Case("M2", 32, 100, compiled=True),
    Case("M2", 256, 20),
    Case("M2", 256, 100),
    Case("M3", 1, 100),
    Case("M3", 1, 1000),
    Case("M3", 32, 100, compiled=True),
    Case("M3", 256, 20),
    Case("M4", 1, 100),
    Case("M4", 32, 25, compiled=True),
    Case("M4", 256, 4),
    Case("M5", 1, 20),
    Case("M5", 1, 100),
    Case("M5", 32, 10, compiled=True),
    Case("M6", 1, 100),
    Case("M6", 1, 1000),
    Case("M6", 32, 100, compiled=True),
    Case("M6", 256, 10),
]

MEMORY_CASES = [Case("M2", 256, 100), Case("M3", 32, 100)]
MEMORY_WAYS = ("mcdrop", "loop", "baal", "torch-uncertainty", "vmap")
