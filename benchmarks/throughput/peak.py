"""What the machine can do: the best speed of a large matrix product, and the least time that a case can take by it."""

import time
from collections.abc import Callable

import torch

from benchmarks.throughput.networks import Network
from mcdrop.digits import digits

__all__ = ["copied_per_second", "limit_ms", "peaks"]

SIZES = {"cpu": 2048, "cuda": 8192}
SMALLEST, LONG = 256, 0.2  # seconds of a product above which no larger one is tried, as in bf16 where nothing helps it
COPIED = 2**31
TRIES = 10


def peaks(device: str) -> dict[str, float]:
    """Gives operations a second of fp32, bf16 and, on CUDA, tf32: the best of several products."""
    with digits(torch.device(device)):
        found = {"fp32": _best(device, torch.float32), "bf16": _best(device, torch.bfloat16)}
    if device == "cuda":
        with digits(torch.device(device), tf32=True):
            found["tf32"] = _best(device, torch.float32)
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


def _best(device: str, dtype: torch.dtype) -> float:
    size = SMALLEST
    while size < SIZES[device] and 8 * min(_products(device, dtype, size, 2)) < LONG:
        size *= 2
    return 2 * size**3 / min(_products(device, dtype, size, TRIES))


def _products(device: str, dtype: torch.dtype, size: int, tries: int) -> list[float]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return [_seconds(device, lambda: a @ b) for _ in range(tries)]


def limit_ms(network: Network, rows: int, passes: int, peak: float) -> float:
    """Gives milliseconds for all operations at the peak, those before the first draw done once."""
    return (network.prefix + passes * network.suffix) * rows / peak * 1e3
