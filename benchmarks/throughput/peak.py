"""What the machine can do: the speed of a large matrix product, and the least time that a case can take by it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.throughput.networks import Network
from mcdrop.digits import digits

__all__ = ["Product", "copied_per_second", "operations", "products"]

SIZES = {"cpu": 2048, "cuda": 8192}
SMALLEST, LONG = 256, 0.2  # seconds of a product above which no larger one is tried, as in bf16 where nothing helps it
COPIED = 2**31
TRIES = 10


class Product(NamedTuple):
    """A large matrix product: how it runs, how many operations it is, and the seconds of the best of some tries."""

    run: Callable[[], object]
    operations: int
    seconds: float


def products(device: str) -> dict[str, Product]:
    """Gives those of fp32, bf16 and, on CUDA, tf32."""
    found = {"fp32": _largest(device, torch.float32), "bf16": _largest(device, torch.bfloat16)}
    if device == "cuda":
        found["tf32"] = _largest(device, torch.float32, tf32=True)
    return found


def copied_per_second(device: str) -> float:
    """Gives the bytes that a copy within the memory of a GPU reads and writes in a second, at best."""
    one, other = (torch.empty(COPIED // 4, device=device) for _ in range(2))
    return max(2 * COPIED / _seconds(device, lambda: other.copy_(one)) for _ in range(TRIES))


def _seconds(device: str, run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _largest(device: str, dtype: torch.dtype, *, tf32: bool = False) -> Product:
    size = SMALLEST
    while size < SIZES[device] and 8 * _product(device, dtype, size, tf32, 2).seconds < LONG:
        size *= 2
    return _product(device, dtype, size, tf32, TRIES)


def _product(device: str, dtype: torch.dtype, size: int, tf32: bool, tries: int) -> Product:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run() -> object:
        with digits(torch.device(device), tf32=tf32):
            return a @ b

    return Product(run, 2 * size**3, min(_seconds(device, run) for _ in range(tries)))


def operations(network: Network, rows: int, passes: int) -> int:
    """Gives those of a case, the ones before the first draw done once."""
    return (network.prefix + passes * network.suffix) * rows
