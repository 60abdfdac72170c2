"""Generators of random numbers: which move out of sight, what stays as it was, which are seeded in every pass."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcdrop.intercept import Interception

__all__ = ["Foreign", "Noted", "moved_on", "noting", "own_generator"]

Noted = list[tuple[torch.Generator, Tensor]]  # generators that draws were given, with their states then


class Foreign:
    """Notices draws from global generators that happen out of sight."""

    def __init__(self) -> None:
        self._before = self._state()

    @staticmethod
    def _state() -> tuple[Any, Any, bytes]:
        return random.getstate(), _numpy_numbers(), torch.get_rng_state().numpy().tobytes()

    def moved(self, *, known: bool) -> list[tuple[str, str]]:
        """Names the generators that moved; torch's own only if no operation of this thread explains it."""
        names = ("Python's random", "numpy.random", "torch's generator in another thread")
        pairs = zip(names, self._before, self._state(), strict=True)
        return [("", name) for name, before, after in pairs if before != after and not (known and "torch" in name)]


def _numpy_numbers() -> tuple[str, bytes]:
    """The state of numpy's global generator, to see whether it moved."""
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return repr(numpy["state"]["pos"]), numpy["state"]["key"].tobytes()


@contextmanager
def own_generator() -> Iterator[None]:
    """Leaves all global generators as they were, whatever escapes control inside."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    before = _numpy_numbers()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        # only where it moved, so that what other threads drew meanwhile stays drawn
        if random.getstate() != python:
            random.setstate(python)
        if _numpy_numbers() != before:
            np.random.set_state(numpy)  # noqa: NPY002


def noting(rules: Mapping[Callable[..., Any], Callable[..., Any]], noted: Noted) -> dict[Any, Callable[..., Any]]:
    """Gives the same rules, which note the generator that a draw is given."""

    def noted_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
        def run(mode: Interception, *args: Any, **kwargs: Any) -> Any:
            generator = kwargs.get("generator")
            if generator is not None:
                noted.append((generator, generator.get_state()))
            return rule(mode, *args, **kwargs)

        return run

    return {function: noted_rule(rule) for function, rule in rules.items()}


@contextmanager
def moved_on(noted: Noted) -> Iterator[None]:
    """Lets generators be some numbers further for the while; one that is then found as it was has been seeded anew."""
    before = [(generator, generator.get_state()) for generator, _ in noted]
    for generator, _ in before:
        torch.rand(1, generator=generator, device=generator.device)
    try:
        yield
    finally:
        for generator, state in reversed(before):
            generator.set_state(state)
