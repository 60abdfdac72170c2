"""The last dropout in closed form: the mean and variance that drawing it tends to, or a refusal."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from captures import apart
from devices import on_each_device
from numpy.typing import NDArray
from torch import nn

import mcdrop
from mcdrop.engine import PassPlan
from mcdrop.errors import InputError
from mcdrop.model import Options
from mcdrop.wrapping import wrap_graph

Array = NDArray[np.float64]

P, SEEDS = 0.5, 200


def one_dropout(p: float = P) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Dropout(p), nn.Linear(30, 2)).eval()


def two_dropouts() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 30), nn.ReLU(), nn.Dropout(0.05), nn.Linear(30, 40), nn.Tanh(), nn.Dropout(P), nn.Linear(40, 2)
    ).eval()


X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def closed_form(net: nn.Sequential, x: NDArray[Any], p: float) -> tuple[Array, Array]:
    """Mean and variance over the only dropout of ``one_dropout``, by numpy in float64."""
    w1, b1, w2, b2 = (parameter.detach().cpu().numpy().astype(np.float64) for parameter in net.parameters())
    hidden = np.maximum(x.astype(np.float64) @ w1.T + b1, 0)
    return hidden @ w2.T + b2, hidden**2 @ (w2**2).T * p / (1 - p)


# -- one dropout: nothing is left to draw ------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["float", "double"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@on_each_device
def test_with_one_dropout_mean_and_variance_are_the_closed_form_at_any_number_of_passes(
    p: float, device: str, dtype: torch.dtype, digits: float
) -> None:
    net = one_dropout(p).to(device, dtype)
    mean, variance = closed_form(net, X, p)
    model = mcdrop.wrap(net, example=X)
    for passes in (2, 3, 100):
        for sampler in ("balanced", "iid"):
            found = mcdrop.predict(model, X, passes=passes, sampler=sampler, exact_last=True)
            assert apart(found.mean, mean) < digits
            assert apart(found.variance, variance) < digits
            np.testing.assert_array_equal(found.standard_error, 0)
            assert apart(found.deterministic, mean) < digits
            assert found.samples is None


@pytest.mark.parametrize(("weights", "inputs"), [(1e-3, 1), (1, 600)], ids=["small weights", "large activations"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
@on_each_device
def test_squares_of_few_digits_neither_vanish_nor_grow_endless(
    device: str, dtype: torch.dtype, weights: float, inputs: float
) -> None:
    """The closed form in float64 of the same weights: only what the layer before gives is rounded to 16 bits."""
    net = one_dropout(0.1)
    with torch.no_grad():
        net.get_parameter("3.weight").mul_(weights)
    net, x = net.to(device, dtype), torch.from_numpy(inputs * X).to(dtype)
    mean, variance = closed_form(copy.deepcopy(net).float(), x.float().numpy(), 0.1)
    found = mcdrop.predict(mcdrop.wrap(net, example=X), x, passes=2, exact_last=True)
    assert apart(found.variance, variance) < 0.03
    assert apart(found.mean, mean) < 0.03


@on_each_device
def test_the_deterministic_output_comes_with_the_passes_and_is_plain_eval(device: str) -> None:
    """It is the mean of a pass at the expectation of the other masks: the network itself is not called."""
    net, calls = two_dropouts().to(device), []
    model = mcdrop.wrap(net, example=X)
    mcdrop.predict(model, X, passes=20, exact_last=True)
    with torch.no_grad():
        expected = net(torch.from_numpy(X).to(device)).cpu()
    watch = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        found = mcdrop.predict(model, X, passes=20, exact_last=True)
    finally:
        watch.remove()
    assert not calls
    assert apart(found.deterministic, expected) < 1e-6


@pytest.mark.statistical
def test_the_closed_form_is_what_many_passes_tend_to() -> None:
    """Within 5 standard errors for each of 12 means and variances."""
    drawn = mcdrop.predict(one_dropout(), X, passes=20_000, sampler="iid", keep_samples=True)
    mean, variance = closed_form(one_dropout(), X, P)
    assert (np.abs(drawn.mean - mean) < 5 * drawn.standard_error).all()
    assert (np.abs(drawn.variance - variance) < 5 * _error_of_variance(drawn)).all()


def _error_of_variance(drawn: mcdrop.Prediction) -> Array:
    """The standard error of a variance from its passes' fourth moments."""
    assert drawn.samples is not None
    deviation = drawn.samples.astype(np.float64) - drawn.mean
    spread: Array = np.sqrt(((deviation**4).mean(axis=0) - drawn.variance**2) / len(deviation))
    return spread


def test_each_output_of_each_step_has_its_own() -> None:
    """A linear layer on the last axis of (N, S, F), with a mask of (S, F)."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Dropout(0.25), nn.Linear(5, 2)).eval(), torch.randn(3, 4, 5)
    found = mcdrop.predict(net, x, passes=2, exact_last=True)
    weight = net.get_parameter("1.weight").detach()
    with torch.no_grad():
        assert apart(found.mean, net(x)) < 1e-6
    assert apart(found.variance, x**2 @ (weight**2).T * 0.25 / 0.75) < 1e-6


# -- two dropouts: less is left to draw --------------------------------------------------------------------------------


@cache
def deep() -> mcdrop.Model:
    return mcdrop.wrap(two_dropouts(), example=X)


@cache
def truth() -> mcdrop.Prediction:
    """20000 independent passes with both masks drawn."""
    return mcdrop.predict(deep(), X, passes=20_000, seed=99, sampler="iid", keep_samples=True)


@pytest.mark.statistical
@pytest.mark.parametrize("sampler", ["balanced", "iid"])
def test_mean_and_variance_stay_those_of_drawing_both(sampler: str) -> None:
    """Within 5 standard errors of 20000 passes, both errors counted."""
    drawn = truth()
    found = mcdrop.predict(deep(), X, passes=20_000, sampler=sampler, exact_last=True)
    error = np.hypot(found.standard_error, drawn.standard_error)
    assert (np.abs(found.mean - drawn.mean) < 5 * error).all()
    assert (found.standard_error < drawn.standard_error).all()
    assert (np.abs(found.variance - drawn.variance) < 5 * np.sqrt(2) * _error_of_variance(drawn)).all()


@pytest.mark.statistical
def test_variance_is_right_on_average_at_few_passes_too() -> None:
    """Over 200 seeds of 4 independent passes, within 5 standard errors."""
    runs = [mcdrop.predict(deep(), X, passes=4, seed=s, sampler="iid", exact_last=True) for s in range(SEEDS)]
    variances = np.stack([run.variance for run in runs])
    error = np.hypot(variances.std(axis=0) / np.sqrt(SEEDS), _error_of_variance(truth()))
    assert (np.abs(variances.mean(axis=0) - truth().variance) < 5 * error).all()


@pytest.mark.statistical
@pytest.mark.parametrize("sampler", ["balanced", "iid"])
def test_the_mean_is_closer_at_the_same_number_of_passes(sampler: str) -> None:
    """Squared errors over 200 seeds; each sum is known to 10 % (one standard error), so 1.3 is 2 of them above 1.

    The last dropout makes most of the variance here, so that far more than 1.3 is to be expected.
    """
    best = mcdrop.predict(deep(), X, passes=20_000, seed=7, exact_last=True).mean
    squared = {}
    for exact in (True, False):
        runs = [mcdrop.predict(deep(), X, passes=16, seed=s, sampler=sampler, exact_last=exact) for s in range(SEEDS)]
        squared[exact] = np.square(np.stack([run.mean for run in runs]) - best).sum()
    assert squared[False] > 1.3 * squared[True]


@pytest.mark.statistical
def test_the_standard_error_is_honest() -> None:
    """Over 200 seeds of 64 independent passes (mean - truth) / standard_error has the square 1: 5 standard errors."""
    best = mcdrop.predict(deep(), X, passes=20_000, seed=7, exact_last=True)
    runs = [mcdrop.predict(deep(), X, passes=64, seed=s, sampler="iid", exact_last=True) for s in range(SEEDS)]
    ratio = np.stack([np.square((run.mean - best.mean) / run.standard_error) for run in runs])
    by_seed = ratio.mean(axis=(1, 2))
    assert abs(by_seed.mean() - 1) < 5 * by_seed.std() / np.sqrt(SEEDS) + 2 / 64


def test_chunks_and_batches_do_not_change_the_answer() -> None:
    model = deep()
    whole = mcdrop.predict(model, X, passes=40, exact_last=True)
    before = model.backend.chunk_bytes
    try:
        for model.backend.chunk_bytes in (1, 5_000, 10**9):
            cut = mcdrop.predict(model, X, passes=40, exact_last=True)
            assert apart(cut.mean, whole.mean) < 1e-5
            assert apart(cut.variance, whole.variance) < 1e-5
    finally:
        model.backend.chunk_bytes = before
    alone = mcdrop.predict(model, X[2:3], passes=40, exact_last=True)
    assert apart(alone.mean, whole.mean[2:3]) < 1e-5


def test_rows_stop_sooner_at_the_same_tolerance() -> None:
    drawn, exact = (mcdrop.predict(deep(), X, tolerance=0.003, exact_last=e) for e in (False, True))
    assert exact.passes.sum() < drawn.passes.sum()
    assert ((exact.standard_error.max(axis=1) <= 0.003) | (exact.passes == 2000)).all()
    for passes in set(exact.passes.tolist()):
        rows = exact.passes == passes
        fixed = mcdrop.predict(deep(), X, passes=passes, exact_last=True)
        assert apart(exact.mean[rows], fixed.mean[rows]) < 1e-5
        assert apart(exact.variance[rows], fixed.variance[rows]) < 1e-4
    assert set(mcdrop.predict(one_dropout(), X, tolerance=1e-6, exact_last=True).passes) == {64}


# -- what it cannot be asked of ----------------------------------------------------------------------------------------


def test_new_weights_are_seen() -> None:
    net = one_dropout()
    model = mcdrop.wrap(net, example=X)
    mcdrop.predict(model, X, passes=2, exact_last=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    mean, variance = closed_form(net, X, P)
    found = mcdrop.predict(model, X, passes=2, exact_last=True)
    assert apart(found.mean, mean) < 1e-6
    assert apart(found.variance, variance) < 1e-6


@pytest.mark.parametrize("task", ["classification", "gaussian"])
def test_only_a_regression_has_one(task: str) -> None:
    model = mcdrop.wrap(one_dropout(), example=X, task=task)
    with pytest.raises(InputError, match="exact_last is for regression"):
        mcdrop.predict(model, X, exact_last=True)


@pytest.mark.parametrize("options", [{"keep_samples": True}, {"interval": "quantile"}])
def test_there_are_no_samples_to_keep(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no samples to keep"):
        mcdrop.predict(one_dropout(), X, exact_last=True, **options)
    with pytest.raises(InputError, match="no samples to keep"):
        PassPlan(exact_last=True, keep_samples=True)


def test_a_graph_of_onnx_has_none() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from graphs import built, exported

    x = built("mlp")[1].numpy()
    with pytest.raises(InputError, match="exact_last needs a torch network"):
        mcdrop.predict(wrap_graph(exported("mlp"), example=x), x, exact_last=True)


@pytest.mark.parametrize("interval", ["student_t", "normal", "mean"])
def test_intervals_that_need_no_samples_come_of_it(interval: str) -> None:
    found = mcdrop.predict(one_dropout(), X, passes=10, interval=interval, exact_last=True)
    assert (found.lower <= found.mean).all()
    assert (found.mean <= found.upper).all()
    assert interval == "mean" or (found.upper - found.lower > found.std).all()


# -- calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fitted", [True, False])
def test_a_calibration_holds_for_what_it_was_fitted_with_alone(fitted: bool) -> None:
    model = deep()
    y = np.random.default_rng(1).normal(size=(60, 2))
    x = np.random.default_rng(2).normal(size=(60, 4)).astype(np.float32)
    with_defaults = replace(model, defaults=Options(passes=20, exact_last=fitted))
    calibration = mcdrop.calibrate(with_defaults, x, y)
    assert calibration.plan.exact_last is fitted
    mcdrop.predict(model, X, calibration=calibration)
    mcdrop.predict(model, X, calibration=calibration, exact_last=fitted)
    with pytest.raises(InputError, match=r"exact_last=True.* calibrate again"):
        mcdrop.predict(model, X, calibration=calibration, exact_last=not fitted)
