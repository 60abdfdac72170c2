"""ONNX graphs: the same seed gives torch's answer, whatever exported the graph and however it is run."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import X, built, by_hand, dropped, exported, number, parsed, passes_of
from numpy.typing import NDArray
from onnx import TensorProto, helper, version_converter

import mcdrop
from mcdrop.errors import InputError, MCDropError, ModelRefused, NoStochasticSite, UncontrolledDraw
from mcdrop.wrapping import wrap_graph

Array = NDArray[Any]
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def _both(name: str, data: bytes, **given: Any) -> tuple[Array, Array]:
    module, x = built(name)
    graph = wrap_graph(data, example=x.numpy(), **given)
    return passes_of(graph, x.numpy()), passes_of(mcdrop.wrap(module, example=x), x)


def _softmax_nodes(data: bytes) -> dict[str, float]:
    return {node.name: 0.2 for node in onnx.ModelProto.FromString(data).graph.node if node.op_type == "Softmax"}


@pytest.mark.parametrize("sampler", ["balanced", "iid"])
@pytest.mark.parametrize("name", ["cnn", "lstm", "mlp"])
def test_a_graph_answers_as_torch_at_the_same_seed(name: str, sampler: str) -> None:
    ours, theirs = _both(name, exported(name))
    assert np.abs(ours - theirs).max() <= 1e-5


def test_attention_dropout_that_the_exporter_lost_can_be_injected() -> None:
    data = exported("encoder")
    ours, theirs = _both("encoder", data, inject=_softmax_nodes(data))
    assert np.abs(ours - theirs).max() <= 1e-5


def test_attention_dropout_that_the_exporter_lost_is_named() -> None:
    model = mcdrop.wrap(onnx.ModelProto.FromString(exported("encoder")), example=built("encoder")[1])
    assert any("attention without dropout" in warning for warning in model.audit.warnings)


def test_recurrent_dropout_that_the_exporter_lost_is_named_and_can_be_injected() -> None:
    data = exported("lstm", training=False, legacy=True)
    first, _, last = (node.name for node in parsed(data).graph.node if node.op_type in ("LSTM", "Gemm"))
    module, x = built("lstm")
    (said,) = wrap_graph(data, example=x, inject={last: 0.1}).audit.warnings
    assert f"inject={{{first!r}" in said
    model = wrap_graph(data, example=x, inject={first: 0.3})
    assert model.audit.warnings == ()
    ours, theirs = (mcdrop.predict(one, x, passes=1000).std for one in (model, mcdrop.wrap(module, example=x)))
    assert np.abs(ours / theirs - 1).max() <= 4 / np.sqrt(1000)  # of two spreads, in standard errors


@pytest.mark.parametrize("name", ["encoder", "mlp"])
def test_the_legacy_exporter_s_graphs_answer_as_torch(name: str) -> None:
    ours, theirs = _both(name, exported(name, legacy=True))
    assert np.abs(ours - theirs).max() <= 1e-5


@pytest.mark.parametrize("name", ["cnn", "encoder", "lstm", "mlp"])
def test_a_row_alone_is_the_row_in_its_batch(name: str) -> None:
    model = mcdrop.wrap(onnx.ModelProto.FromString(exported(name)), example=None if name == "mlp" else built(name)[1])
    x = built(name)[1].numpy()
    together = passes_of(model, x)
    for row in range(len(x)):
        assert np.abs(passes_of(model, x[row : row + 1])[:, 0] - together[:, row]).max() <= 1e-6


def test_four_threads_on_one_model_give_the_answers_of_one() -> None:
    model = mcdrop.wrap(onnx.ModelProto.FromString(exported("mlp")), example=None)
    x = np.random.default_rng(0).standard_normal((16, 4, 8)).astype(np.float32)
    expected = [mcdrop.predict(model, rows, seed=i).variance for i, rows in enumerate(x)]
    found: dict[int, Array] = {}

    def work(start: int) -> None:
        for i in range(start, 16, 4):
            found[i] = mcdrop.predict(model, x[i], seed=i).variance

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(16))


def test_loop_and_fold_give_the_same() -> None:
    model = mcdrop.wrap(onnx.ModelProto.FromString(exported("encoder")), example=built("encoder")[1])
    backend: Any = model.backend
    trace = backend.plan(model.example).trace
    drawn = mcdrop.sample_masks(trace.sites, 7, seed=1)
    loop, fold = (backend.run(model.example, drawn, 7, trace, tier) for tier in ("loop", "fold"))
    assert np.abs(loop - fold).max() <= 1e-6


def test_the_runtime_s_seed_does_not_matter() -> None:
    model = mcdrop.wrap(onnx.ModelProto.FromString(exported("cnn")), example=built("cnn")[1])
    onnxruntime.set_seed(1)
    first = passes_of(model, built("cnn")[1])
    onnxruntime.set_seed(2)
    assert np.array_equal(first, passes_of(model, built("cnn")[1]))


def test_a_session_and_a_path_can_be_wrapped(tmp_path: Any) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(exported("mlp"))
    x = built("mlp")[1].numpy()
    by_path, by_session = (mcdrop.wrap(one, example=x) for one in (path, onnxruntime.InferenceSession(str(path))))
    assert np.array_equal(passes_of(by_path, x), passes_of(by_session, x))


def test_features_are_what_enters_the_last_layer_or_what_a_node_makes() -> None:
    module, x = built("mlp")
    model = mcdrop.wrap(onnx.ModelProto.FromString(exported("mlp")), example=x)
    ours = model.backend.features(model.example, None)
    assert np.abs(ours - mcdrop.wrap(module, example=x).backend.features(model.example, None)).max() <= 1e-6
    named = model.backend.features(model.example, "node_relu")
    assert np.abs(named - module[:3](x).detach().numpy()).max() <= 1e-6  # type: ignore[index]
    with pytest.raises(InputError, match="unknown layer"):
        model.backend.features(model.example, "nope")


# -- graphs made by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 21])
def test_dropout_of_every_opset(opset: int) -> None:
    rate: dict[str, Any] = {"ratio": 0.25} if opset < 12 else {}
    inputs = ["x"] if opset < 12 else ["x", "p"]
    initial = () if opset < 12 else (number("p", 0.25),)
    data = by_hand([helper.make_node("Dropout", inputs, ["y"], **rate)], opset=opset, initial=initial)
    assert np.abs(passes_of(mcdrop.wrap(parsed(data), example=X), X) - dropped(X)).max() <= 1e-6


@pytest.mark.parametrize(("opset", "kind"), [(8, FLOAT), (9, FLOAT16), (9, FLOAT), (10, FLOAT)])
def test_the_mask_of_a_dropout_has_the_type_of_its_opset(opset: int, kind: int) -> None:
    nodes = [helper.make_node("Dropout", ["x"], ["z", "kept"], ratio=0.25)]
    nodes += [helper.make_node("Cast", ["kept"], ["number"], to=kind)] * (opset >= 10)
    nodes += [helper.make_node("Mul", ["x", "number" if opset >= 10 else "kept"], ["y"])]
    model = mcdrop.wrap(parsed(by_hand(nodes, opset=opset, dtype=kind)), example=X)
    assert np.abs(passes_of(model, X) - 0.75 * dropped(X)).max() <= (1e-6 if kind == FLOAT else 2e-3)


def test_half_precision() -> None:
    data = by_hand(
        [helper.make_node("Dropout", ["x", "p"], ["y"])], dtype=TensorProto.FLOAT16, initial=(number("p", 0.25),)
    )
    assert np.abs(passes_of(mcdrop.wrap(parsed(data), example=X), X) - dropped(X)).max() <= 1e-2


def test_the_mask_of_a_dropout_can_be_read() -> None:
    nodes = [
        helper.make_node("Dropout", ["x", "p"], ["z", "kept"]),
        helper.make_node("Cast", ["kept"], ["as_number"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["z", "as_number"], ["y"]),
    ]
    passes = passes_of(mcdrop.wrap(parsed(by_hand(nodes, initial=(number("p", 0.25),))), example=X), X)
    keep = mcdrop.sample_masks([mcdrop.Site("site0", (6,), 0.25)], 20, seed=5, start=3, sampler="balanced")["site0"]
    assert np.abs(passes - (dropped(X) - keep[:, None])).max() <= 1e-6


def _branch(name: str, nodes: list[Any], output: str) -> Any:
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", 6])])


def test_dropout_in_a_branch_runs_and_is_masked() -> None:
    then = _branch("then", [helper.make_node("Dropout", ["x", "p"], ["a"])], "a")
    other = _branch("other", [helper.make_node("Identity", ["x"], ["b"])], "b")
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    data = by_hand([node], initial=(number("p", 0.25), number("c", True, TensorProto.BOOL)))
    assert np.abs(passes_of(mcdrop.wrap(parsed(data), example=X), X) - dropped(X)).max() <= 1e-6


def test_each_step_of_a_loop_draws_masks_of_its_own() -> None:
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 6]),
    ]
    nodes = [helper.make_node("Dropout", ["h", "p"], ["dropped"]), helper.make_node("Identity", ["going"], ["go"])]
    outputs = [
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("dropped", TensorProto.FLOAT, ["n", 6]),
    ]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    node = helper.make_node("Loop", ["steps", "", "x"], ["y"], body=body)
    data = by_hand([node], initial=(number("p", 0.25), number("steps", 3, TensorProto.INT64)))
    expected = X[None]
    for site in ("site0", "site1", "site2"):
        expected = expected * dropped(np.ones_like(X), site=site)
    model = mcdrop.wrap(parsed(data), example=X)
    assert [site.name for site in model.audit.live] == ["site0", "site1", "site2"]
    assert np.abs(passes_of(model, X) - expected).max() <= 1e-5


def test_dropout_in_a_local_function() -> None:
    nodes = [
        helper.make_node("Constant", [], ["q"], value=number("q", 0.25)),
        helper.make_node("Dropout", ["a", "q"], ["b"]),
    ]
    function = helper.make_function("own", "Drop", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])
    graph = parsed(by_hand([helper.make_node("Drop", ["x"], ["y"], domain="own")])).graph
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    assert np.abs(passes_of(mcdrop.wrap(model, example=X), X) - dropped(X)).max() <= 1e-6


def test_raw_draws_become_masks() -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"], scale=2.0),
        helper.make_node("Add", ["x", "noise"], ["y"]),
    ]
    drawn = mcdrop.sample_masks([mcdrop.Site("site0", (6,), 0.0, "normal")], 20, seed=5, start=3, sampler="balanced")
    model = mcdrop.wrap(parsed(by_hand(nodes)), example=X)
    assert np.abs(passes_of(model, X) - (X[None] + 2 * drawn["site0"][:, None])).max() <= 1e-5


def test_sites_can_be_injected_after_named_nodes() -> None:
    data = by_hand([helper.make_node("Relu", ["x"], ["y"], name="here")])
    passes = passes_of(wrap_graph(data, example=X, inject={"here": 0.25}), X)
    assert np.abs(passes - dropped(np.maximum(X, 0))).max() <= 1e-6


REFUSED: dict[str, tuple[Callable[[], bytes], type[Exception], str]] = {
    "a rate that is an input": (
        lambda: by_hand(
            [helper.make_node("ReduceMax", ["x"], ["p"], keepdims=0), helper.make_node("Dropout", ["x", "p"], ["y"])]
        ),
        UncontrolledDraw,
        "only known while the graph runs",
    ),
    "draws without masks": (
        lambda: by_hand([helper.make_node("Multinomial", ["x"], ["m"]), helper.make_node("Cast", ["m"], ["y"], to=1)]),
        UncontrolledDraw,
        "Multinomial",
    ),
    "nothing random": (
        lambda: by_hand([helper.make_node("Relu", ["x"], ["y"])]),
        NoStochasticSite,
        r"onnxslim wrote, which drop them.*torch\.onnx\.export.*inject",
    ),
    "one number of rows": (
        lambda: by_hand(
            [helper.make_node("Dropout", ["x", "p"], ["z"]), helper.make_node("Reshape", ["z", "s"], ["y"])],
            initial=(number("p", 0.25), number("s", [4, 6], TensorProto.INT64)),
        ),
        ModelRefused,
        "one number of rows",
    ),
    "an operator that nobody knows": (
        lambda: by_hand(
            [helper.make_node("Dropout", ["x"], ["z"]), helper.make_node("Own", ["z"], ["y"], domain="own")]
        ),
        MCDropError,
        "own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sampled_honestly_is_refused(case: str) -> None:
    make, error, said = REFUSED[case]
    with pytest.raises(error, match=said):
        mcdrop.wrap(parsed(make()), example=X)


def test_a_node_that_is_not_there_cannot_be_injected_after() -> None:
    data = by_hand([helper.make_node("Relu", ["x"], ["y"], name="here")])
    with pytest.raises(InputError, match="names no node"):
        wrap_graph(data, example=X, inject={"there": 0.25})


@pytest.mark.parametrize("rate", ["0.25", None, True, 1.0, float("nan"), [0.25]])
def test_a_rate_to_inject_is_a_number_between_0_and_1(rate: Any) -> None:
    data = by_hand([helper.make_node("Relu", ["x"], ["y"], name="here")])
    with pytest.raises(InputError, match=r"between 0 and 1 for 'here'"):
        wrap_graph(data, example=X, inject={"here": rate})
    with pytest.raises(InputError, match=r"by the names of nodes"):
        wrap_graph(data, example=X, inject=rate or 0.0)  # type: ignore[arg-type]


def test_a_rate_of_numpy_is_the_number_that_was_meant_and_can_be_kept(tmp_path: Any) -> None:
    data = by_hand([helper.make_node("Relu", ["x"], ["y"], name="here")])
    rate: Any = np.float32(0.3)
    model = wrap_graph(data, example=X, inject={"here": rate})
    assert [site.p for site in model.audit.live] == [0.3]
    kept = mcdrop.load(mcdrop.save(model, tmp_path / "m" / "1"))
    assert np.array_equal(passes_of(kept, X), passes_of(model, X))


def test_an_output_is_a_name_or_a_position() -> None:
    data = by_hand([helper.make_node("Dropout", ["x"], ["y"], ratio=0.25)], opset=11)
    with pytest.raises(InputError, match="unknown output False"):
        wrap_graph(data, example=X, output=False)


def test_a_graph_that_loops_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcdrop.onnx_sessions._LOOK_SECONDS", 1.0)
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 6]),
    ]
    nodes = [helper.make_node("Relu", ["h"], ["kept"]), helper.make_node("Identity", ["going"], ["go"])]
    outputs = [
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("kept", TensorProto.FLOAT, ["n", 6]),
    ]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    ever = [helper.make_node("Dropout", ["x"], ["z"]), helper.make_node("Loop", ["steps", "", "z"], ["y"], body=body)]
    data = by_hand(ever, initial=(number("steps", 2**62, TensorProto.INT64),))
    with pytest.raises(InputError, match="cannot take inputs"):
        mcdrop.wrap(parsed(data), example=X)


def test_an_older_graph_brought_up_to_date_gives_the_same() -> None:
    data = by_hand([helper.make_node("Dropout", ["x"], ["y"], ratio=0.25)], opset=11)
    newer = version_converter.convert_version(parsed(data), 17)
    before, after = (passes_of(mcdrop.wrap(one, example=X), X) for one in (parsed(data), newer))
    assert np.array_equal(before, after)
