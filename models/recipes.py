"""How each reference model is trained: data and a fresh network in, a trained network and its reference rows out.

The global random state is left as it was found, and the same call gives the same weights each time.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import data, networks

__all__ = ["Progress", "Trained", "digits", "mnist", "noisy_line"]

Progress = Callable[[int, int], None]  # called with the epochs done and the epochs in all


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode, and rows (N, F) of the same kind that the training has not seen."""

    network: nn.Module
    reference: NDArray[np.float32]


def noisy_line(progress: Progress, *, epochs: int = 1500) -> Trained:
    """Fits the line net to 50 noisy points, all of them in every step."""
    x, y = data.noisy_line_data()
    with _seeded(0):
        network = networks.noisy_line()
        _fit(network, nn.MSELoss(), x, y, epochs=epochs, batch=len(x), settle=False, progress=progress)
    return Trained(network, data.line_positions(1000))


def digits(progress: Progress, *, epochs: int = 40) -> Trained:
    """Fits the digit classifier to scikit-learn's digits."""
    return _classifier(data.digits_data(), epochs=epochs, batch=64, progress=progress)


def mnist(progress: Progress, *, epochs: int = 5) -> Trained:
    """Fits the digit classifier to MNIST."""
    return _classifier(data.mnist_data(), epochs=epochs, batch=256, progress=progress)


def _classifier(split: data.Split, *, epochs: int, batch: int, progress: Progress) -> Trained:
    x, y = split.x_train, split.y_train
    with _seeded(0):
        network = networks.digits(inputs=x.shape[1])
        _fit(network, nn.CrossEntropyLoss(), x, y, epochs=epochs, batch=batch, settle=True, progress=progress)
    return Trained(network, split.x_reference)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Lends the global generator, the only one that dropout can draw from, and one thread; gives both back.

    With one thread sums have the same order on every machine, and nets as small as these are trained faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _fit(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: NDArray[Any],
    y: NDArray[Any],
    *,
    epochs: int,
    batch: int,
    settle: bool,
    progress: Progress,
) -> None:
    """Trains in place with Adam at 0.01, which falls to 0 if it is to ``settle``; leaves the network in eval mode."""
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    falling = (lambda epoch: (1 + math.cos(math.pi * epoch / epochs)) / 2) if settle else (lambda _: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)
    network.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(inputs)).split(batch):
            optimizer.zero_grad()
            loss(network(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        schedule.step()
        progress(epoch + 1, epochs)
    network.eval()
