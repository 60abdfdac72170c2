"""Kept sub-networks: passes that compute with the kept units alone are the passes of the whole network."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from captures import apart, backend_of, loop, passes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mcdrop
from mcdrop.capture import NotCaptured, capture
from mcdrop.plans import Plans
from mcdrop.program import Program
from mcdrop.stacks import Span

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 20), nn.Tanh(), nn.GELU(), nn.Dropout(0.3),
        nn.Linear(20, 25, bias=False), nn.Dropout(0.6), nn.Linear(25, 2),
    )  # fmt: skip


class TwoChains(nn.Module):
    """Two chains of layers from one hidden layer, one of them with a way around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(6, 12), chain(), chain()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        out: Tensor = self.left(h) + self.right(h) + h[:, :3]
        return out


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 3))


class ReadTwice(nn.Module):
    """The hidden layer between the dropouts is read by another layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(self.dropout(self.one(x)))
        out: Tensor = self.three(self.dropout(torch.relu(h))) + h[:, :2]
        return out


CHAINS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "two chains": TwoChains}
NONE: dict[str, Callable[[], nn.Module]] = {
    "one dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
    "alpha dropout": lambda: nn.Sequential(
        nn.AlphaDropout(0.5), nn.Linear(6, 8), nn.AlphaDropout(0.5), nn.Linear(8, 2)
    ),
    "read twice": ReadTwice,
}


def wrapped(make: Callable[[], nn.Module]) -> mcdrop.Model:
    torch.manual_seed(0)
    return mcdrop.wrap(make().eval(), example=X[:4])


def kept_of(model: mcdrop.Model) -> Program:
    """The program of kept units, made anew."""
    plans = backend_of(model).plans
    plan, rows = plans.prepare(model.rows(X[:4]))
    stacks = plans.stacks(plan, Span(3, 0, 0, "iid"))
    return Program(capture(plans.live, rows, plans.pick, plan.trace, stacks), kept=True)


def force(model: mcdrop.Model, rows: int) -> None:
    """Lets the model use kept units from so many rows on, whatever was measured."""
    plans: Plans = backend_of(model).plans
    plans._plans = {key: replace(plan, kept_from=rows) for key, plan in plans._plans.items()}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("count", [2, 17])
def test_passes_of_kept_units_are_those_of_the_loop(make: Callable[[], nn.Module], count: int) -> None:
    model = wrapped(make)
    force(model, 1)
    for rows in (1, 7, 40):
        assert apart(passes(model, X[:rows], count), loop(model, X[:rows], count)) < 1e-5


def test_statistics_and_the_deterministic_output_are_the_same_too() -> None:
    model = wrapped(plain)
    whole = mcdrop.predict(model, X)
    force(model, 1)
    kept = mcdrop.predict(model, X)
    for name in ("mean", "variance", "standard_error", "deterministic", "lower", "upper"):
        assert apart(getattr(kept, name), getattr(whole, name)) < 1e-5


def test_a_pass_costs_what_its_kept_units_cost() -> None:
    """Operations counted by torch: a product and a sum for each kept input and each kept output of a layer."""
    model = wrapped(plain)
    plans = backend_of(model).plans
    plan, _ = plans.prepare(model.rows(X))
    masks = [stack for stack in plans.stacks(plan, Span(9, 0, 0, "iid")) if stack is not None]
    kept = [mask.sum(dim=-1).double() for mask in masks]
    expected = 2 * len(X) * float((kept[0] * kept[1] + kept[1] * kept[2] + kept[2] * 2).sum() + 6 * 30)
    force(model, 1)
    block = backend_of(model).block(model.rows(X))
    with FlopCounterMode(display=False) as counter:
        block.forward(9, seed=0, start=0, sampler="iid")
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("make", NONE.values(), ids=NONE)
def test_networks_without_such_a_chain_have_none(make: Callable[[], nn.Module]) -> None:
    model = wrapped(make)
    assert model.audit.tier == "captured"
    assert model.audit.kept_from is None
    with pytest.raises(NotCaptured, match="no linear layers between dropouts"):
        kept_of(model)


def test_a_mask_without_a_kept_unit_gives_the_bias() -> None:
    """With a rate of 0.999 of four units most passes keep none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.999), nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.999), nn.Linear(4, 2)).eval()
    model = mcdrop.wrap(net, example=X[:4])
    force(model, 1)
    found = passes(model, X, 50)
    assert apart(found, loop(model, X, 50)) < 1e-5
    assert (found == net[4].bias.detach()).all(dim=(1, 2)).any()  # type: ignore[operator]


def test_the_audit_says_from_how_many_rows_on() -> None:
    audit = wrapped(lambda: nn.Sequential(*big())).audit
    assert audit.kept_from is None or audit.kept_from >= 64
    said = "kept units alone" in str(audit)
    assert said == (audit.kept_from is not None)


def big() -> list[nn.Module]:
    return [
        nn.Linear(6, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(512, 2),
    ]  # fmt: skip


# -- units that are 0 before the first draw ---------------------------------------------------------------------------


def firing(units: int) -> nn.Module:
    """A network of which so many of 512 units fire for some rows, the others for none."""
    torch.manual_seed(0)
    net = nn.Sequential(*big()).eval()
    with torch.no_grad():
        net[0].bias[units:] = -1e3  # type: ignore[operator]
    return net


@pytest.mark.parametrize("units", [0, 1, 300])
@pytest.mark.parametrize("rows", [1, 40])
def test_passes_without_units_that_never_fire_are_those_of_the_loop(units: int, rows: int) -> None:
    model = mcdrop.wrap(firing(units), example=X[:4])
    force(model, 1000)
    assert apart(passes(model, X[:rows], 100), loop(model, X[:rows], 100)) < 1e-5


def test_a_pass_costs_what_the_units_cost_that_fire() -> None:
    """Operations counted by torch: of 512 x 512 weights only those of units that are above 0 for some row."""
    net = firing(300)
    model = mcdrop.wrap(net, example=X[:4])
    force(model, 1000)
    for rows in (1, 40):
        fire = int((net[:2](X[:rows]) > 0).any(0).sum())  # type: ignore[index]
        block = backend_of(model).block(model.rows(X[:rows]))
        with FlopCounterMode(display=False) as counter:
            block.forward(100, seed=0, start=1, sampler="iid")
            block.forward(100, seed=0, start=101, sampler="iid")  # a further chunk of the same rows
        assert counter.get_total_flops() == 2 * rows * (6 * 512 + 200 * (fire * 512 + 512 * 2))


@pytest.mark.parametrize("make", [nn.Tanh, nn.ReLU], ids=["none is 0", "too few passes"])
def test_other_passes_cost_what_all_units_cost(make: Callable[[], nn.Module]) -> None:
    layers = big()
    layers[1] = make()
    model = mcdrop.wrap(nn.Sequential(*layers).eval(), example=X[:4])
    force(model, 1000)
    count = 2 if make is nn.ReLU else 100
    block = backend_of(model).block(model.rows(X[:1]))
    with FlopCounterMode(display=False) as counter:
        block.forward(count, seed=0, start=1, sampler="iid")
    assert counter.get_total_flops() == 2 * (6 * 512 + count * (512 * 512 + 512 * 2))
