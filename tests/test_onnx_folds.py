"""Passes share a batch only where that gives what each of them gives, however rarely anything is dropped."""

from typing import Any

import numpy as np
import pytest
from graphs import X, by_hand, dropped, number, parsed, passes_of
from onnx import TensorProto, helper

import mcdrop

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RARE, SEED = 0.008, 6  # so that none of the passes that are compared drops a unit, and some of those below do


def _node(operator: str, inputs: str, outputs: str, **given: Any) -> Any:
    return helper.make_node(operator, inputs.split(), outputs.split(), **given)


CONSTANTS = (
    number("p", RARE), number("keep", 1 - RARE), number("c0", 0, INT64), number("c1", 1, INT64), number("zero", 0.0),
    number("step", 1.0), number("left", [-1], INT64), number("big", 2.0**60),
)  # fmt: skip
DROPS = {
    "dropout": [_node("Dropout", "x p", "h")],
    "coin": [
        _node("Shape", "x", "whole"), _node("Expand", "keep whole", "chance"),
        _node("Bernoulli", "chance", "kept"), _node("Mul", "x kept", "h"),
    ],
}  # fmt: skip
ROWS = [_node("Shape", "x", "shape"), _node("Gather", "shape c0", "n")]
NUMBERS = {  # of the rows, and what is told by
    "whole": ([*ROWS, _node("Range", "c0 n c1", "rows"), _node("Gather", "h rows", "y")], "rows holds the numbers"),
    "in parts of rows": (  # three places that each row stands at
        [
            *ROWS, _node("Range", "c0 n c1", "rows"), _node("Unsqueeze", "rows last", "column"),
            _node("Concat", "column column column", "thrice", axis=1), _node("Reshape", "thrice left", "flat"),
            _node("Gather", "h flat", "some"), _node("Reshape", "some parts", "apart"),
            _node("ReduceMax", "apart last", "y", keepdims=0),
        ],
        "flat holds the numbers",
    ),
    "as real numbers that passes see": (
        [
            *ROWS, _node("Cast", "n", "count", to=FLOAT), _node("Range", "zero count step", "rows"),
            _node("ReduceMin", "h last", "least", keepdims=0), _node("Div", "least big", "nothing"),
            _node("Add", "rows nothing", "seen"), _node("Round", "seen", "near"),
            _node("Cast", "near", "places", to=INT64), _node("Gather", "h places", "y"),
        ],
        "fold differs",
    ),
}  # fmt: skip


def _wrapped(nodes: list[Any], x: Any = X) -> mcdrop.Model:
    given = (*CONSTANTS, number("last", [1], INT64), number("parts", [-1, 3, 6], INT64))
    return mcdrop.wrap(parsed(by_hand(nodes, opset=18, initial=given)), example=x)


def _expected(drop: str) -> Any:
    if drop == "dropout":
        return dropped(X, p=RARE, seed=SEED)
    site = mcdrop.Site("site0", (6,), 0.0, "uniform")
    u = mcdrop.sample_masks([site], 20, seed=SEED, start=3, sampler="balanced")["site0"]
    return X * (u < np.float32(1 - RARE))[:, None]


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("drop", DROPS)
def test_rows_picked_by_their_numbers_are_those_of_their_own_pass(drop: str, case: str) -> None:
    nodes, said = NUMBERS[case]
    model, expected = _wrapped([*DROPS[drop], *nodes]), _expected(drop)
    assert (expected != expected[0]).any()
    assert np.abs(passes_of(model, X, seed=SEED) - expected).max() <= 1e-6
    assert said in model.audit.tier_reason


ENDLESS = {  # noise whose variance has no end
    "cauchy": [_node("Sub", "u half", "o"), _node("Mul", "o pi", "a"), _node("Tan", "a", "r")],
    "reciprocal": [_node("Reciprocal", "u", "r")],
}


@pytest.mark.parametrize("noise", ENDLESS)
def test_noise_without_a_variance_does_not_hide_rows_of_other_passes(noise: str) -> None:
    """A pass that runs alone reads no other's rows."""
    picked = [*DROPS["dropout"], *NUMBERS["as real numbers that passes see"][0][:-1], _node("Gather", "h places", "g")]
    nodes = [*picked, _node("RandomUniformLike", "x", "u"), *ENDLESS[noise], _node("Add", "g r", "y")]
    often = (number("p", 0.25), *CONSTANTS[1:], number("last", [1], INT64), number("half", 0.5), number("pi", np.pi))
    model = mcdrop.wrap(parsed(by_hand(nodes, opset=18, initial=often)), example=X)
    rows = model.rows(X)
    alone = [model.backend.forward(rows, 1, seed=5, start=3 + t, sampler="balanced")[0] for t in range(20)]
    np.testing.assert_allclose(passes_of(model, X), alone, rtol=1e-5, atol=1e-5)


COUNTED = [*ROWS, _node("Unsqueeze", "n c0", "count")]


def test_how_many_rows_there_are_keeps_the_passes_together() -> None:
    """Each row picks the column of that number."""
    nodes = [*COUNTED, _node("Expand", "count shape", "places"), _node("GatherElements", "h places", "y", axis=1)]
    model = _wrapped([*DROPS["dropout"], *nodes])
    assert model.audit.tier == "fold"
    assert np.abs(passes_of(model, X) - dropped(X, p=RARE)[..., [4] * 6]).max() <= 1e-6


def test_the_last_row_is_that_of_its_own_pass() -> None:
    """Its place is the same for all rows, so it tells none from another."""
    nodes = [
        *COUNTED,
        _node("Sub", "count c1", "end"),
        _node("Expand", "end count", "ends"),
        _node("Gather", "h ends", "y"),
    ]
    model, expected = _wrapped([*DROPS["dropout"], *nodes]), dropped(X, p=RARE)[:, [-1] * 4]
    assert (expected != expected[0]).any()
    assert np.abs(passes_of(model, X) - expected).max() <= 1e-6


@pytest.mark.parametrize(("padding", "count"), [(4, 5), (4, 32), (25, 40)])
def test_rows_that_no_mask_moves_do_not_keep_passes_apart(padding: int, count: int) -> None:
    """Rows of another shape than those of the example are seen at the first prediction."""
    source = parsed(by_hand([_node("Dropout", "x p", "y")], initial=(number("p", 0.25),)))
    for info in (*source.graph.input, *source.graph.output):
        info.CopyFrom(helper.make_tensor_value_info(info.name, FLOAT, ["n", "steps", 6]))
    model = mcdrop.wrap(source, example=X[:, None])
    x = np.random.default_rng(0).standard_normal((count, 2, 6)).astype(np.float32)
    x[:padding] = 0
    backend: Any = model.backend
    assert backend.folds(model.rows(x))
    kept = mcdrop.sample_masks([mcdrop.Site("site0", (2, 6), 0.25)], 20, seed=5, start=3, sampler="balanced")["site0"]
    assert np.abs(passes_of(model, x) - x * kept[:, None] / 0.75).max() <= 1e-6


def test_places_within_a_row_keep_the_passes_together() -> None:
    """They are alike for all rows: 5, 4, 3, 2, 1, 0."""
    nodes = [
        _node("Shape", "x", "shape"),
        _node("Neg", "c1", "back"),
        _node("Range", "five back back", "backwards"),
        _node("Expand", "backwards shape", "places"),
        _node("GatherElements", "h places", "y", axis=1),
    ]
    given = (*CONSTANTS, number("five", 5, INT64))
    model = mcdrop.wrap(parsed(by_hand([*DROPS["dropout"], *nodes], initial=given)), example=X)
    assert model.audit.tier == "fold"
    assert np.abs(passes_of(model, X) - dropped(X, p=RARE)[..., ::-1]).max() <= 1e-6


def test_a_draw_that_hardly_ever_drops_is_seen_live() -> None:
    nodes = [_node("Shape", "x", "whole"), _node("Expand", "nearly whole", "chance"), *DROPS["coin"][2:]]
    source = by_hand([*nodes, _node("Neg", "h", "y")], initial=(number("nearly", 1 - 1e-5),))
    model = mcdrop.wrap(parsed(source), example=X)
    assert [site.kind for site in model.audit.live] == ["uniform"]
