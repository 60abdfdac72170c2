"""The networks of the throughput benchmark, and their floating-point operations.

To add one, write a function in ``architectures`` and add one entry to ``NETWORKS``; a test compares its figures with
those that torch counts. A multiplication with its addition is two operations; only matrix products and convolutions
count.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.throughput.architectures import encoder, head, lecture, recurrent, residual, wide

__all__ = ["NETWORKS", "Network", "draws_on", "wide_network"]


@dataclass(frozen=True)
class Network:
    """A network, its input and its cost.

    Attributes:
        title: what it is, in a few words.
        build: makes it, with the weights that torch's generator gives.
        shape: of one row of the input.
        prefix: operations a row before the first draw, which need doing once.
        suffix: operations a row and pass from the first draw on.
        chunk: rows times passes that a careful user would run at once on a CPU.
        row_bytes: about what one row of one pass holds in memory while it is computed.
    """

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    prefix: int
    suffix: int
    chunk: int
    row_bytes: int

    def made(self) -> nn.Module:
        """Gives the network in eval mode; the same weights every time."""
        torch.manual_seed(0)
        return self.build().eval()

    def rows(self, count: int) -> Tensor:
        """Gives made-up rows (N, ...); the same every time."""
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(1))


def draws_on(net: nn.Module) -> nn.Module:
    """Everything in training but the norm layers: what a careful user's own loop does."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return net


_CONV = 2 * 9 * 32 * 32  # a 3x3 convolution of one channel to one, on 32x32
_CONVOLUTIONS = _CONV * (3 * 32 + 32 * 32) + _CONV // 4 * (32 * 64 + 64 * 64) + _CONV // 16 * (64 * 128 + 128 * 128)
_STAGE = 2 * 16 * 16 * (9 * 16 * 32 + 27 * 32 * 32 + 16 * 32)  # the second of M4; the two after it cost the same
_STEPS = 2 * 64 * 256  # a weight of one output for every step of a sequence of M5
_LAYER = _STEPS * (3 * 256 + 256 + 2 * 1024) + 2 * _STEPS * 64  # products with weights, and of steps with steps


def wide_network(width: int) -> Network:
    """Gives M2 at any width."""
    return Network(
        title=f"MLP 784-{width}-{width}-{width}-10, dropout 0.5",
        build=lambda: wide(width),
        shape=(784,),
        prefix=2 * 784 * width,
        suffix=2 * (2 * width * width + width * 10),
        chunk=3200,
        row_bytes=4 * 4 * width,
    )


NETWORKS = {
    "M1": Network(
        "MLP 784-100-100-10, dropout 0.2", lecture, (784,), 2 * 784 * 100, 2 * (100 * 100 + 100 * 10), 3200, 4 * 1100
    ),
    "M2": wide_network(1024),
    "M3": Network(
        "six convolutions, dropout 0.5 in the head", head, (3, 32, 32),
        _CONVOLUTIONS, 2 * (2048 * 512 + 512 * 10), 800, 4 * 2 * 32 * 32 * 32,
    ),
    "M4": Network(
        "ResNet-18 of width 16, Dropout2d 0.1 in every block", residual, (3, 32, 32),
        _CONV * (3 * 16 + 16 * 16), _CONV * 3 * 16 * 16 + 3 * _STAGE + 2 * 128 * 10, 25, 4 * 3 * 16 * 32 * 32,
    ),
    "M5": Network(
        "transformer encoder, 4 layers of 256, 64 steps, dropout 0.1", encoder, (64, 256),
        _STEPS * (3 * 256 + 64), 4 * _LAYER - _STEPS * (3 * 256 + 64) + 2 * 256 * 10, 10, 4 * 3 * 64 * 1024,
    ),
    "M6": Network(
        "LSTM, 2 layers of 128, 32 steps, dropout 0.3", recurrent, (32, 64),
        32 * 2 * (64 + 128) * 512, 32 * 2 * (128 + 128) * 512 + 2 * 128, 1600, 4 * 32 * 128 * 6,
    ),
}  # fmt: skip
