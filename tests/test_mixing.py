"""Networks that decide by a value of all their rows: each pass decides for itself, whatever shares its batch.

All are one row of eight units that dropout halves: k are kept, binomially, and each is 2. Where more than four are kept
a pass answers with 0, which the examples, of small numbers, never show, else with their sum 2 k.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from devices import on_each_device
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy import stats
from torch import Tensor, nn

import mcdrop
from mcdrop.quiet import quiet

UNITS, PASSES = 8, 2000
KEPT = np.arange(UNITS + 1)
CHANCE = stats.binom.pmf(KEPT, UNITS, 0.5)
ANSWER = np.where(KEPT > UNITS / 2, 0, 2 * KEPT)
MEAN = float(CHANCE @ ANSWER)
VARIANCE = float(CHANCE @ (ANSWER - MEAN) ** 2)
FOURTH = float(CHANCE @ (ANSWER - MEAN) ** 4)

EXAMPLE = np.full((4, UNITS), -1e-3, np.float32)
ROW = np.ones((1, UNITS), np.float32)


class Dropped(nn.Module):
    """Answers with what is made of dropped rows."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.drop, self.answer = nn.Dropout(0.5), answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.drop(x))


def summed(h: Tensor) -> Tensor:
    return h.sum(1, keepdim=True)


QUESTIONS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "a mean as it is": ("vmap", lambda h: h.mean() > 1),
    "a sum by item": ("vmap", lambda h: h.sum().item() / 2 > 4),
    "a mean by bool": ("vmap", lambda h: bool(h.mean() > 1)),
    "a count by index": ("vmap", lambda h: [*[False] * 5, *[True] * 4][(h > 0).sum() // len(h)]),
    "a count by item": ("vmap", lambda h: (h > 0).sum().item() // len(h) > 4),
    "a sum by float": ("vmap", lambda h: float(h.sum()) > 8),
    "numbers by numpy": ("direct", lambda h: h.detach().cpu().numpy().mean() > 1),
    "numbers by tolist": ("direct", lambda h: sum(h[:, 0].tolist()) + float(h[:, 1:].sum()) > 8),
    "a list alone": ("direct", lambda h: np.mean(h.tolist()) > 1),
    "the largest of averages": ("vmap", lambda h: h.mean(1).max() > 1),
}


def assert_each_pass_decides(model: mcdrop.Model) -> None:
    result = mcdrop.sample(model, ROW, mcdrop.PassPlan(PASSES, sampler="iid"))
    assert abs(result.mean.item() - MEAN) < 4 * (VARIANCE / PASSES) ** 0.5
    assert abs(result.variance.item() - VARIANCE) < 4 * ((FOURTH - VARIANCE**2) / PASSES) ** 0.5


@pytest.mark.parametrize(("tier", "asked"), QUESTIONS.values(), ids=QUESTIONS)
@on_each_device
def test_each_pass_decides_for_itself(tier: str, asked: Callable[[Tensor], Any], device: str) -> None:
    model = mcdrop.wrap(Dropped(lambda h: summed(h) * (0 if asked(h) else 1)).to(device), example=EXAMPLE)
    assert model.audit.tier == tier, model.audit.tier_reason
    assert tier == "vmap" or "fold would mix passes" in model.audit.tier_reason
    assert_each_pass_decides(model)


class Same(torch.autograd.Function):
    """Gives what it is given, in the old form, which vmap does not take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Looking(nn.Module):
    """Looks at all rows before anything is dropped."""

    def __init__(self, asked: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.drop, self.asked = nn.Dropout(0.5), asked

    def forward(self, x: Tensor) -> Tensor:
        yes = bool(self.asked(x))
        h: Tensor = Same.apply(self.drop(x))  # type: ignore[no-untyped-call]
        total = h.sum(1, keepdim=True)
        return total * 0 if yes else total


@pytest.mark.parametrize(
    ("asked", "mixes"),
    [
        (lambda x: x.sum() > 20, True),
        (lambda x: float(np.sum(x.cpu().numpy())) > 20, True),
        (lambda x: x.max() > 20, False),
        (lambda x: x.mean().item() > 20, False),
    ],
    ids=["a sum", "numpy's sum", "the largest", "a mean"],
)
def test_what_is_asked_before_a_draw_has_the_answer_of_the_rows_alone(
    asked: Callable[[Tensor], Any], mixes: bool
) -> None:
    """The sum of one row is 8, below the limit of 20, and that of its copies is above it."""
    model = mcdrop.wrap(Looking(asked), example=EXAMPLE)
    assert ("fold would mix passes" in model.audit.tier_reason) == mixes  # else the faster way is taken
    result = mcdrop.sample(model, ROW, mcdrop.PassPlan(PASSES, sampler="iid"))
    assert abs(result.mean.item() - UNITS) < 4 * (4 * UNITS / 4 / PASSES) ** 0.5  # 2 k with k binomial


@pytest.mark.parametrize(
    "count",
    [lambda h: len(h.sum(1).gt(8).nonzero()), lambda h: h[h.sum(1) > 8].shape[0], lambda h: len(h.unique(dim=0)) // 2],
    ids=["nonzero", "by true and false", "unique"],
)
def test_how_many_entries_there_are_is_told_of_each_pass(count: Callable[[Tensor], int]) -> None:
    model = mcdrop.wrap(Dropped(lambda h: summed(h) * (1 + count(h))), example=EXAMPLE)
    assert model.audit.tier == "direct"
    assert "counts entries of all rows" in model.audit.tier_reason


def graph(*middle: onnx.NodeProto) -> "onnx.ModelProto":
    """Dropout to ``d``, its mean and whether it is above 1 in ``yes``, ``middle`` that makes ``e``, and its sum."""
    nodes = [
        helper.make_node("Dropout", ["x", "rate", "true"], ["d"]),
        helper.make_node("ReduceMean", ["d"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "one"], ["yes"]),
        *middle,
        helper.make_node("ReduceSum", ["e", "axis"], ["y"], keepdims=1),
    ]
    given = {"rate": np.float32(0.5), "true": np.bool_(True), "one": np.float32(1), "zero": np.float32(0)}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()]
    constants += [numpy_helper.from_array(np.array([1]), "axis"), numpy_helper.from_array(np.array(1), "once")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in (("x", 8), ("y", 1))]
    whole = helper.make_graph(nodes, "deciding", ends[:1], ends[1:], constants)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _branch(name: str, *nodes: onnx.NodeProto, inputs: Any = (), outputs: Any = ()) -> onnx.GraphProto:
    ends = outputs or [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
    return helper.make_graph(list(nodes), name, list(inputs), ends)


def _if(condition: str, output: str) -> onnx.NodeProto:
    same = _branch("same", helper.make_node("Identity", ["d"], ["same"]))
    none = _branch("none", helper.make_node("Mul", ["d", "zero"], ["none"]))
    return helper.make_node("If", [condition], [output], then_branch=none, else_branch=same)


def _loop(*nodes: onnx.NodeProto, goes_on: str) -> list[onnx.NodeProto]:
    """A loop of at most one step that carries ``e`` along, and goes on where it is told so."""
    told = [("step", TensorProto.INT64), ("on", TensorProto.BOOL), ("before", TensorProto.FLOAT)]
    shapes: dict[str, Any] = {"step": [], "on": [], goes_on: []}
    inputs = [helper.make_tensor_value_info(name, kind, shapes.get(name)) for name, kind in told]
    ends = [(goes_on, TensorProto.BOOL), ("after", TensorProto.FLOAT)]
    outputs = [helper.make_tensor_value_info(name, kind, shapes.get(name)) for name, kind in ends]
    body = _branch("body", *nodes, inputs=inputs, outputs=outputs)
    return [helper.make_node("Loop", ["once", "true", "d"], ["e"], body=body)]


GRAPHS: dict[str, list[onnx.NodeProto]] = {
    "a factor": [
        helper.make_node("Where", ["yes", "zero", "one"], ["factor"]),
        helper.make_node("Mul", ["d", "factor"], ["e"]),
    ],
    "a branch": [_if("yes", "e")],
    "a branch in a loop": _loop(
        helper.make_node("ReduceMean", ["before"], ["now"], keepdims=0),
        helper.make_node("Greater", ["now", "one"], ["told"]),
        _if("told", "after"),
        helper.make_node("Identity", ["on"], ["still"]),
        goes_on="still",
    ),
}


@pytest.mark.parametrize("middle", GRAPHS.values(), ids=GRAPHS)
def test_each_pass_of_a_graph_decides_for_itself(middle: list[onnx.NodeProto], tmp_path: Path) -> None:
    model = mcdrop.wrap(graph(*middle), example=EXAMPLE)
    assert model.audit.tier == "loop", model.audit.tier_reason
    assert_each_pass_decides(model)


def test_a_loop_that_ends_by_its_steps_alone_is_folded() -> None:
    nodes = (helper.make_node("Identity", ["before"], ["after"]), helper.make_node("Identity", ["on"], ["still"]))
    model = graph(*_loop(*nodes, goes_on="still"))
    whole = model.graph
    whole.node.remove(next(node for node in whole.node if node.op_type == "Greater"))
    whole.node.remove(next(node for node in whole.node if node.op_type == "ReduceMean"))
    assert mcdrop.wrap(model, example=EXAMPLE).audit.tier == "fold"


def test_an_exported_posterior_weighs_each_pass_by_itself(tmp_path: Path) -> None:
    model = mcdrop.wrap(Dropped(lambda h: summed(h) * (h.mean() <= 1)), example=EXAMPLE)  # a factor of 0 or 1
    expected: NDArray[Any] = mcdrop.predict(model, ROW, passes=40).mean
    assert 0 < abs(expected.item() - MEAN) < 4 * (VARIANCE / 40) ** 0.5
    path = mcdrop.export_torch(model, tmp_path / "posterior.pt2", passes=40)
    with quiet(), torch.no_grad():
        found = torch.export.load(path).module()(torch.from_numpy(ROW))
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-5)
