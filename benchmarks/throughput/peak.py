"""What the machine can do: the best speed of a large matrix product, and the least time that a case can take by it."""

import time
from typing import Any

import torch

from benchmarks.throughput.networks import Network

__all__ = ["limit_ms", "peaks"]

SIZES = {"cpu": 2048, "cuda": 8192}
TRIES = 10


def peaks(device: str) -> dict[str, float]:
    """Gives operations a second of fp32, bf16 and, on CUDA, tf32: the best of several products."""
    found = {"fp32": _best(device, torch.float32), "bf16": _best(device, torch.bfloat16)}
    if device == "cuda":
        settings: Any = torch.backends.cuda.matmul
        before = settings.fp32_precision
        settings.fp32_precision = "tf32"
        found["tf32"] = _best(device, torch.float32)
        settings.fp32_precision = before
    return found


def _best(device: str, dtype: torch.dtype) -> float:
    size = SIZES[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def limit_ms(network: Network, rows: int, passes: int, peak: float) -> float:
    """Gives milliseconds for all operations at the peak, those before the first draw done once."""
    return (network.prefix + passes * network.suffix) * rows / peak * 1e3
