"""The exported posterior: one plain graph that equals ``predict`` and needs nothing but a runtime."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import built, exported, number
from numpy.typing import NDArray
from onnx import TensorProto, helper
from typer.testing import CliRunner
from zoo import mlp

import mcdrop
from mcdrop.cli import app
from mcdrop.errors import InputError, ModelRefused
from mcdrop.posterior import _worst
from mcdrop.posterior_statistics import BOUNDS, READERS
from mcdrop.quiet import quiet
from mcdrop.summaries import TASKS

_BARE = """
import sys, json
for name in ("torch", "onnx", "mcdrop", "scipy"):
    sys.modules[name] = None
import numpy as np, onnxruntime
onnxruntime.set_default_logger_severity(4)
session = onnxruntime.InferenceSession(sys.argv[1])
outputs = session.run(None, {session.get_inputs()[0].name: np.load(sys.argv[2])})
print(json.dumps({o.name: v.tolist() for o, v in zip(session.get_outputs(), outputs)}))
"""


def _run(path: Path, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(path)
    names = [info.name for info in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True))


def _compare(found: dict[str, Any], expected: mcdrop.Prediction) -> None:
    for name, value in found.items():
        assert np.abs(np.asarray(value) - getattr(expected, name)).max() <= 1e-5, name


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("cnn", "classification"),
        ("encoder", "regression"),
        ("lstm", "classification"),
        ("mlp", "classification"),
        ("mlp", "regression"),
    ],
)
def test_it_equals_predict_for_any_number_of_rows(name: str, task: str, tmp_path: Path) -> None:
    module, x = built(name)
    model = mcdrop.wrap(module, example=x, task=task)
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=70)
    rows = np.random.default_rng(0).standard_normal((9, *x.shape[1:])).astype(np.float32)
    for few in (rows[:1], rows):
        _compare(_run(path, few), mcdrop.predict(model, few, passes=70, interval="student_t"))


def test_votes_that_rounding_decides_are_no_difference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hidden, order = torch.nn.Linear(8, 64), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    head = torch.nn.Linear(64, 2)
    with torch.no_grad():
        for twins in (hidden.weight, hidden.bias):
            twins[32:] = twins[:32][order]
        # both classes add up the same terms, each in an order of its own
        head.weight[0, 32:], head.weight[1, :32], head.bias[1] = 0, 0, head.bias[0]
        head.weight[1, 32:] = head.weight[0, :32][order]
    net = torch.nn.Sequential(torch.nn.Dropout(0.3), hidden, torch.nn.Tanh(), head)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    model = mcdrop.wrap(net, example=x, task="classification")
    votes = mcdrop.predict(model, x, passes=50)
    np.testing.assert_allclose(votes.mean, 0.5, atol=1e-6)
    assert votes.variation_ratio is not None
    assert votes.variation_ratio.max() > 0.1  # both classes get votes, and nothing but rounding tells them apart
    mcdrop.export_onnx(model, tmp_path / "posterior.onnx")
    mcdrop.export_torch(model, tmp_path / "posterior.pt2")


@pytest.mark.parametrize("sampler", ["balanced", "iid"])
@pytest.mark.parametrize("interval", sorted(set(BOUNDS) - {"predictive"}))
def test_every_interval_that_a_graph_can_hold(interval: str, sampler: str, tmp_path: Path) -> None:
    module, x = built("mlp")
    model = mcdrop.wrap(module, example=x)
    given: dict[str, Any] = {"passes": 90, "interval": interval, "sampler": sampler, "level": 0.9, "seed": 3}
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx", **given)
    _compare(_run(path, x.numpy()), mcdrop.predict(model, x, **given))


@pytest.mark.parametrize("passes", [320, 350])
def test_blocks_of_both_sizes_give_the_error_of_a_graph(passes: int, tmp_path: Path) -> None:
    """Whole blocks of 64 alone after those of 16, and with a rest that smaller ones and single passes stand for."""
    module, x = built("mlp")
    model = mcdrop.wrap(module, example=x)
    expected = mcdrop.predict(model, x, passes=passes, interval="mean")
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=passes, interval="mean")
    _compare(_run(path, x.numpy()), expected)
    path = mcdrop.export_torch(model, tmp_path / "posterior.pt2", passes=passes, interval="mean")
    with quiet(), torch.no_grad():
        _compare(torch.export.load(path).module()(x), expected)


def test_a_gaussian_head_gives_both_kinds_of_variance(tmp_path: Path) -> None:
    module, example = mlp.gaussian_head.build()
    model = mcdrop.wrap(module, example=example, task="gaussian")
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx", interval="predictive")
    found = _run(path, model.example.args[0].numpy())
    assert {"aleatoric", "epistemic"} <= set(found)
    _compare(found, mcdrop.predict(model, example, passes=50, interval="predictive"))


def test_masks_that_all_rows_share_are_written_out(tmp_path: Path) -> None:
    module, example = mlp.dropconnect.build()
    model = mcdrop.wrap(module, example=example)
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=12)
    _compare(_run(path, model.example.args[0].numpy()), mcdrop.predict(model, example, passes=12))


def test_a_graph_s_posterior_is_that_of_the_network_it_came_from(tmp_path: Path) -> None:
    module, x = built("mlp")
    graph = mcdrop.wrap(onnx.ModelProto.FromString(exported("mlp")), example=x)
    path = mcdrop.export_onnx(graph, tmp_path / "posterior.onnx")
    _compare(_run(path, x.numpy()), mcdrop.predict(mcdrop.wrap(module, example=x), x, passes=50))


def test_it_runs_where_there_is_only_a_runtime_and_numpy(tmp_path: Path) -> None:
    module, x = built("mlp")
    model = mcdrop.wrap(module, example=x, task="classification")
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx")
    np.save(tmp_path / "x.npy", x.numpy())
    command = [sys.executable, "-c", _BARE, str(path), str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _compare(json.loads(done.stdout), mcdrop.predict(model, x, passes=50))


def test_it_is_a_sound_deterministic_graph_that_says_what_it_is(tmp_path: Path) -> None:
    module, x = built("cnn")
    path = mcdrop.export_onnx(mcdrop.wrap(module, example=x), tmp_path / "posterior.onnx", passes=8, seed=4)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert not [node for node in model.graph.node if node.op_type.startswith("Random") or node.op_type == "Dropout"]
    said = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "mcdrop.posterior"))
    assert (said["passes"], said["seed"], said["interval"]) == (8, 4, "student_t")
    first, second = _run(path, x.numpy()), _run(path, x.numpy())
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_every_task_can_be_read_in_a_graph() -> None:
    assert set(READERS) == set(TASKS)


@pytest.mark.parametrize(("given", "said"), [
    ({"interval": "conformal"}, "interval of an exported graph 'conformal'"),
    ({"interval": "quantile", "passes": 10}, "at least 39 passes"),
    ({"interval": "predictive"}, "log-variance head"),
    ({"passes": 1}, "passes must be"),
])  # fmt: skip
def test_what_a_graph_cannot_hold_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    module, x = built("mlp")
    with pytest.raises(InputError, match=said):
        mcdrop.export_onnx(mcdrop.wrap(module, example=x), tmp_path / "posterior.onnx", **given)
    assert not [*tmp_path.iterdir()]


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(exported("mlp"))
    target = tmp_path / "posterior.onnx"
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "net.onnx"), str(target), "--passes", "20", "--level", "0.9"]
    )
    assert done.exit_code == 0, done.output
    x = built("mlp")[1].numpy()
    model = mcdrop.load(tmp_path / "net.onnx")
    _compare(_run(target, x), mcdrop.predict(model, x, passes=20, level=0.9))


@pytest.mark.parametrize(("rate", "exclude"), [(0.0, []), (0.3, ["1"])])
def test_draws_that_are_left_off_are_no_part_of_a_posterior(rate: float, exclude: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Dropout(rate), torch.nn.ReLU(), torch.nn.Dropout(0.4), torch.nn.Linear(6, 2)
    )
    x = torch.randn(5, 4)
    model = mcdrop.wrap(net.eval(), example=x, exclude=exclude)
    expected = mcdrop.predict(model, x, passes=20)
    program = mcdrop.export_torch(model, tmp_path / "posterior.pt2", passes=20)
    with quiet(), torch.no_grad():
        _compare(torch.export.load(program).module()(x), expected)
    _compare(_run(mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=20), x.numpy()), expected)


@pytest.mark.parametrize("name", ["cnn", "encoder", "lstm", "mlp"])
def test_the_same_as_a_program_of_torch(name: str, tmp_path: Path) -> None:
    module, x = built(name)
    model = mcdrop.wrap(module, example=x, task="classification")
    path = mcdrop.export_torch(model, tmp_path / "posterior.pt2", passes=70, interval="quantile")
    with quiet(), torch.no_grad():
        program = torch.export.load(path).module()
        for rows in (x[:1], torch.cat([x, x / 2])):
            _compare(program(rows), mcdrop.predict(model, rows, passes=70, interval="quantile"))
    assert not any(weight.requires_grad for weight in program.parameters())  # its outputs turn into arrays
    assert all(weight.requires_grad for weight in module.parameters())


def _of_any_length() -> Any:
    """A graph that takes (N, S, 6) for any S, drops, and gives the mean over S."""
    nodes = [
        helper.make_node("Dropout", ["x", "p"], ["z"]),
        helper.make_node("ReduceMean", ["z"], ["y"], axes=[1], keepdims=0),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "s", 6])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])
    graph = helper.make_graph(nodes, "lengths", [given], [made], [number("p", 0.25)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_another_output_of_what_a_norm_layer_no_longer_gives_is_no_hindrance(tmp_path: Path) -> None:
    model, x = _of_any_length(), np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    values = ("h", "scale", "bias", "m", "v")
    norm = helper.make_node("BatchNormalization", values, ["y", "rm", "rv"], training_mode=1)
    model.graph.node[1].output[0] = "h"
    model.graph.node.extend([norm, helper.make_node("Identity", ["rm"], ["running"])])
    model.graph.initializer.extend(number(name, [1.5] * 6) for name in values[1:])
    model.graph.output.append(helper.make_tensor_value_info("running", TensorProto.FLOAT, [6]))
    found = mcdrop.wrap(model, example=x, output="y")
    _compare(_run(mcdrop.export_onnx(found, tmp_path / "p.onnx", passes=20), x), mcdrop.predict(found, x, passes=20))


def test_it_takes_rows_of_the_size_that_its_masks_have_alone(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    model = mcdrop.wrap(_of_any_length(), example=x)
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=20)
    _compare(_run(path, x[:3]), mcdrop.predict(model, x[:3], passes=20))
    with pytest.raises(Exception, match="Expected: 5"):
        _run(path, np.concatenate([x, x], axis=1))


class _Added(torch.nn.Module):
    """Takes two inputs whose names are those of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 4)

    def forward(self, mean: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.layer(mean) + output, 0.25, self.training)


def test_an_input_may_be_named_as_an_output_of_a_graph_but_not_of_a_posterior(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6), torch.randn(5, 4)
    model = mcdrop.wrap(_Added(), example=x)
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net", format="onnx"))
    ours, theirs = (mcdrop.predict(one, x, passes=20) for one in (loaded, model))
    np.testing.assert_allclose(ours.mean, theirs.mean, atol=1e-5)
    with pytest.raises(ModelRefused, match="an input is named 'mean'"):
        mcdrop.export_onnx(model, tmp_path / "posterior.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_is_written_too(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Dropout(0.25), torch.nn.Linear(16, 2))
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    model = mcdrop.wrap(net.to(dtype).eval(), example=x)
    expected = mcdrop.predict(model, x, passes=20)
    path = mcdrop.export_torch(model, tmp_path / "posterior.pt2", passes=20)
    with quiet(), torch.no_grad():
        _compare(torch.export.load(path).module()(torch.as_tensor(x, dtype=dtype)), expected)
    if dtype != torch.bfloat16:  # which onnxruntime does not multiply
        found = _run(mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=20), x.astype(str(dtype)[6:]))
        np.testing.assert_allclose(found["mean"], expected.mean, atol=1e-2)


@pytest.mark.parametrize(("name", "few"), [("lstm", "float16"), ("mlp", "bf16")])
def test_few_digits_are_no_difference(name: str, few: str, tmp_path: Path) -> None:
    """A program rounds otherwise than the passes do; both are near the same network in float32."""
    module, x = built(name)
    expected = mcdrop.predict(mcdrop.wrap(copy.deepcopy(module), example=x, tuning={}), x, passes=20)
    half = few == "float16"
    options: dict[str, Any] = {"tuning": {}, **({} if half else {"precision": few})}
    model = mcdrop.wrap(module.half() if half else module, example=x.half() if half else x, **options)
    path = mcdrop.export_torch(model, tmp_path / "posterior.pt2", passes=20)
    with quiet(), torch.no_grad():
        found = torch.export.load(path).module()(x.half() if half else x)
    np.testing.assert_allclose(found["mean"], expected.mean, atol=0.02 * np.abs(expected.mean).max())
    np.testing.assert_allclose(found["variance"].sqrt(), expected.std, rtol=0.1)
    mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=20)


class _Far(torch.nn.Module):
    """A network whose output lies far from zero."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        layers = torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Dropout(0.25), torch.nn.Linear(16, 2)
        self.net, self.offset = torch.nn.Sequential(*layers), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near: torch.Tensor = self.net(x)
        return near + self.offset


def test_a_noise_without_a_finite_variance_is_no_difference(tmp_path: Path) -> None:
    """All is told apart on the scale of the mean's own spread then."""

    class Noiseless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1))
            self.body = torch.nn.Sequential(*layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = self.body(x)
            return torch.cat([mean, mean * 0 + torch.nan], 1)

    torch.manual_seed(0)
    model = mcdrop.wrap(Noiseless().double().eval(), example=torch.randn(5, 4).double(), task="gaussian")
    path = mcdrop.export_onnx(model, tmp_path / "posterior.onnx")
    x = model.example.args[0].numpy()
    found, expected = _run(path, x), mcdrop.predict(model, x, passes=50)
    np.testing.assert_allclose(found["epistemic"], expected.epistemic, rtol=1e-6)
    assert np.isnan(found["variance"]).all()


def _far(dtype: torch.dtype, offset: float, task: str = "regression") -> mcdrop.Model:
    torch.manual_seed(0)
    net, x = _Far(offset).to(dtype).eval(), torch.randn(5, 6, dtype=dtype)
    return mcdrop.wrap(net, example=x, task=task)


@pytest.mark.parametrize(("dtype", "offset", "task"), [
    (torch.float64, 1e7, "regression"),
    (torch.float64, 1e7, "classification"),
    (torch.float32, 1e5, "regression"),
])  # fmt: skip
def test_a_spread_keeps_its_digits_beside_a_large_mean(
    dtype: torch.dtype, offset: float, task: str, tmp_path: Path
) -> None:
    model = _far(dtype, offset, task)
    asked: dict[str, Any] = {"passes": 40, "sampler": "iid"}
    x = model.example.args[0]
    samples = mcdrop.predict(model, x, keep_samples=True, **asked).samples
    assert samples is not None
    samples = samples.astype(np.float64)
    variance = samples.var(axis=0, ddof=1)
    with quiet(), torch.no_grad():
        program = torch.export.load(mcdrop.export_torch(model, tmp_path / "posterior.pt2", **asked)).module()(x)
    by_torch = {name: value.numpy() for name, value in program.items()}
    for found in (_run(mcdrop.export_onnx(model, tmp_path / "posterior.onnx", **asked), x.numpy()), by_torch):
        assert {str(v.dtype) for name, v in found.items() if name != "label"} == {str(dtype)[6:]}
        rounded = 1e-6 if dtype == torch.float64 else 1e-2  # of float32 a last digit is a tenth of this spread
        np.testing.assert_allclose(found["variance"], variance, rtol=rounded)
        np.testing.assert_allclose(found["standard_error"], np.sqrt(variance / 40), rtol=rounded)
        np.testing.assert_allclose(found["mean"], samples.mean(axis=0), rtol=1e-7)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float64, 1e7), (torch.float32, 100.0)])
def test_a_wrong_spread_is_seen_beside_a_large_mean(dtype: torch.dtype, offset: float) -> None:
    model = _far(dtype, offset)
    p = mcdrop.predict(model, model.example, passes=20)
    found = {name: getattr(p, name).astype(str(dtype)[6:]) for name in ("mean", "variance", "standard_error")}
    assert _worst(found, p, 1e-5) <= 1e-5
    for name in ("variance", "standard_error"):
        assert _worst({**found, name: found[name] * 1.02}, p, 1e-5) > 1e-5


def test_rows_in_bfloat16_are_saved_and_exported(tmp_path: Path) -> None:
    """Numpy has no such type; float32 holds every number of it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 2)).bfloat16()
    x = torch.randn(5, 4).bfloat16()
    model = mcdrop.wrap(net.eval(), example=x)
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format="pt2"))
    np.testing.assert_array_equal(loaded.example.leaves[0], x.float().numpy())
    expected = mcdrop.predict(model, x, passes=9)
    np.testing.assert_array_equal(mcdrop.predict(loaded, x, passes=9).mean, expected.mean)
    path = mcdrop.export_torch(model, tmp_path / "posterior.pt2", passes=9)
    with quiet(), torch.no_grad():
        _compare(torch.export.load(path).module()(x), mcdrop.predict(model, x, passes=9, level=0.95))
