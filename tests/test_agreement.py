"""Outputs that are infinite or NaN: what agrees, and networks whose logits are masked run every way like others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from graphs import live
from made import in_plain_python
from torch import Tensor, nn

import mcdrop
from mcdrop.agreement import (
    difference,
    distance,
    identical,
    largest,
    told_orders,
    uneven,
)
from mcdrop.errors import ModelRefused, NoStochasticSite
from mcdrop.quiet import quiet
from mcdrop.tiers import TIERS

INF, NAN = float("inf"), float("nan")
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("made", [np.array, torch.tensor], ids=["arrays", "tensors"])
def test_the_difference_is_relative_to_the_largest_finite_value(made: Callable[[Any], Any]) -> None:
    assert difference(made([1.0, -4.0]), made([2.0, -4.0])) == 0.25
    assert difference(made([1.0, INF, -INF, NAN, -4.0]), made([2.0, INF, -INF, NAN, -4.0])) == 0.25
    assert difference(made([INF, NAN]), made([INF, NAN])) == 0
    assert difference(made([1.0]), made([1.5]), scale=10.0) == 0.05
    assert largest(made([3.0, -INF, -7.0])) == 7
    assert largest(made([NAN])) > 0


@pytest.mark.parametrize(("one", "other"), [(INF, -INF), (INF, 1.0), (1.0, NAN), (NAN, INF), (-INF, 1.0)])
def test_what_is_infinite_or_nan_differs_from_everything_else(one: float, other: float) -> None:
    assert difference(np.array([one, 1.0]), np.array([other, 1.0])) == INF
    assert difference(np.array([other, 1.0]), np.array([one, 1.0])) == INF
    assert not identical(np.array([one]), np.array([other]))
    assert identical(np.array([one, other]), np.array([one, other]))


def test_shapes_and_every_type_of_numbers_are_told_apart() -> None:
    assert difference(np.zeros((2, 1)), np.zeros(2)) == INF
    assert not identical(np.zeros((2, 1)), np.zeros(2))
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float64):
        some = torch.tensor([0, 1, 1]).to(dtype)
        assert identical(some, some.clone())
        assert not identical(some, some.flip(0))
    assert difference(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0], dtype=torch.bfloat16)) == 0.5


@pytest.mark.parametrize("still", [-1e4, -1e9, float(np.finfo(np.float32).min), -INF, NAN])
def test_what_masks_do_not_move_does_not_measure_what_they_do(still: float) -> None:
    passes = np.array([[0.0, 1.0, still], [0.5, 1.25, still]], np.float32)
    assert difference(np.array([0.25, 1.0, still]), passes[0], passes=passes) == pytest.approx(0.5, rel=1e-4)
    assert difference(passes[0], passes[0], passes=passes) == 0
    if np.isfinite(still):
        assert difference(np.array([0.0, 1.0, 0.9 * still]), passes[0], passes=passes) == pytest.approx(0.1)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 1e4, 1e6])
def test_an_offset_hides_nothing_but_its_rounding(offset: float) -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 5, 2))
    passes = (numbers + offset).astype(np.float32)
    other = np.nextafter(passes[0], np.float32(np.inf))  # as another order of the operations may give
    assert difference(np.nextafter(other, np.float32(np.inf)), passes[0], passes=passes) < 3e-5
    assert (difference(passes[1], passes[0], passes=passes) > 0.5) == (offset < 1e5)


@pytest.mark.parametrize("added", [0.0, -1e4, -1e6, -1e9])
def test_what_is_added_to_some_outputs_hides_nothing_of_the_others(added: float) -> None:
    """As where logits are masked by a sum."""
    numbers = np.random.default_rng(0).normal(size=(3, 5, 2))
    numbers[..., 1] += added
    passes = numbers.astype(np.float32)
    other = passes[0].copy()
    other[:, 0] += 0.1
    farthest = np.ptp(passes[..., 0], axis=0).max()
    assert difference(other, passes[0], passes=passes) > 0.05 / farthest


def test_rows_of_passes_are_as_uneven_as_they_differ_from_the_first() -> None:
    even = np.random.default_rng(0).normal(size=(2, 1, 3)).repeat(4, axis=1)
    assert uneven(even) == uneven(torch.tensor(even)) == 0
    even[:, 2] = even[::-1, 2]  # other masks
    assert uneven(even) == pytest.approx(1.0, rel=1e-6)


# -- orders ------------------------------------------------------------------------------------------------------------

Truth = dict[str, int]


def _looks(truth: Truth, seen: Callable[[frozenset[str]], bool] = bool) -> Callable[..., bool]:
    """Says so where the orders that are seen are not the true ones."""
    return lambda outer, on, counts: seen(on) and any(outer[draw] != truth[draw] for draw in on)


def test_an_order_that_shows_while_another_draw_is_on_is_told() -> None:
    multiples, truth = {"noise": 4, "gate": 4, "other": 6}, {"noise": 4, "gate": 2, "other": 3}
    assert told_orders(multiples, _looks(truth)) == truth
    assert told_orders(multiples, _looks(truth, lambda on: len(on) > 1)) == truth
    assert told_orders(multiples, _looks(truth, lambda on: False)) == dict.fromkeys(truth, 1)  # what shows nowhere


def test_where_no_order_fits_there_is_none() -> None:
    assert told_orders({"a": 4, "b": 3}, lambda outer, on, counts: "b" in on) is None
    assert told_orders({"a": 4}, lambda outer, on, counts: None) is None  # no number of rows is taken


def test_the_number_of_rows_that_tells_is_run_or_the_three_that_any_network_took() -> None:
    """A number without a prime factor of the entries of a row may only swap their masks."""
    for multiples, most, expected in (
        ({"a": 6}, 64, {6}), ({"a": 4}, 64, {4}), ({"a": 7, "b": 11}, 64, {7, 11}), ({"a": 4}, 3, {4, 3}),
    ):  # fmt: skip
        tried: set[int] = set()

        def looks(outer: Any, on: Any, counts: Any, tried: set[int] = tried, most: int = most) -> bool | None:
            tried.add(counts[-1])
            return False if counts[-1] <= most else None

        assert told_orders(multiples, looks) == dict.fromkeys(multiples, 1)
        assert tried == expected


@pytest.mark.parametrize(("of_one", "told"), [(True, 2), (None, 4)], ids=["taken", "not taken"])
def test_a_row_alone_tells_between_orders_in_which_many_are_even(of_one: bool | None, told: int) -> None:
    """Not where no single row is taken: then the first order in which many are even stands."""

    def looks(outer: Any, on: Any, counts: Any) -> bool | None:
        if 1 in counts and (of_one is None or outer["a"] == 4):
            return of_one
        return outer["a"] not in (2, 4)

    assert told_orders({"a": 4}, looks) == {"a": told}


# -- networks ----------------------------------------------------------------------------------------------------------


class Classes(nn.Module):
    """Three classes and, where it is not None, a constant fourth logit; ``way`` says what it does that tiers mind."""

    def __init__(self, fourth: float | None, way: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)
        self.fourth, self.way = fourth, way

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.first(x).relu())
        y = self.last(y - y.mean(0) if self.way == "centred" else y)
        if self.way == "centred" and self.training:  # which evaluation leaves out
            y = y + 0.1 * torch.ones_like(y).bernoulli()
        if self.way == "branch" and y.sum() > 1e9:  # a branch on a value is not captured
            y = y + 1
        return y if self.fourth is None else torch.cat([y, torch.full_like(y[:, :1], self.fourth)], -1)


def predicted(model: Any, **options: Any) -> mcdrop.Prediction:
    return mcdrop.predict(model, X, passes=50, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_class_whose_logit_is_masked_has_no_chance_and_changes_nothing(precision: str) -> None:
    """Softmax over three logits and -inf is the softmax over the three."""
    masked, three = (
        mcdrop.wrap(Classes(fourth), example=X, task="classification", precision=precision) for fourth in (-INF, None)
    )
    assert masked.audit.tier == "captured", masked.audit.tier_reason
    assert masked.audit.mean_gap == pytest.approx(three.audit.mean_gap)
    assert masked.audit.precision_error == pytest.approx(three.audit.precision_error)
    assert [site.share for site in masked.audit.sites] == [1.0]
    found, expected = predicted(masked), predicted(three)
    for name in ("mean", "variance", "lower", "upper", "standard_error", "deterministic"):
        there = getattr(found, name)
        np.testing.assert_allclose(there[:, :3], getattr(expected, name), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(there[:, 3], 0)
    assert found.entropy is not None
    assert expected.entropy is not None
    np.testing.assert_allclose(found.entropy, expected.entropy, rtol=1e-5)


@pytest.mark.parametrize("fourth", [-1e4, -1e9])
def test_a_finite_mask_of_logits_hides_nothing_from_the_checks(fourth: float) -> None:
    masked, three = (
        mcdrop.wrap(Classes(some, "centred"), example=X, precision="bf16").audit for some in (fourth, None)
    )
    assert masked.precision_error == pytest.approx(three.precision_error)
    assert not masked.mean_preserving
    assert [text.split(" off by ")[0] for text in masked.warnings] == ["row 0 of the example alone is"]


@pytest.mark.parametrize(("way", "chosen", "tiers"), [("", ["captured"], [*TIERS]), ("branch", ["vmap"], [*TIERS])])
def test_masked_logits_are_the_same_in_every_tier(way: str, chosen: list[str], tiers: list[str]) -> None:
    model = mcdrop.wrap(Classes(-INF, way), example=X, task="classification")
    assert model.audit.tier in chosen, model.audit.tier_reason
    backend: Any = model.backend
    rows = model.rows(X)
    expected = backend.run(rows, 6, only=None, tier="loop")
    assert (expected[..., 3] == -INF).all()
    for tier in (None, *tiers):
        torch.testing.assert_close(backend.run(rows, 6, only=None, tier=tier), expected, rtol=1e-4, atol=1e-5)


def test_a_graph_with_masked_logits_answers_as_torch() -> None:
    with quiet():
        program = torch.onnx.export(
            live(Classes(-INF)), (X,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("rows")},), verbose=False
        )
    assert program is not None
    graph = mcdrop.wrap(program.model_proto, example=X.numpy(), task="classification")
    assert graph.audit.tier == "fold", graph.audit.tier_reason
    assert not graph.audit.warnings
    three = mcdrop.wrap(Classes(None), example=X, task="classification")
    found, expected = predicted(graph), predicted(three)
    np.testing.assert_allclose(found.mean[:, :3], expected.mean, rtol=1e-5)
    np.testing.assert_array_equal(found.mean[:, 3], 0)
    assert graph.audit.mean_gap is not None
    assert np.isfinite(graph.audit.mean_gap)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_an_output_that_is_no_number_leaves_the_others_as_they_are(value: float) -> None:
    """It has no variance, which is NaN, and no interval."""
    found, expected = (predicted(mcdrop.wrap(Classes(fourth), example=X)) for fourth in (value, None))
    for name in ("mean", "variance", "lower", "upper", "standard_error"):
        np.testing.assert_allclose(getattr(found, name)[:, :3], getattr(expected, name), rtol=1e-5, atol=1e-7)
    for name in ("variance", "lower", "upper", "standard_error"):
        assert np.isnan(getattr(found, name)[:, 3]).all()
    assert found.deterministic is not None
    np.testing.assert_array_equal(found.deterministic[:, 3], value)


def test_a_network_that_draws_nothing_is_still_named_when_its_output_is_no_number() -> None:
    net = Classes(NAN)
    net.drop.p = 0.0
    with pytest.raises(NoStochasticSite):
        mcdrop.wrap(net, example=X)


class Drawn(nn.Module):
    """Draws out of sight, beside an output that is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.numbers = nn.Dropout(0.5), in_plain_python(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(x) + torch.tensor([next(self.numbers) for _ in range(4)])
        return torch.cat([y, torch.full_like(y, -INF)], -1)


def test_what_draws_out_of_sight_is_still_seen_beside_infinities() -> None:
    with pytest.raises(ModelRefused, match="out of sight"):
        mcdrop.wrap(Drawn(), example=X)


def test_such_a_network_is_saved_and_loaded(tmp_path: Path) -> None:
    model = mcdrop.wrap(Classes(-INF), example=X, task="classification")
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "masked", format="pt2"))
    np.testing.assert_allclose(predicted(loaded).mean, predicted(model).mean, rtol=1e-5)


def test_such_a_network_is_exported_as_a_posterior(tmp_path: Path) -> None:
    model = mcdrop.wrap(Classes(-INF), example=X, task="classification")
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=50)
    (mean,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["mean"], {"x": X.numpy()})
    np.testing.assert_allclose(mean, predicted(model).mean, rtol=1e-4, atol=1e-6)


def test_the_distance_is_by_output_and_by_what_differs_alone() -> None:
    ones, others = (
        [torch.tensor([[1.0, 1e6, -1e9], [4.0, 2e6, 0.0]])],
        [torch.tensor([[1.0, 1e6, -1e9], [2.0, 3e6, 0.0]])],
    )
    assert distance(ones, others) == 1.0
    assert distance(ones, ones) == 0
    assert distance([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == float("inf")  # no rounding
    assert distance([torch.tensor([1.0])], [torch.tensor([float("nan")])]) == float("inf")
    assert distance(ones, [*others, *others]) == float("inf")
