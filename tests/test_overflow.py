"""Rows whose logits overflow in some passes: nothing is known about them, and every answer says so."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from made import net
from onnx import TensorProto, helper
from torch import nn

import mcdrop
from mcdrop.engine import PassPlan, PassResult
from mcdrop.moments import Gathered
from mcdrop.posterior_graph import OPSET, Builder
from mcdrop.posterior_statistics import statistics
from mcdrop.summaries import TASKS


def test_a_screen_flags_them() -> None:
    """By votes too: a pass without probabilities gave class 0 one, and passes that agree are no anomaly."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    last = nn.Linear(16, 4)
    model = mcdrop.wrap(nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.3), last), example=x[:8], task="classification")
    with torch.no_grad():
        last.weight.mul_(30)
    screen = mcdrop.fit_screen(model, x, score="variation_ratio", fpr=0.05)
    found = mcdrop.predict(model, np.append(x[:2], np.full((1, 3), 3e38, np.float32), axis=0), screen=screen)
    assert found.score is not None
    assert found.p_value is not None
    assert found.is_anomaly is not None
    assert np.isnan(found.mean[2]).all()
    assert np.isnan(found.score).tolist() == [False, False, True]
    assert found.p_value[2] == pytest.approx(1 / (len(x) + 1))
    assert found.is_anomaly[2]


def test_two_looks_at_a_row_see_it_too() -> None:
    """In a typical direction of features only the passes tell: a NaN was taken for an ordinary entropy."""
    torch.manual_seed(0)
    last = nn.Linear(32, 3)
    network = nn.Sequential(nn.Linear(4, 32, bias=False), nn.ReLU(), nn.Dropout(0.2), last)
    with torch.no_grad():
        last.weight.mul_(20)
    x = torch.randn(300, 4)
    model = mcdrop.wrap(network, example=x[:8], task="classification")
    screen = mcdrop.fit_screen(model, x[50:], score="combined", fpr=0.05)
    far = x[:50] / x[:50].abs().amax(1, keepdim=True) * 2e38  # the same directions
    found = mcdrop.predict(model, far, screen=screen)
    assert found.score is not None
    assert found.p_value is not None
    lost = np.isnan(found.mean).any(axis=1)
    assert lost.sum() > 40
    assert np.isnan(found.score[lost]).all()
    np.testing.assert_allclose(found.p_value[lost], 1 / (len(screen.scores) + 1))


def test_rows_far_beyond_few_typical_ones_are_the_strangest_without_a_warning() -> None:
    """Of 10 typical rows the largest is the whole tail: its spread is 0, and what lies beyond it infinitely strange."""
    x = np.random.default_rng(0).normal(size=(99, 2)).astype(np.float32)
    model = mcdrop.wrap(net(), example=x)
    screen = mcdrop.fit_screen(model, x, score="combined", distance="euclidean", fpr=0.05)
    far = mcdrop.screen(model, 1000 * x, screen=screen).score
    assert np.isposinf(far).all()


def test_a_posterior_graph_says_the_same_of_them() -> None:
    logits = np.random.default_rng(0).normal(size=(16, 3, 4)).astype(np.float32)
    logits[5, 1, 2] = np.inf
    gathered = Gathered()
    gathered.add(TASKS["classification"].statistics.of(logits.astype(np.float64)))
    with np.errstate(invalid="ignore"):
        result = PassResult.of(gathered, np.zeros((3, 9)), None, PassPlan(16, sampler="iid"))
    expected = TASKS["classification"].read(result).classes
    builder = Builder(onnx.ModelProto(ir_version=10, opset_import=[helper.make_opsetid("", OPSET)]))
    builder.model.graph.name = "posterior"
    builder.model.graph.input.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [16, "rows", 4]))
    made = statistics(
        builder, "logits", (4,), task="classification", passes=16, sampler="iid", level=0.9, interval="normal"
    )
    names = ["entropy", "expected_entropy", "mutual_information", "variation_ratio"]
    builder.finish({made[name]: () for name in names})
    session = onnxruntime.InferenceSession(builder.model.SerializeToString())
    for name, values in zip(names, session.run([made[name] for name in names], {"logits": logits}), strict=True):
        assert np.isnan(values).tolist() == [False, True, False], name
        np.testing.assert_allclose(values, getattr(expected, name), atol=1e-6, err_msg=name)
