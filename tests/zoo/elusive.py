"""Draws that are hard to see or hard to reach: behind closures, hooks, wrappers, threads, and outside of the tree.

Most of them have a plain dropout besides. A tool that misses the elusive draw still finds that one, and so gives a
variance that looks right and is too small.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .awkward import TwoLayers, rows
from .mlp import layered
from .specimen import Built, specimen

# Outside of the tree, or reached past it.


class InContainer(TwoLayers):
    """Calls its layers through a dict and a bound method, which a copy of the tree must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, Any] = {"first": self.first, "rest": [self.drop, self.last]}
        self.activate = self.dropped_relu

    def dropped_relu(self, x: Tensor) -> Tensor:
        return F.dropout(x.relu(), 0.2, self.training)

    def forward(self, x: Tensor) -> Any:
        drop, last = self.steps["rest"]
        return last(drop(self.activate(self.steps["first"](x))))


@specimen(draws=2, note="layers called through a dict, a list and a bound method")
def called_through_container() -> Built:
    return InContainer(), rows()


class Unregistered(nn.Module):
    """Holds a dropout in a plain list and nowhere else: eval() does not reach it, so it is always live."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.drops = [nn.Dropout(0.3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drops[0](self.first(x).relu()))  # type: ignore[no-any-return]


@specimen(draws=1, draws_in_eval=1, note="a dropout in a plain list, which eval() cannot reach")
def unregistered_dropout() -> Built:
    return Unregistered(), rows()


@specimen(draws=1, note="a forward hook that drops by the flag of the module it is given")
def hook() -> Built:
    module, example = layered(nn.ReLU())
    module.get_submodule("1").register_forward_hook(lambda m, _, out: F.dropout(out, 0.3, m.training))
    return module, example


@specimen(draws=1, note="a forward hook that drops by the flag of a module it has closed over")
def closure_hook() -> Built:
    module, example = layered(nn.ReLU())
    module.get_submodule("1").register_forward_hook(lambda _, __, out: F.dropout(out, 0.3, module.training))
    return module, example


class Activated(TwoLayers):
    """A plain dropout, and an activation that drops by the network's flag and is kept in an attribute."""

    activate: Callable[[Tensor], Tensor]

    def dropped_relu(self, x: Tensor, rate: float = 0.2) -> Tensor:
        return F.dropout(x.relu(), rate, self.training)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.drop(self.activate(self.first(x))))


class ByPartial(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.activate = partial(self.dropped_relu, rate=0.4)


class ByLambda(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.activate = lambda x: F.dropout(x.relu(), 0.4, self.training)


class Helper:
    """An object that is no module and knows the network."""

    def __init__(self, network: Activated) -> None:
        self.network = network

    def __call__(self, x: Tensor) -> Tensor:
        return self.network.dropped_relu(x, rate=0.4)


class ByHelper(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.activate = Helper(self)


@specimen(draws=2, note="a partial of a bound method drops as well")
def partial_method() -> Built:
    return ByPartial(), rows()


@specimen(draws=2, note="a lambda that has closed over self drops as well")
def lambda_attribute() -> Built:
    return ByLambda(), rows()


@specimen(draws=2, note="a helper object that holds the network drops as well")
def helper_object() -> Built:
    return ByHelper(), rows()


class Threaded(TwoLayers):
    """Runs its first layer in another thread, as data parallelism does, and drops there."""

    def forward(self, x: Tensor) -> Any:
        with ThreadPoolExecutor(1) as pool:
            h = pool.submit(lambda: F.dropout(self.first(x).relu(), 0.3, self.training)).result()
        return self.last(self.drop(h))


@specimen(
    draws=1,
    foreign=True,
    note="one of two draws happens in another thread",
    refused="what watches this thread does not see the other one",
)
def other_thread() -> Built:
    return Threaded(), rows()


# Wrappers of torch.


@specimen(draws=1, note="nn.DataParallel without a GPU")
def data_parallel() -> Built:
    module, example = layered(nn.ReLU(), nn.Dropout(0.3))
    return nn.DataParallel(module), example


@specimen(draws=1, note="torch.compile, by a backend that runs the graph as it is")
def compiled() -> Built:
    module, example = layered(nn.ReLU(), nn.Dropout(0.3))
    wrapped: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return wrapped, example


@specimen(draws=2, note="a block compiled by torch.compile inside a plain network")
def compiled_block() -> Built:
    module, example = layered(nn.ReLU(), nn.Dropout(0.3))
    block: nn.Module = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3)), backend="eager")  # type: ignore[assignment]
    return nn.Sequential(module.get_submodule("0"), block, *list(module.children())[1:]), example


@specimen(draws=1, note="compiled in place by Module.compile()")
def compiled_in_place() -> Built:
    module, example = layered(nn.ReLU(), nn.Dropout(0.3))
    module.compile(backend="eager")
    return module, example
