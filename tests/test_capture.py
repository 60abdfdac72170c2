"""Capture: one graph for all sizes, equal to the loop; what cannot be captured is said, and nothing is changed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from captures import NETS, apart, backend_of, loop, made, passes, wrapped
from devices import on_each_device
from factories import Tied
from torch import Tensor, nn

import mcdrop

SIZES = ((1, 2), (1, 9), (2, 2), (2, 3), (3, 5), (5, 5), (7, 4), (64, 2))
every = pytest.mark.parametrize("name", NETS)

# -- sizes -------------------------------------------------------------------------------------------------------------


@every
@on_each_device
def test_one_capture_serves_any_number_of_rows_and_passes(name: str, device: str) -> None:
    model, x = wrapped(name, device)
    assert model.audit.tier == "captured", model.audit.tier_reason
    for rows, count in SIZES:
        assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5, (rows, count)


def test_a_row_that_hardly_moves_is_no_measure_of_the_others() -> None:
    """Its rounding, beside that of the others, would look like another answer where few digits tell it from none."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 2, bias=False),
    )  # fmt: skip
    x = torch.randn(8, 3, 8, 8)
    x[0] *= 1e-6
    for rows in (x, x.flip(0)):
        model = mcdrop.wrap(net.eval(), example=rows, tuning={})
        assert model.audit.tier == "captured", model.audit.tier_reason


class Counted(nn.Module):
    """Notes every run of its own code."""

    def __init__(self, ran: list[int]) -> None:
        super().__init__()
        self.body, self.ran = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1)), ran

    def forward(self, x: Tensor) -> Tensor:
        self.ran.append(len(x))
        out: Tensor = self.body(x)
        return out


@on_each_device
def test_the_code_of_a_captured_network_is_not_run_again(device: str) -> None:
    ran: list[int] = []
    x = torch.linspace(-1, 1, 80, device=device).reshape(20, 4)
    model = mcdrop.wrap(Counted(ran).to(device), example=x[:5])
    ran.clear()
    for rows, count in ((20, 30), (1, 2), (3, 100)):
        mcdrop.predict(model, x[:rows], passes=count)
    assert ran == []


class Branches(nn.Module):
    """Takes another way through many rows than through few."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * 3 if x.shape[0] > 16 else out


@pytest.mark.parametrize("first", [4, 40])
@on_each_device
def test_a_network_that_asks_for_the_number_of_rows_gets_its_way_on_both_sides(first: int, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4, device=device)
    model = mcdrop.wrap(Branches().to(device), example=x[:first])
    few, many = (passes(model, x[:rows], 3) for rows in (16, 17))
    assert apart(many[:, :16], 3 * few) < 1e-5
    for rows in (1, 16, 17, 40):
        assert apart(passes(model, x[:rows], 3), loop(model, x[:rows], 3)) < 1e-5


class LooksAtMany(Branches):
    """Decides by values that a mask has changed, with many rows only: then no batch of passes can go its way."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * 3 if x.shape[0] > 16 and float(out.abs().sum()) > 0 else out


@on_each_device
def test_a_way_that_no_batch_of_passes_can_go_is_gone_pass_by_pass(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(17, 4, device=device)
    model = mcdrop.wrap(LooksAtMany().to(device), example=x[:4])
    assert model.audit.tier == "captured"
    for rows in (4, 17):
        assert apart(passes(model, x[:rows], 3), loop(model, x[:rows], 3)) < 1e-5


# -- what is not captured ----------------------------------------------------------------------------------------------


class ByValue(Branches):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * 2 if float(x.sum()) > 0 else out


class ByMask(Branches):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body[1](self.body[0](x))
        return self.body[2](h * 2 if bool((h[0] == 0).any()) else h)  # type: ignore[no-any-return]


class RowByRow(Branches):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(torch.stack([row * 2 for row in x]))
        return out


UNCAPTURED: dict[str, Callable[[], nn.Module]] = {
    "decides by an input": ByValue,
    "decides by a mask": ByMask,
    "goes row by row": RowByRow,
}


@pytest.mark.parametrize("make", UNCAPTURED.values(), ids=UNCAPTURED)
@on_each_device
def test_what_cannot_be_captured_says_why_and_answers_as_the_loop(make: Callable[[], nn.Module], device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4, device=device)
    model = mcdrop.wrap(make().to(device), example=x[:4])
    assert model.audit.tier != "captured"
    assert "not captured: " in model.audit.tier_reason
    assert len(model.audit.tier_reason.split("not captured: ")[1]) > 10
    for rows in (1, 2, 4, 9):
        assert apart(passes(model, x[:rows], 4), loop(model, x[:rows], 4)) < 1e-5


# -- weights of today --------------------------------------------------------------------------------------------------


def _in_place(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5).add_(0.1)


def _loaded(net: nn.Module) -> None:
    net.load_state_dict({k: v * 1.25 if v.is_floating_point() else v for k, v in net.state_dict().items()})


def _through_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.mul_(0.5)


def _new_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 0.75


def _replaced(net: nn.Module) -> None:
    for module in net.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(parameter.detach() * 1.25 + 0.1))


def _buffers(net: nn.Module) -> None:
    for parameter in net.parameters():  # for networks without buffers
        parameter.data.add_(0.01)
    for buffer in net.buffers():
        buffer.copy_(buffer * 2)


def _in_double(net: nn.Module) -> None:
    net.double()


CHANGES = {
    "in place": _in_place,
    "load_state_dict": _loaded,
    "through .data": _through_data,
    "another .data": _new_data,
    "another Parameter": _replaced,
    "buffers": _buffers,
    ".double()": _in_double,
}


@pytest.mark.filterwarnings("ignore:RNN module weights")  # of the network itself, on a GPU
@pytest.mark.parametrize("name", ["mlp", "residual", "lstm"])
@on_each_device
def test_new_weights_are_seen_at_once_however_they_came(name: str, device: str) -> None:
    net, x = made(name, device)
    model = mcdrop.wrap(net, example=x[:4])
    for how, change in CHANGES.items():
        before = passes(model, x[:5], 4)
        change(net)
        with torch.no_grad():
            expected = net(x[:5].to(next(net.parameters()).dtype)).cpu()
        assert apart(mcdrop.predict(model, x[:5], passes=2).deterministic, expected) < 1e-5, how
        after = passes(model, x[:5], 4)
        assert apart(after, loop(model, x[:5], 4)) < 1e-5, how
        assert apart(after, before) > 1e-3 or how == ".double()", how
        assert backend_of(model).tier(model.rows(x[:5]))[0] == "captured", how


def test_a_weight_that_is_turned_where_it_lies_is_seen() -> None:
    """Another view of the same memory, put in place through ``.data``: the same tensor at the same address."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6)).eval(), torch.randn(5, 6)
    model = mcdrop.wrap(net, example=x)
    for weight in (parameter for parameter in net.parameters() if parameter.dim() == 2):
        passes(model, x, 3)
        address = weight.data_ptr()
        weight.data = weight.data.t()
        assert weight.data_ptr() == address
        assert apart(passes(model, x, 3), loop(model, x, 3)) < 1e-5


def test_weights_that_were_tied_may_part() -> None:
    """The graph was written down while both layers had one matrix."""
    torch.manual_seed(0)
    for part in ("there", "back"):
        net, x = Tied().eval(), torch.randn(5, 4)
        model = mcdrop.wrap(net, example=x)
        assert model.audit.tier == "captured"
        net.get_submodule(part).weight = nn.Parameter(torch.randn(4, 4))
        with torch.no_grad():
            assert apart(mcdrop.predict(model, x, passes=2).deterministic, net(x)) < 1e-5, part
        assert apart(passes(model, x, 3), loop(model, x, 3)) < 1e-5, part


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_may_come_and_go(bias: bool) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2, bias=bias)).eval(), torch.randn(5, 4)
    model = mcdrop.wrap(net, example=x)
    setattr(net[2], "bias", None if bias else nn.Parameter(torch.randn(2)))  # noqa: B010
    with torch.no_grad():
        assert apart(mcdrop.predict(model, x, passes=2).deterministic, net(x)) < 1e-5
    assert apart(passes(model, x, 3), loop(model, x, 3)) < 1e-5


# -- the user's module -------------------------------------------------------------------------------------------------


def facts(net: nn.Module) -> dict[str, Any]:
    """What wrap could have changed of a module tree: objects by identity, values by copies."""
    found: dict[str, Any] = {}
    for path, child in net.named_modules():
        for name, value in vars(child).items():
            found[f"{path}.{name}"] = (id(value), [*map(id, value)] if isinstance(value, list) else repr(value))
        tensors = [*child._parameters.values(), *child._buffers.values()]
        found[path] = type(child), [(id(t), t._version, t.requires_grad) for t in tensors if t is not None]
    return found


@every
@on_each_device
def test_wrap_and_predict_leave_the_module_as_it_was(name: str, device: str) -> None:
    net, x = made(name, device, rows=3)
    net.register_forward_hook(lambda module, args, output: output * 2)
    before = facts(net)
    model = mcdrop.wrap(net, example=x)
    mcdrop.predict(model, x, passes=4)
    after = facts(net)
    assert [key for key in {**before, **after} if before.get(key) != after.get(key)] == []
    with torch.no_grad():
        assert apart(mcdrop.predict(model, x, passes=2).deterministic, net(x).cpu()) < 1e-5  # the hook is part of it


# -- the same answer ---------------------------------------------------------------------------------------------------


@every
@on_each_device
def test_the_same_call_gives_the_same_bits_again_and_in_threads(name: str, device: str) -> None:
    model, x = wrapped(name, device)
    calls = [(rows, count) for rows in (1, 6, 23) for count in (2, 13)]
    first = [passes(model, x[:rows], count) for rows, count in calls]
    assert all(
        torch.equal(passes(model, x[:rows], count), old) for (rows, count), old in zip(calls, first, strict=True)
    )
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(passes, model, x[:rows], count) for rows, count in calls * 4]
        for future, expected in zip(futures, first * 4, strict=True):
            assert torch.equal(future.result(timeout=60), expected)


@pytest.mark.parametrize("how", ["@", "matmul", "bmm", "bmm of a keyword", "matmul of a keyword", "of matrices alone"])
def test_products_are_captured_however_they_are_asked_for(how: str) -> None:
    asked: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "@": lambda x, y: x @ y,
        "matmul": torch.matmul,
        "bmm": lambda x, y: x.bmm(y),
        "bmm of a keyword": lambda x, y: torch.bmm(x, mat2=y),
        "matmul of a keyword": lambda x, y: torch.matmul(x, other=y),
        "of matrices alone": lambda x, y: x @ y[0],
    }

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.drop = nn.Linear(4, 4), nn.Dropout(0.4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(self.one(x))
            return asked[how](h, x.transpose(1, 2).contiguous()).sum(-1)

    torch.manual_seed(0)
    net, x = Products().eval(), torch.randn(6, 3, 4)
    model = mcdrop.wrap(net, example=x[:4])
    if how != "of matrices alone":
        assert model.audit.tier == "captured", model.audit.tier_reason
    for rows, count in ((6, 5), (1, 3)):
        assert apart(passes(model, x[:rows], count), loop(model, x[:rows], count)) < 1e-5
