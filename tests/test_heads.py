"""Attention without turns of its axes: the passes of the network's own code, with fewer copies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captures import Operations, apart, loop, passes, program_of, stacks_of
from devices import on_each_device
from torch import Tensor, nn

import mcdrop
from mcdrop.plan import straight

EACH: dict[str, Any] = {"dropout": 0.2, "batch_first": True}


class Net(nn.Module):
    """Layers and what is done with them, on rows of six steps of eight numbers."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.run, self.layers, self.linear = run, nn.ModuleList(layers), nn.Linear(8, 8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.run(self, x).mean(1))
        return out


def _encoder(**more: Any) -> list[nn.Module]:
    return [nn.TransformerEncoderLayer(8, 2, 16, **EACH | more) for _ in range(2)]


def _one_by_one(net: Net, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
    return x


def _steps_first(net: Net, x: Tensor) -> Tensor:
    return _one_by_one(net, x.transpose(0, 1)).transpose(0, 1)


def _read_twice(net: Net, x: Tensor) -> Tensor:
    turned = net.drop(x).unflatten(1, (2, 3)).transpose(1, 2)
    out: Tensor = net.linear(turned) + turned
    return out.transpose(1, 2).flatten(1, 2)


def _turned_with_its_units(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.layers[0](net.drop(x).transpose(1, 2))
    return out.transpose(1, 2)


def _turned_and_back(net: Net, x: Tensor) -> Tensor:
    h = net.linear(net.drop(x).unflatten(1, (2, 3)).transpose(-3, -2))
    return torch.relu(h).transpose(1, 2).flatten(1, 2)


def _turned_where_rows_are(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.linear(net.drop(x).transpose(0, 1))
    return out.transpose(0, 1)


NETS: dict[str, Callable[[], Net]] = {
    "an encoder": lambda: Net(_one_by_one, *_encoder()),
    "norms first": lambda: Net(_one_by_one, *_encoder(norm_first=True, activation=F.gelu)),
    "steps first": lambda: Net(_steps_first, *_encoder(batch_first=False)),
    "a decoder": lambda: Net(
        lambda net, x: net.layers[0](x[:, :4], net.drop(x)), nn.TransformerDecoderLayer(8, 4, 16, **EACH)
    ),
    "one head": lambda: Net(_one_by_one, nn.TransformerEncoderLayer(8, 1, 16, **EACH)),
    "as many heads as units": lambda: Net(_one_by_one, nn.TransformerEncoderLayer(8, 8, 16, **EACH)),
    "without biases": lambda: Net(_one_by_one, *_encoder(bias=False)),
    "more keys": lambda: Net(
        lambda net, x: net.layers[0](x, x, net.drop(x))[0],
        nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, **EACH),
    ),
    "keys of another width": lambda: Net(
        lambda net, x: net.layers[0](x, x[..., :5], net.drop(x)[..., :3])[0],
        nn.MultiheadAttention(8, 2, kdim=5, vdim=3, **EACH),
    ),
    "turned and read twice": lambda: Net(_read_twice),
    "turned with its units": lambda: Net(_turned_with_its_units, nn.Linear(6, 6)),
    "turned and back": lambda: Net(_turned_and_back),
    "turned where rows are": lambda: Net(_turned_where_rows_are),
}


@pytest.mark.parametrize("name", NETS)
@on_each_device
def test_passes_are_those_of_the_network(name: str, device: str) -> None:
    torch.manual_seed(0)
    net, x = NETS[name]().eval().to(device), torch.randn(8, 6, 8, device=device)
    model = mcdrop.wrap(net, example=x[:4])
    assert model.audit.tier == "captured", model.audit.tier_reason
    for rows, count in ((8, 3), (6, 2), (2, 6), (1, 4)):  # also as many as there are steps, or heads
        assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5


@pytest.mark.parametrize("name", ["an encoder", "norms first"])
def test_heads_are_all_that_is_copied(name: str) -> None:
    """Queries, keys, values and what comes out, since products read them in order."""
    torch.manual_seed(0)
    x = torch.randn(5, 6, 8)
    program, rows = program_of(model := mcdrop.wrap(NETS[name]().eval(), example=x[:4]), x)
    masks = program.masks(stacks_of(model, x, 3))
    with torch.no_grad(), Operations() as ran:  # in inference mode torch does not say what it copies
        straight(program, masks, rows, 3)
    copied = [args[0] for args in ran.named("aten.clone")]
    assert len(copied) == 4 * 2
    assert {one.shape[-1] for one in copied} == {4, 6}  # units of a head; keys are turned
