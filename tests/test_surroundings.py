"""What stands around a call, such as torch's casts and defaults, is no part of a model: answers stay as they are."""

from collections.abc import Iterator

import pytest
import torch
from captures import apart, made
from devices import on_each_device
from torch import Tensor, nn

import mcdrop


@pytest.fixture
def defaults() -> Iterator[None]:
    """Puts torch's defaults back."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


class LowRank(nn.Module):
    """A layer whose weight is a product (Hu et al. 2021): what follows from weights alone is kept from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(4, 16), nn.Linear(16, 2), nn.Dropout(0.4)
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.tall, self.wide = nn.Parameter(torch.randn(16, 3)), nn.Parameter(torch.randn(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(self.drop(self.first(x).relu()), self.weight + self.tall @ self.wide)
        out: Tensor = self.last(self.drop(h.relu()))
        return out


@on_each_device
def test_casts_that_are_on_around_a_call_change_nothing_in_it_and_later(device: str) -> None:
    """All digits are what precision="fp32" means, also of what is computed once and kept."""
    torch.manual_seed(0)
    net, x = LowRank().eval().to(device), torch.randn(9, 4, device=device)
    model = mcdrop.wrap(net, example=x)
    assert model.audit.tier == "captured", model.audit.tier_reason
    with torch.no_grad():
        net.tall.mul_(1.5)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = [mcdrop.predict(model, x, passes=40) for _ in range(3)]  # a GPU's recording among them
        anew = mcdrop.predict(mcdrop.wrap(net, example=x), x, passes=40)
    outside = mcdrop.predict(model, x, passes=40)
    with torch.no_grad():
        expected = net(x).cpu()
    for found in (*inside, anew, outside):
        assert apart(found.deterministic, expected) < 1e-5
        assert apart(found.mean, outside.mean) < 1e-5


class Casts(nn.Sequential):
    """Enters bfloat16 by itself, as a network does that was trained so."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self:
                x = layer(x)
        return x.float()


def test_a_network_that_casts_by_itself_goes_on_doing_so() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(4, 200), nn.ReLU(), nn.Dropout(0.4), nn.Linear(200, 2)
    plain, casts = nn.Sequential(*layers).eval(), Casts(*layers).eval()
    x = torch.randn(9, 4)
    expected = casts(x).detach()
    assert apart(plain(x).detach(), expected) > 1e-4
    model = mcdrop.wrap(casts, example=x)
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            assert apart(mcdrop.predict(model, x, passes=5).deterministic, expected) < 1e-6


def test_another_default_type_or_device_changes_nothing(defaults: None) -> None:
    net, x = made("mlp")
    rows, before = x.numpy(), mcdrop.wrap(net, example=x[:4])
    expected, later, latest = (mcdrop.predict(before, x, seed=seed).mean for seed in range(3))
    torch.set_default_dtype(torch.float64)
    within = mcdrop.wrap(net, example=x[:4])
    assert apart(mcdrop.predict(within, rows).mean, expected) < 1e-6
    assert apart(mcdrop.predict(before, rows, seed=2).mean, latest) < 1e-6
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")  # which holds no numbers: what is made there by mistake is found out
    assert apart(mcdrop.predict(within, rows, seed=1).mean, later) < 1e-6
