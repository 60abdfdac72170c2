"""Lower precision: its error is stated, too large a one is refused, and nothing of it passes for full precision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captures import apart, backend_of, loop, made, passes
from devices import on_each_device
from factories import FACTORIES, plain, trained
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

import mcdrop
import mcdrop.factory
from mcdrop.errors import InputError, ModelRefused, UnknownName
from mcdrop.wrapping import wrap_graph

TOLD = 32  # passes over four rows that the audit's error is measured on


@pytest.mark.parametrize("name", ["mlp", "residual", "encoder", "lstm"])
@on_each_device
def test_the_audit_states_how_far_bf16_is_from_full_precision(name: str, device: str) -> None:
    """Counted again from the loop in float32: the root mean square of the change, in standard deviations of a pass.

    It is that of the output, or channel, where it is largest.
    """
    net, x = made(name, device)
    model = mcdrop.wrap(net, example=x[:4], precision="bf16")
    assert model.audit.tier == "captured"
    assert model.audit.precision == "bf16"
    full, low = (run.double() for run in (loop(model, x[:4], TOLD), passes(model, x[:4], TOLD)))
    changed, spread = ((low - full).square().mean(0), full.var(dim=0))
    per_output = (one.movedim(1, -1).reshape(-1, one.shape[1]).mean(0) for one in (changed, spread))
    error = float(torch.div(*per_output).max().sqrt())
    assert model.audit.precision_error is not None
    assert 1e-4 < error < 0.2
    assert abs(model.audit.precision_error - error) < 0.02 * error
    assert f"off from fp32 by {model.audit.precision_error:.2%}" in str(model.audit)


@on_each_device
def test_an_output_of_small_units_is_not_hidden_by_one_of_large_ones(device: str) -> None:
    """bf16 has 8 bits: of 100 the last is worth 0.5, more than its spread here, whatever is in thousands beside it."""
    last = nn.Linear(32, 2)
    with torch.no_grad():
        last.weight[0] *= 1000
        last.bias[1] += 100
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.2), last).to(device)
    with pytest.raises(ModelRefused, match="standard deviation of output 1, more than 20%"):
        mcdrop.wrap(net, example=torch.randn(8, 6, device=device), precision="bf16")


class Summed(nn.Module):
    """Gives probabilities, and their sum, which is 1 but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.chances = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 4), nn.Softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        chances = self.chances(x)
        return torch.cat([chances, chances.sum(-1, keepdim=True)], -1)


@on_each_device
def test_an_output_that_varies_by_rounding_alone_has_no_say(device: str) -> None:
    x = torch.randn(8, 8, device=device)
    whole, chances = (mcdrop.wrap(net, example=x, precision="bf16") for net in (summed(device), alone(device)))
    assert whole.audit.precision_error is not None
    assert chances.audit.precision_error is not None
    assert abs(whole.audit.precision_error - chances.audit.precision_error) < 0.1 * chances.audit.precision_error


def summed(device: str) -> Summed:
    torch.manual_seed(0)
    return Summed().to(device)


def alone(device: str) -> nn.Module:
    return summed(device).get_submodule("chances")


@on_each_device
def test_ids_among_real_numbers_need_all_digits(device: str) -> None:
    """In bf16 257 is 256: a table's column of ids would look up another row, silently."""
    net, x = Looked().to(device), torch.stack([torch.arange(8.0), torch.randn(8)], 1).to(device)
    with pytest.raises(
        ModelRefused, match=r"makes whole numbers of real ones, and torch\.bfloat16 holds those up to 256 alone"
    ):
        mcdrop.wrap(net, example=x, precision="bf16")
    assert mcdrop.wrap(net, example=x).audit.tier == "captured"


class Looked(nn.Module):
    """Looks a column of its table up."""

    def __init__(self) -> None:
        super().__init__()
        self.looked, self.drop, self.last = nn.Embedding(2000, 16), nn.Dropout(0.3), nn.Linear(17, 2)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(self.drop(torch.cat([self.looked(x[:, 0].long()), x[:, 1:]], 1)))
        return last


@on_each_device
def test_answers_in_bf16_are_within_their_error_of_full_precision(device: str) -> None:
    net, x = made("mlp", device)
    full, low = (mcdrop.wrap(net, example=x[:8], precision=precision) for precision in ("fp32", "bf16"))
    ours, theirs = (mcdrop.predict(model, x, passes=200) for model in (low, full))
    assert low.audit.precision_error is not None
    # each pass is off by the stated error on other rows too, give or take a factor; its mean by no more than a pass
    assert np.sqrt(np.square((ours.mean - theirs.mean) / theirs.std).mean()) < 3 * low.audit.precision_error
    assert (np.abs(ours.mean - theirs.mean) < 0.2 * theirs.std).all()
    np.testing.assert_allclose(ours.variance, theirs.variance, rtol=0.1)
    assert not np.array_equal(ours.mean, theirs.mean)
    assert full.audit.precision_error is None
    assert full.audit.precision == "fp32"
    assert "precision" not in str(full.audit)


@pytest.mark.parametrize(("name", "rides"), [("mlp", False), ("residual", True), ("lstm", True)])
@pytest.mark.filterwarnings("ignore:RNN module weights")  # those of net(x) at the end have other memory
@on_each_device
def test_the_deterministic_output_has_the_digits_of_the_passes(name: str, rides: bool, device: str) -> None:
    """It rides along where plain eval is a pass at the masks' expectations, which that of an alpha dropout is not."""
    net, x = made(name, device)
    model = mcdrop.wrap(net, example=x[:8], precision="bf16")
    assert backend_of(model).plan(model.rows(x)).rides == rides
    with torch.no_grad():
        assert apart(mcdrop.predict(model, x, passes=4).deterministic, net(x).cpu()) < 2e-2
        for weight in net.parameters():  # it is that of today's weights, also where these have other memory
            weight.mul_(1.5)
            weight.data = weight.data.clone()
        found = mcdrop.predict(model, x, passes=4).deterministic
        assert apart(found, net(x).cpu()) < (2e-2 if rides else 1e-6)
        assert apart(mcdrop.predict(model, x, tolerance=1e9).deterministic, found) < 1e-2
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


@on_each_device
def test_any_number_of_rows_and_passes_gives_the_same_passes_in_bf16(device: str) -> None:
    net, x = made("mlp", device)
    model = mcdrop.wrap(net, example=x[:4], precision="bf16")
    whole = passes(model, x[:9], 20)
    for rows, count in ((1, 2), (9, 3), (2, 20)):
        assert apart(passes(model, x[:rows], count), whole[:count, :rows]) < 2e-2  # three digits


def test_the_last_layer_in_closed_form_works_in_bf16() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 2)).eval()
    x = torch.randn(8, 4)
    ours, theirs = (
        mcdrop.predict(mcdrop.wrap(net, example=x, precision=precision), x, passes=2, exact_last=True)
        for precision in ("bf16", "fp32")
    )
    assert 0 < apart(ours.mean, theirs.mean) < 2e-2
    assert apart(ours.variance, theirs.variance) < 5e-2


def test_new_weights_are_seen_in_bf16() -> None:
    net, x = made("mlp")
    model = mcdrop.wrap(net, example=x[:4], precision="bf16")
    before = passes(model, x[:4], 3)
    net.get_parameter("6.bias").data.add_(1)
    assert apart(passes(model, x[:4], 3), before + 1) < 2e-2
    net.double()  # no longer a float32 network
    assert apart(loop(model, x[:4], 3), before + 1) < 2e-2


def test_a_processor_without_bfloat16_is_named() -> None:
    net, x = made("mlp")
    said = [mcdrop.wrap(net, example=x[:4], precision=precision).audit.warnings for precision in ("bf16", "fp32")]
    slow = [any("slower than 'fp32' here" in text for text in texts) for texts in said]
    assert slow == [not torch.ops.mkldnn._is_mkldnn_bf16_supported(), False]


@pytest.mark.parametrize("seed", range(4))
def test_outputs_that_are_small_because_much_cancels_out_keep_the_digits_of_what_they_were_made_of(seed: int) -> None:
    """Around 0 a difference is large beside an output, and small beside the spread, which is what the audit states."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Dropout(0.02), nn.Linear(256, 1)).eval()
    x = torch.randn(1, 4).repeat(4, 1)
    with torch.no_grad():
        net.get_parameter("3.bias").sub_(net(x[:1])[0])
    model = mcdrop.wrap(net, example=x, precision="bf16")
    assert model.audit.tier == "captured"
    full, low = (run.double() for run in (loop(model, x, TOLD), passes(model, x, TOLD)))
    error = float((low - full).square().mean().sqrt() / full.std())
    assert 0 < error < 0.2
    assert model.audit.precision_error == pytest.approx(error, rel=0.05)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_spread_too_small_for_three_digits_is_refused() -> None:
    """At 1000 neighbours in bfloat16 are 4 apart."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.01), nn.Linear(30, 2)).eval()
    x = torch.randn(8, 4)
    with torch.no_grad():
        net.get_parameter("2.bias").fill_(1000)
    with pytest.raises(ModelRefused, match=r"precision='bf16' is off from fp32 by .* use 'fp32'"):
        mcdrop.wrap(net, example=x, precision="bf16")
    assert mcdrop.wrap(net, example=x).audit.precision_error is None


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out * 2 if float(x.sum()) > 0 else out


class OtherwiseInAGraph(ByValue):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out * 1.005 if get_proxy_mode() is not None else out


def test_a_graph_that_differs_by_less_than_few_digits_would_tell_is_refused() -> None:
    net, x = OtherwiseInAGraph().eval(), torch.ones(4, 4)
    full = mcdrop.wrap(net, example=x)
    assert full.audit.tier != "captured"
    assert "the graph differs from the loop by" in full.audit.tier_reason
    with pytest.raises(ModelRefused, match=r"the graph differs from the loop by"):
        mcdrop.wrap(net, example=x, precision="bf16")


@pytest.mark.parametrize(
    ("net", "precision", "error", "said"),
    [
        (plain, "fp8", UnknownName, "unknown precision 'fp8'; choose one of: bf16, fp32, tf32"),
        (plain, "tf32", InputError, "precision='tf32' needs a CUDA device"),
        (lambda: plain().double(), "bf16", InputError, "is for float32 networks; this one is torch.float64"),
        (lambda: plain().bfloat16(), "bf16", InputError, "is for float32 networks; this one is torch.bfloat16"),
        (ByValue, "bf16", ModelRefused, "needs the network as one graph, and it cannot be captured: "),
    ],
    ids=["unknown", "tf32 on a CPU", "double", "bfloat16", "not captured"],
)
def test_what_cannot_be_had_is_refused(net: Any, precision: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        mcdrop.wrap(net().eval(), example=torch.ones(4, 4), precision=precision)
    assert said in str(caught.value)


def test_a_graph_of_onnx_runs_as_it_is() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from graphs import built, exported

    x = built("mlp")[1].numpy()
    with pytest.raises(InputError, match="an ONNX graph runs as it is"):
        mcdrop.wrap(exported("mlp"), example=x, precision="bf16")  # type: ignore[arg-type]
    model = wrap_graph(exported("mlp"), example=x)
    with pytest.raises(InputError, match="an ONNX graph runs as it is"):
        mcdrop.wrap(model, example=x, compile=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_is_for_cuda_devices() -> None:
    net, x = made("residual", "cuda")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    model = mcdrop.wrap(net, example=x[:4], precision="tf32")
    assert model.audit.precision_error is not None
    assert model.audit.precision_error < 0.1
    assert apart(passes(model, x[:4], 5), loop(model, x[:4], 5)) < 1e-2
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


# -- what is bound to the passes ---------------------------------------------------------------------------------------


@pytest.fixture
def _these_networks_may_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcdrop.factory, "FACTORY_MODULES", (*mcdrop.factory.FACTORY_MODULES, "factories"))


@pytest.mark.usefixtures("_these_networks_may_be_loaded")
def test_a_saved_model_keeps_its_precision(tmp_path: Path) -> None:
    make, x = FACTORIES["plain"]
    low, full = (trained(make, x, precision=precision) for precision in ("bf16", "fp32"))
    loaded = mcdrop.load(mcdrop.save(low, tmp_path / "low" / "1", factory="factories:plain"))
    assert loaded.audit.precision == "bf16"
    assert loaded.audit.precision_error == low.audit.precision_error
    ours, theirs = (mcdrop.predict(model, x, passes=20, seed=5) for model in (low, loaded))
    np.testing.assert_array_equal(ours.mean, theirs.mean)
    again = mcdrop.load(mcdrop.save(full, tmp_path / "full" / "1", factory="factories:plain"))
    assert again.audit.precision == "fp32"
    assert not np.array_equal(mcdrop.predict(again, x, passes=20, seed=5).mean, ours.mean)


def test_a_calibration_holds_for_its_precision_alone() -> None:
    net, x = made("mlp")
    y = np.random.default_rng(0).normal(size=(64, 2))
    models = [mcdrop.wrap(net, example=x[:8], precision=precision) for precision in ("fp32", "bf16")]
    fitted = [mcdrop.calibrate(model, x, y, passes=20) for model in models]
    assert fitted[0].fingerprint != fitted[1].fingerprint
    for mine, other in ((0, 1), (1, 0)):
        mcdrop.predict(models[mine], x, calibration=fitted[mine])
        with pytest.raises(InputError, match="belongs to another model"):
            mcdrop.predict(models[mine], x, calibration=fitted[other])
    assert backend_of(models[0]).digest() == backend_of(mcdrop.wrap(net, example=x[:8])).digest()
