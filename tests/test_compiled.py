"""Compiled passes: what torch's compiler makes of them is what the loop gives."""

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captures import apart, loop, passes
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mcdrop
from mcdrop.errors import ModelRefused

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_COMPILER = any(shutil.which(name) for name in ("g++", "clang++"))
_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
_cpu = [pytest.mark.skipif(not _COMPILER, reason="torch compiles for the CPU with g++ or clang++, and finds neither")]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=_cpu), pytest.param("cuda", marks=_cuda)])
def test_compiled_passes_are_those_of_the_loop(device: str, recwarn: pytest.WarningsRecorder) -> None:
    """For several sizes, with new weights, with the output of plain eval, and without a warning."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.4),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Dropout(0.2),
        nn.Linear(8, 2),
    )
    net, x = net.eval().to(device), torch.randn(40, 4, device=device)
    model = mcdrop.wrap(net, example=x[:4], compile=True)
    assert model.audit.tier == "captured"
    for rows, count in ((4, 3), (1, 2), (17, 5), (40, 11), (2, 3)):
        got = passes(model, x[:rows], count)
        assert apart(got, loop(model, x[:rows], count)) < 1e-5, (rows, count)
        assert torch.equal(passes(model, x[:rows], count), got)
    with torch.no_grad():
        net.get_parameter("6.bias").add_(1)
        expected = net(x).cpu()
    assert apart(passes(model, x[:7], 3), loop(model, x[:7], 3)) < 1e-5
    assert apart(mcdrop.predict(model, x, passes=9).deterministic, expected) < 1e-5
    assert [str(warning.message) for warning in recwarn.list] == []


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=_cpu), pytest.param("cuda", marks=_cuda)])
def test_convolutions_before_the_first_draw_are_compiled(device: str) -> None:
    torch.manual_seed(0)
    layers = [layer for a in (2, 4, 4, 4) for layer in (nn.Conv2d(a, 4, 3, padding=1), nn.ReLU())]
    trunk = (*layers[:4], nn.MaxPool2d(2), *layers[4:], nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    net = nn.Sequential(*trunk, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.4), nn.Linear(4, 2))
    net, x = net.eval().to(device), torch.randn(9, 2, 8, 8, device=device)
    model = mcdrop.wrap(net, example=x[:4], compile=True)
    for rows, count in ((4, 3), (9, 5)):
        assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5, (rows, count)


class _Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.LSTM(3, 8, num_layers=2, dropout=0.4, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps: Tensor = self.layers(x)[0]
        output: Tensor = self.out(steps[:, -1])
        return output


class _Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.long, self.short = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1, stride=2)
        self.drop, self.out = nn.Dropout2d(0.3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.first(x)).relu())
        hidden = self.drop((self.long(hidden) + self.short(hidden)).relu())
        output: Tensor = self.out(F.interpolate(hidden, scale_factor=2, mode="bilinear").square().mean((2, 3)))
        return output


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=_cpu), pytest.param("cuda", marks=_cuda)])
@pytest.mark.parametrize(("net", "shape"), [(_Steps, (5, 3)), (_Strided, (2, 8, 8))], ids=["steps", "strided"])
def test_what_the_compiler_does_not_know_by_itself(net: type[nn.Module], shape: tuple[int, ...], device: str) -> None:
    """Recurrent layers and what is done to images, which it calls as they are, and strides, whose sizes it is told."""
    torch.manual_seed(0)
    module, x = net().eval().to(device), torch.randn(9, *shape, device=device)
    model = mcdrop.wrap(module, example=x[:4], compile=True)
    before = counters["stats"]["unique_graphs"]
    for rows, count in ((4, 3), (9, 5), (1, 4)):
        assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5, (rows, count)
    assert counters["stats"]["unique_graphs"] == before
    assert not any(hasattr(tensor, "_dynamo_static_indices") for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=_cpu), pytest.param("cuda", marks=_cuda)])
def test_no_request_waits_for_the_compiler(device: str) -> None:
    """All is compiled at wrap, also where rows and units are equally many; rows may be a part of another tensor."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 2)).eval().to(device)
    x = torch.randn(300, 4, device=device)
    model = mcdrop.wrap(net, example=x[:8], compile=True)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    for rows, count in ((8, 100), (1, 100), (40, 64), (32, 32), (1, 7), (300, 20)):
        mcdrop.predict(model, x[:rows], passes=count)
        mcdrop.predict(model, x[:rows].cpu().numpy(), passes=count)
    assert counters["stats"]["unique_graphs"] == before


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * 2 if float(x.sum()) > 0 else out


def test_what_cannot_be_captured_cannot_be_compiled() -> None:
    with pytest.raises(ModelRefused, match="compile=True needs the network as one graph, and it cannot be captured: "):
        mcdrop.wrap(ByValue().eval(), example=torch.ones(4, 4), compile=True)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=_cpu), pytest.param("cuda", marks=_cuda)])
def test_compiled_passes_do_not_mind_torchs_newer_switches(device: str) -> None:
    """Once they are set, torch refuses to say how the older ones stand."""
    matmul: Any = torch.backends.cuda.matmul
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 2)).eval().to(device)
    x = torch.randn(5, 4, device=device)
    model, before = mcdrop.wrap(net, example=x, compile=True), matmul.fp32_precision
    expected = passes(model, x, 3)
    try:
        matmul.fp32_precision = "tf32"
        assert torch.equal(passes(model, x, 3), expected)
    finally:
        matmul.fp32_precision = before
