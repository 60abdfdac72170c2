"""Outputs that are infinite or NaN: what agrees, and networks whose logits are masked run every way like others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from graphs import live
from torch import Tensor, nn

import mcdrop
from mcdrop.agreement import difference, identical, largest
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


# -- networks ----------------------------------------------------------------------------------------------------------


class Classes(nn.Module):
    """Three classes and, where it is not None, a constant fourth logit; ``way`` says what it does that tiers mind."""

    def __init__(self, fourth: float | None, way: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)
        self.fourth, self.way = fourth, way

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.drop(self.first(x).relu()))
        if self.way and y.sum() > 1e9:  # a branch on a value is not captured
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
        self.drop, self.generator = nn.Dropout(0.5), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(x) + torch.from_numpy(self.generator.standard_normal(4, np.float32))
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
