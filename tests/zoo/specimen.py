"""What a specimen of the zoo is: a small network, rows to feed it, and what is known to be true about it.

A specimen is written as a function that builds the network, under ``@specimen(draws=..., note=...)``. Its name is the
function's name, its family the module it stands in. To add one, add one function to a family.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import torchvision_shim

__all__ = ["ROWS", "Built", "Example", "Specimen", "call", "library", "settled", "specimen", "specimens", "why_missing"]

ROWS = 4
"""Rows of every example."""

Example = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Built = tuple[nn.Module, Example]


@dataclass(frozen=True)
class Specimen:
    """A network, and the truth about its random draws.

    ``draws`` counts the random operations of one forward in the network's proper stochastic behaviour: dropout and its
    like are live, statistics stand still, the output has the form that it has in eval. ``draws_in_eval`` counts those
    that happen in plain eval already; ``idle`` counts those of ``draws`` that reach no output. Draws that torch's
    dispatcher cannot see in this thread (by another library's generator, in another thread) are not counted;
    ``foreign`` says that there are some.

    ``live`` lists the submodules whose training flag brings that behaviour about ("" is the root); None means all but
    normalisations. ``around`` is for what a flag cannot do: a context manager entered around every reference pass.

    ``refused`` says why nobody can turn the draws into masks, so that an honest tool must refuse the network.
    ``row_coupled``: a row's answer depends on its neighbours in the batch. ``mean_preserving``: with each draw
    replaced by its expectation the output is that of plain eval. (False also where a mask compares a uniform draw with
    the rate: the mask keeps the mean, but the expectation of a uniform does not tell.) ``output`` picks one tensor
    where there are several.
    """

    name: str
    family: str
    draws: int
    note: str
    maker: Callable[[], Built] = field(repr=False)
    draws_in_eval: int = 0
    idle: int = 0
    foreign: bool = False
    refused: str | None = None
    row_coupled: bool = False
    mean_preserving: bool = True
    requires: tuple[str, ...] = ()
    live: tuple[str, ...] | None = None
    around: Callable[[nn.Module], AbstractContextManager[object]] | None = None
    output: str | Callable[[Any], Tensor] | None = None

    def build(self) -> Built:
        """Gives the network in eval and an example of four rows; the same numbers every time."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the libraries
            torch.manual_seed(0)
            module, example = self.maker()
        return module.eval(), example

    def pick(self, result: Any) -> Tensor:
        """Gives the one tensor that counts in what the network returned."""
        if callable(self.output):
            return self.output(result)
        if self.output is not None:
            chosen: Tensor = result[self.output]
            return chosen
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if len(tensors) != 1:
            raise ValueError(f"{self.name} returns {len(tensors)} tensors; say which by output=")
        return tensors[0]


def specimen(*, draws: int, note: str, **facts: Any) -> Callable[[Callable[[], Built]], Specimen]:
    """Turns a function that builds a network and its example into a specimen; ``facts`` are fields of ``Specimen``."""

    def register(maker: Callable[[], Built]) -> Specimen:
        family = maker.__module__.rpartition(".")[2]
        return Specimen(name=maker.__name__, family=family, draws=draws, note=note, maker=maker, **facts)

    return register


def specimens(namespace: Mapping[str, Any]) -> list[Specimen]:
    """Gives the specimens of a family module, in the order in which they stand there."""
    return [value for value in namespace.values() if isinstance(value, Specimen)]


def call(module: nn.Module, example: Example) -> Any:
    """Runs the network on an example: a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
    if isinstance(example, dict):
        return module(**example)
    return module(*example) if isinstance(example, tuple) else module(example)


def library(name: str) -> Any:
    """Imports a module of an optional library; untyped, and quiet about its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.split(".")[0] in ("torchvision", "timm"):
            torchvision_shim.load()
        return importlib.import_module(name)


@cache
def why_missing(name: str) -> str | None:
    """Gives the reason why an optional library cannot be used here, None if it can."""
    try:
        library(name)
    except ImportError as error:
        return f"{name} is not installed ({error})"
    return None


def settled(module: nn.Module, inputs: Tensor) -> nn.Module:
    """Gives the network with running statistics learnt from ``inputs``, in eval.

    Untrained statistics (mean 0, variance 1) let a deep network's signal die out, and then no draw would show in the
    output. Use other rows than the example's: a normalisation that falls back to batch statistics must be seen.
    """
    module.eval()
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with torch.no_grad():
        module(inputs)
    for norm in norms:
        norm.training, norm.momentum = False, 0.1
    return module
