"""Passes one by one with masks that are ready: where nobody looks on, nothing is drawn unseen."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captures import apart, loop, passes
from devices import on_each_device
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import UncontrolledDraw

X = torch.linspace(-1, 1, 20).reshape(5, 4)


class Branching(nn.Module):
    """Goes by a number that no two passes share, so that nothing holds several; what it does there others say."""

    def __init__(self, *, own: bool = False) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2)
        self.generator = torch.Generator().manual_seed(0) if own else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.first(x).relu())
        if float(h.sum()) > 1000:
            h = self.there(h)
        y: Tensor = self.last(h)
        return y

    def there(self, h: Tensor) -> Tensor:
        return h


class Drawing(Branching):
    def there(self, h: Tensor) -> Tensor:
        return h + torch.rand(h.shape, generator=self.generator, device=h.device)


class Dropping(Branching):
    def there(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5)


class Again(Branching):
    def there(self, h: Tensor) -> Tensor:
        dropped: Tensor = self.drop(h)
        return dropped


class Channels(nn.Module):
    """Drops in every way that a dropout layer can, at a rate of 0 too, in place, and shared by its places."""

    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.ModuleList([nn.Dropout(0.0), nn.Dropout1d(0.3), nn.Dropout(0.2, inplace=True)])
        self.wide = nn.ModuleList([nn.Dropout2d(0.3), nn.Dropout3d(0.4)])
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([x, x * 2, x - 1], 1)
        for drop in (*self.drops, *self.drops):
            h = drop(h + 1)
        h = self.wide[1](self.wide[0](h.unsqueeze(-1)).unsqueeze(-1)).flatten(2)
        if float(h.sum()) > 1e9:
            h = h * 0
        y: Tensor = self.last(h.sum(1))
        return y


def made(network: nn.Module, device: str = "cpu") -> mcdrop.Model:
    torch.manual_seed(0)
    model = mcdrop.wrap(network.to(device), example=X)
    assert model.audit.tier == "direct", model.audit.tier_reason
    return model


@pytest.mark.parametrize("network", [Branching, Channels])
@on_each_device
def test_they_are_the_passes_of_the_loop(network: type[nn.Module], device: str) -> None:
    model = made(network(), device)
    for rows in (X, X[:1], X.double()):
        np.testing.assert_array_equal(passes(model, rows, 30), loop(model, rows, 30).numpy())
    assert apart(passes(model, X, 30)[:, :1], passes(model, X[:1], 30)) < 1e-6


@pytest.mark.parametrize("network", [Drawing, Dropping, Again])
@pytest.mark.parametrize("own", [False, True])
@on_each_device
def test_a_draw_that_the_example_never_showed_is_no_answer(network: type[Branching], own: bool, device: str) -> None:
    if own and device == "cuda":
        pytest.skip("a generator of the CPU")
    model = made(network(own=own), device)
    assert passes(model, X, 5).isfinite().all()
    with pytest.raises(UncontrolledDraw, match="another way through these rows"):
        mcdrop.predict(model, X * 1e5, passes=5)
    assert passes(model, X, 5).isfinite().all()  # and nothing is left of it


def test_draws_of_other_threads_change_no_answer() -> None:
    model = made(Branching())
    expected, stop = passes(model, X, 20), threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(10)

    with torch.random.fork_rng():
        other = threading.Thread(target=draw)
        other.start()
        try:
            for _ in range(20):
                np.testing.assert_array_equal(passes(model, X, 20), expected)
        finally:
            stop.set()
            other.join()


class Outer(nn.Module):
    """Asks another model while it runs, whose dropout layers are not its own."""

    def __init__(self, inner: mcdrop.Model) -> None:
        super().__init__()
        self.drop, self.inner = nn.Dropout(0.5), inner

    def forward(self, x: Tensor) -> Tensor:
        asked = torch.from_numpy(mcdrop.predict(self.inner, x.detach().numpy(), passes=10).mean).float()
        dropped: Tensor = self.drop(x)
        return dropped[:, :2] * asked


def test_a_model_inside_of_a_network_answers_as_outside() -> None:
    inner = made(Branching())
    model = mcdrop.wrap(Outer(inner), example=X)
    asked = torch.from_numpy(mcdrop.predict(inner, X, passes=10).mean).float()
    kept = passes(model, X, 16) / (X[:, :2] * asked)
    np.testing.assert_allclose(kept, kept.round(), atol=1e-5)  # each is 0, or 1 / (1 - 0.5)
    assert set(np.unique(kept.round())) == {0.0, 2.0}
