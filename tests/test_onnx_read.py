"""A graph with local functions is what its functions say, their defaults and versions included, or it is refused."""

from typing import Any

import numpy as np
import pytest
from graphs import X, by_hand, dropped, number, parsed, passes_of
from onnx import AttributeProto, helper

import mcdrop
from mcdrop.errors import ModelRefused


def _refers(node: Any, name: str, to: str) -> Any:
    """A node one of whose attributes is what the function around it is given as ``to``."""
    node.attribute.add(name=name, ref_attr_name=to, type=AttributeProto.FLOAT)
    return node


def _call(name: str, **given: Any) -> Any:
    return helper.make_node(name, ["x"], ["h"], domain="own", **given)


def _function(name: str, nodes: list[Any], *, opset: int = 17, **defaults: float) -> Any:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", name, ["a"], ["b"], nodes, imports)
    function.attribute_proto.extend(helper.make_attribute(key, value) for key, value in defaults.items())
    return function


def _wrapped(call: Any, *functions: Any) -> mcdrop.Model:
    """A graph of opset 17: dropout of what a function gives."""
    nodes = [call, helper.make_node("Dropout", ["h", "p"], ["y"])]
    graph = parsed(by_hand(nodes, initial=(number("p", 0.25),))).graph
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return mcdrop.wrap(helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=9), example=X)


LEAKY = _function("Leaky", [_refers(helper.make_node("LeakyRelu", ["a"], ["b"]), "alpha", "slope")], slope=0.5)
OUTER = _function("Outer", [helper.make_node("Leaky", ["a"], ["b"], domain="own")])
HANDED = _function("Handed", [_refers(helper.make_node("Leaky", ["a"], ["b"], domain="own"), "slope", "s")], s=0.25)


@pytest.mark.parametrize(
    ("name", "given", "slope"),
    [
        ("Leaky", {}, 0.5),
        ("Leaky", {"slope": 0.125}, 0.125),
        ("Outer", {}, 0.5),
        ("Handed", {}, 0.25),
        ("Handed", {"s": 2.0}, 2.0),
    ],
)
def test_an_attribute_that_a_call_leaves_out_has_the_function_s_default(
    name: str, given: dict[str, float], slope: float
) -> None:
    model = _wrapped(_call(name, **given), LEAKY, OUTER, HANDED)
    assert np.abs(passes_of(model, X) - dropped(np.where(X > 0, X, np.float32(slope) * X))).max() <= 1e-6


@pytest.mark.parametrize("opset", [11, 18])
def test_a_function_of_another_opset_means_what_it_said_there(opset: int) -> None:
    axes: dict[str, Any] = {"axes": [1]} if opset < 18 else {}  # an attribute first, an input later
    reduced = helper.make_node("ReduceMean", ["a"] if axes else ["a", "axes"], ["m"], **axes)
    nodes = [
        helper.make_node("Constant", [], ["axes"], value=number("axes", [1], 7)),
        reduced,
        helper.make_node("Sub", ["a", "m"], ["b"]),
    ]
    model = _wrapped(_call("Centre"), _function("Centre", nodes[bool(axes) :], opset=opset))
    assert np.abs(passes_of(model, X) - dropped(X - X.mean(axis=1, keepdims=True))).max() <= 1e-5


def test_a_function_that_the_graph_s_opset_cannot_say_is_refused_by_its_name() -> None:
    function = _function("Act", [helper.make_node("Gelu", ["a"], ["b"])], opset=20)
    with pytest.raises(ModelRefused, match=r"opset 17\).*own:Act \(opset 20\)"):
        _wrapped(_call("Act"), function)
