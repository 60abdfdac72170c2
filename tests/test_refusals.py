"""What a refusal offers works: whose flag starts a draw out of sight, what was called around the network, one row."""

import random
import re
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError, ModelRefused, NoStochasticSite, UncontrolledDraw

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Stack(nn.Module):
    """Leaves layers out by Python's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.drop = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and random.random() < 0.5):
                x = x + self.drop(layer(x))
        return x


class Scaled(nn.Dropout):
    """Draws a factor out of sight, which no other draw goes by."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + random.random() if self.training else 1.0)


def refused(net: nn.Module) -> str:
    with pytest.raises(UncontrolledDraw) as caught:
        mcdrop.wrap(net, example=X, tuning={})
    return str(caught.value)


@pytest.mark.parametrize("stacks", [1, 3])
def test_the_modules_whose_flags_start_a_draw_out_of_sight_are_named_and_may_be_left_out(stacks: int) -> None:
    """Without them all other draws are live; strict=False, which such a network does not bear, is not offered."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), *(Stack() for _ in range(stacks)), nn.Linear(4, 1))
    said, paths = refused(net), [str(2 + i) for i in range(stacks)]
    assert f"Python's random where {' or '.join(map(repr, paths))} is in training mode" in said
    assert said.endswith(f"switch that off with exclude={paths}")
    model = mcdrop.wrap(net, example=X, exclude=paths, tuning={})
    assert len(model.audit.live) == 1 + 3 * stacks


def test_partial_coverage_is_offered_where_the_draws_that_are_seen_stay_the_same() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Scaled(0.3))
    assert refused(net).endswith("switch that off with exclude=['1'], or accept partial coverage with strict=False")
    assert len(mcdrop.wrap(net, example=X, strict=False, tuning={}).audit.live) == 1


def test_a_refusal_leaves_the_flags_of_the_network_and_the_generator_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Stack())
    before = [child.training for child in net.modules()], random.getstate()
    refused(net)
    assert ([child.training for child in net.modules()], random.getstate()) == before


class Counts(nn.Module):
    """Keeps a state, and every one of its kind in a list."""

    EVERY: ClassVar[list["Counts"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.state = 0.0
        self.EVERY.append(self)

    def begin(self) -> None:
        self.state = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.state


class Resets(nn.Sequential):
    """Begins anew by way of the list, which no shadow can follow."""

    def forward(self, x: Tensor) -> Tensor:
        for one in Counts.EVERY:
            one.begin()
        output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return output


class Sets(nn.Sequential):
    """Sets the state from outside, so that only torch's functions get the layer."""

    def forward(self, x: Tensor) -> Tensor:
        for one in Counts.EVERY:
            one.state = 0.0
        output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return output


class Around(nn.Sequential):
    """Calls a layer by way of a list that the whole class has."""

    def forward(self, x: Tensor) -> Tensor:
        for one in Counts.EVERY:
            x = one(x)
        output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return output


@pytest.mark.parametrize(
    ("kind", "named"), [(Resets, "Counts.begin"), (Around, "Around.forward"), (Sets, "Sets.forward")]
)
def test_what_is_called_around_the_network_is_named(kind: type[nn.Module], named: str) -> None:
    Counts.EVERY.clear()
    net = kind(nn.Linear(4, 4), Counts(), nn.Dropout(0.2))
    with pytest.raises(ModelRefused, match=re.escape(f"calls its own module '1' (in {named}) through a reference")):
        mcdrop.wrap(net, example=X)


class Graph(nn.Module):
    """Adds up over the edges of a graph of eight nodes."""

    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 4), nn.Dropout(0.3)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 7], [4, 5, 6, 1]]))

    def forward(self, x: Tensor) -> Tensor:
        nodes = self.drop(self.layer(x))
        output: Tensor = nodes.index_add(0, self.edges[1], nodes[self.edges[0]])
        return output


class OneRow(Graph):
    """The same as the error says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[0])[None]


def test_rows_that_depend_on_one_another_are_told_to_be_one() -> None:
    said = "make rows that need one another, as nodes of a graph, one row"
    with pytest.raises(InputError, match=f"it takes all 8 rows of the example; {said}"):
        mcdrop.wrap(Graph(), example=X)
    with pytest.raises(InputError, match=rf"the same number of rows, got \[2, 8\]; {said}"):
        mcdrop.wrap(Graph(), example=(X, torch.zeros(2, 5, dtype=torch.long)))
    assert mcdrop.wrap(OneRow(), example=X[None], tuning={}).audit.live
    with pytest.raises(InputError) as caught:  # where the whole example is not taken either
        mcdrop.wrap(Graph(), example=X[:, :3])
    assert said not in str(caught.value)


class Settles(nn.Module):
    """Goes on while its masks leave little, as an adaptive solver does: here in one of fifty passes."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.02)

    def forward(self, x: Tensor) -> Tensor:
        step = self.drop(torch.ones_like(x[:, :1]))
        while bool(step.max() < 1):
            step = step + self.drop(torch.ones_like(step))
        output: Tensor = x * step
        return output


def test_a_loop_whose_length_masks_tell_is_told_to_take_a_fixed_number_of_steps() -> None:
    """No other example would help."""
    said = r"is one too many.*as in an adaptive solver, take a fixed number of steps"
    with pytest.raises(UncontrolledDraw, match=said):
        mcdrop.predict(mcdrop.wrap(Settles(), example=X[:1], tuning={}), X[:1], passes=500)


class ByDict(nn.Module):
    """Takes all its inputs in one dict."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        output: Tensor = self.drop(inputs["x"])
        return output


class HandsOn(ByDict):
    def forward(self, **inputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(inputs)


def test_a_dict_in_the_place_of_an_input_is_told_what_works() -> None:
    for example in (({"x": X},), {"inputs": {"x": X}}):
        with pytest.raises(InputError, match=r"wrap a module whose forward\(self, \*\*inputs\) hands them on"):
            mcdrop.wrap(ByDict(), example=example)
    with pytest.raises(InputError, match=r"wrap a module whose forward\(self, \*\*inputs\) hands it on"):
        mcdrop.wrap(ByDict(), example={"x": X})
    assert mcdrop.wrap(HandsOn(), example={"x": X}, tuning={}).audit.live


def test_a_network_of_keras_is_told_where_its_dropout_looks() -> None:
    layer = type("Dense", (nn.Linear,), {"__module__": "keras.src.layers"})
    with pytest.raises(NoStochasticSite, match=r"calls them with training=self\.training"):
        mcdrop.wrap(nn.Sequential(layer(4, 1)), example=X)
    with pytest.raises(NoStochasticSite, match="Train it with dropout"):
        mcdrop.wrap(nn.Sequential(nn.Linear(4, 1)), example=X)
