"""What hooks, objects and classes of a network collect can be read, copied and saved after a network is wrapped."""

import collections
import copy
import functools
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mcdrop

X = torch.linspace(-1, 1, 12).reshape(3, 4)
GLOBAL: list[Tensor] = []


class Called:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output.detach())

    def before(self, module: nn.Module, args: Any) -> None:
        self.kept.append(args[0].detach())

    def named(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.kept.append(output.detach())


def by_object(layer: nn.Module) -> list[Tensor]:
    layer.register_forward_hook(held := Called())
    return held.kept


def by_method_before(layer: nn.Module) -> list[Tensor]:
    held = Called()
    layer.register_forward_pre_hook(held.before)
    return held.kept


def by_method_with_names(layer: nn.Module) -> list[Tensor]:
    held = Called()
    layer.register_forward_hook(held.named, with_kwargs=True)
    return held.kept


def by_closure(layer: nn.Module) -> list[Tensor]:
    kept: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    return kept


def by_variable(layer: nn.Module) -> Callable[[], list[Tensor]]:
    last = X

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal last
        last = output.detach()

    layer.register_forward_hook(keep)
    return lambda: [last]


def by_partial(layer: nn.Module) -> Any:
    kept: collections.deque[Tensor] = collections.deque()
    layer.register_forward_hook(
        functools.partial(lambda kept, module, args, output: kept.append(output.detach()), kept)
    )
    return kept


def by_global(layer: nn.Module) -> list[Tensor]:
    GLOBAL.clear()
    layer.register_forward_hook(lambda module, args, output: GLOBAL.append(output.detach()))
    return GLOBAL


class Layer(nn.Linear):
    """Keeps what it gives in its class."""

    log: list[Tensor] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.log.append(out.detach())
        return out


class Branch(nn.Sequential):
    """Decides by a value, which no graph can hold: by one of all passes, so that they run in one vmap."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return out * 2 if float(self.get_parameter("0.weight").sum()) > 1e9 else out


HOOKS: list[Callable[[nn.Module], Any]] = [
    by_object, by_method_before, by_method_with_names, by_closure, by_variable, by_partial, by_global,
]  # fmt: skip


def layers() -> list[nn.Module]:
    return [nn.Linear(4, 8), nn.Dropout(0.5), Layer(8, 2)]


@pytest.mark.parametrize("kind", [nn.Sequential, Branch], ids=["captured", "vmap"])
@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_hook_keeps_are_plain_tensors(kind: Callable[..., nn.Module], hook: Callable[[nn.Module], Any]) -> None:
    Layer.log.clear()
    net = kind(*layers())
    kept = hook(net.get_submodule("2"))
    model = mcdrop.wrap(net, example=X)
    assert model.audit.tier == ("captured" if kind is nn.Sequential else "vmap")
    mcdrop.predict(model, X, passes=5)
    found = [*(kept() if callable(kept) else kept), *Layer.log]
    assert found
    assert all(tensor.shape in ((3, 8), (3, 2)) or tensor.shape[0] != 3 for tensor in found)
    assert all(len(tensor.numpy()) == len(tensor) for tensor in found)  # of any other kind torch gives no numbers
    copy.deepcopy(found)
    torch.save(found, io.BytesIO())


class Makes(collections.OrderedDict[str, Any]):
    """Gives a new thing at each reading, as tables of activations in transformers do."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


ACTIVATIONS = Makes(relu=nn.ReLU)
LOG: list[object] = []


class Reads(nn.Module):
    """Its forward reads what is everybody's: a table of classes, and a log that others write."""

    table = ACTIVATIONS

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.acts = Branch(*layers()), ACTIVATIONS

    def forward(self, x: Tensor) -> Tensor:
        LOG.append(len(LOG))  # as another thread may
        out: Tensor = ACTIVATIONS["relu"](self.inner(x))
        return out


def test_what_is_everybody_s_stays_as_it_is() -> None:
    LOG.clear()
    net = Reads()
    net.inner[1].register_forward_hook(lambda module, args, output: LOG.append(output.detach()))
    model = mcdrop.wrap(net, example=X)
    mcdrop.predict(model, X, passes=5)
    assert OrderedDict.__getitem__(ACTIVATIONS, "relu") is nn.ReLU
    numbers = [one for one in LOG if isinstance(one, int)]
    assert len(numbers) > 5
    assert all(len(one.numpy()) == len(one) for one in LOG if isinstance(one, Tensor))
    with torch.no_grad():
        assert net(X).shape == (3, 2)
