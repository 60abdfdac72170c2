"""The silent ways to a variance of zero or a wrong one: each ends in the right variance or in a named cause."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import built, exported, live
from numpy.typing import NDArray
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import ModelRefused, NoStochasticSite, UncontrolledDraw
from mcdrop.quiet import quiet
from mcdrop.wrapping import wrap_graph


def _variance(model: Any, x: Tensor, **given: Any) -> NDArray[np.float64]:
    return mcdrop.predict(model, x, passes=50, **given).variance


def _truth(name: str) -> tuple[nn.Module, Tensor, NDArray[np.float64]]:
    module, x = built(name)
    return module, x, _variance(mcdrop.wrap(module, example=x), x)


def _saved(path: Path, program: Any) -> Path:
    torch.export.save(program, path)
    return path


def test_1_the_runtime_s_optimiser_that_deletes_dropout_finds_none_to_delete() -> None:
    _, x, expected = _truth("mlp")
    data = exported("mlp")
    plain = onnxruntime.InferenceSession(data)
    twice = [plain.run(None, {plain.get_inputs()[0].name: x.numpy()})[0] for _ in range(2)]
    assert np.array_equal(*twice)  # what a server would see: no variance at all
    assert np.abs(_variance(wrap_graph(data, example=x), x) - expected).max() <= 1e-5


def test_2_an_export_in_eval_has_no_dropout_and_is_refused_with_the_recipe() -> None:
    with pytest.raises(NoStochasticSite, match=r"exports in eval mode.*torch\.onnx\.export"):
        wrap_graph(exported("mlp", training=False), example=built("mlp")[1])


def test_3_a_decomposed_program_is_refused_with_the_cause(tmp_path: Path) -> None:
    module, x = built("mlp")
    with quiet():
        program = torch.export.export(module, (x,)).run_decompositions()
    with pytest.raises(NoStochasticSite, match=r"run_decompositions\(\) removes"):
        mcdrop.load(_saved(tmp_path / "net.pt2", program), example=x)


def test_4_the_fused_transformer_layer_drops_all_the_same() -> None:
    module, x, variance = _truth("encoder")
    with torch.no_grad():
        live(module)
        module[0].layers[0].training = False  # type: ignore[index]
        draws = torch.stack([module(x) for _ in range(200)])
    assert variance.min() > 0.2 * float(draws.var(0).min())


def test_5_functional_dropout_counts_as_much_as_a_module() -> None:
    class Functional(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.inner:  # type: ignore[attr-defined]
                drops = isinstance(layer, nn.Dropout)
                x = nn.functional.dropout(x, layer.p, self.training) if drops else layer(x)
            return x

    module, x, expected = _truth("mlp")
    assert np.array_equal(_variance(mcdrop.wrap(Functional(module), example=x), x), expected)


def test_6_attention_and_recurrent_dropout_is_kept_injected_or_named(tmp_path: Path) -> None:
    for name, form in (("encoder", "pt2"), ("lstm", "pt2")):  # test_formats has such networks as graphs too
        module, x, expected = _truth(name)
        mcdrop.save(mcdrop.wrap(module, example=x), tmp_path / name, format=form)
        assert np.abs(_variance(mcdrop.load(tmp_path / name), x) - expected).max() <= 1e-5
    module, x = built("encoder")
    lossy = [wrap_graph(exported("encoder"), example=x)]
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    lossy.append(mcdrop.load(_saved(tmp_path / "net.pt2", program), example=x))
    for model in lossy:
        assert any("attention without dropout" in warning for warning in model.audit.warnings)


def test_7_torchscript_is_refused_as_a_module_and_as_a_file(tmp_path: Path) -> None:
    module, x = built("mlp")
    with quiet():
        traced = torch.jit.trace(module, x)
        frozen = torch.jit.freeze(traced)
        torch.jit.save(frozen, tmp_path / "net.pt")
    for script in (traced, frozen):
        with pytest.raises(ModelRefused, match="TorchScript"):
            mcdrop.wrap(script, example=x)
    with pytest.raises(mcdrop.errors.ArtifactError, match="TorchScript"):
        mcdrop.load(tmp_path / "net.pt")


def test_8_batch_norm_of_a_training_export_is_put_back_to_its_statistics(tmp_path: Path) -> None:
    module, x, expected = _truth("mlp")
    data = _training_norm(exported("mlp", legacy=True))
    model = wrap_graph(data, example=x)
    assert any("training mode" in warning for warning in model.audit.warnings)
    assert np.abs(_variance(model, x) - expected).max() <= 1e-5
    program = torch.export.export(module.train(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    loaded = mcdrop.load(_saved(tmp_path / "net.pt2", program), example=x)
    before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
    assert np.abs(_variance(loaded, x) - expected).max() <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in loaded.module.state_dict().items())


def _training_norm(data: bytes) -> bytes:
    """The graph as the legacy exporter writes it in training mode: batch statistics, and running ones as outputs."""
    model = onnx.ModelProto.FromString(data)
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            kept = [attribute for attribute in node.attribute if attribute.name != "training_mode"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("training_mode", 1)])
            node.output.extend(["moved_mean", "moved_var"])
    return bytes(model.SerializeToString())


def test_9_no_export_of_ours_moves_the_network_that_it_exports(tmp_path: Path) -> None:
    module, x = built("mlp")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = mcdrop.wrap(module, example=x)
    mcdrop.export_onnx(model, tmp_path / "posterior.onnx", passes=8)
    for form in ("onnx", "pt2"):
        mcdrop.save(model, tmp_path / form, format=form)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(child.training for child in module.modules())


class Bank(nn.Module):
    """Takes masks that were drawn before in turn, as some recurrent layers of SpeechBrain do; or it only counts."""

    masks: Tensor

    def __init__(self, *, draws: bool) -> None:
        super().__init__()
        self.count, self.draws = 0, draws
        self.register_buffer("masks", nn.functional.dropout(torch.ones(1000, 8), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        self.count += len(x)
        return x * self.masks[self.count - len(x) : self.count] if self.draws else x


def test_masks_that_were_drawn_before_and_are_taken_in_turn_are_refused_by_name() -> None:
    x = torch.randn(3, 8)

    def net(*, draws: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Bank(draws=draws), nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 1))

    with pytest.raises(UncontrolledDraw, match=r"draws in 0, which changes its attribute count .* drawn before"):
        mcdrop.wrap(net(draws=True), example=x)
    assert [site.path for site in mcdrop.wrap(net(draws=True), example=x, exclude="0").audit.live] == ["2"]
    assert [site.path for site in mcdrop.wrap(net(draws=False), example=x).audit.live] == ["2"]


# -- the last digits of sums in no fixed order -------------------------------------------------------------------------


SUMMED = torch.randn(8, 9, 4, generator=torch.Generator().manual_seed(1))
CALLS = itertools.count()  # nobody sees it, as nobody does what threads do


def in_any_order(h: Tensor) -> Tensor:
    """The sum over an axis, split at another place in each call but where torch's own kernels keep to one order."""
    at = 4 if torch.are_deterministic_algorithms_enabled() else 1 + next(CALLS) * 5 % 8
    return h[:, :at].sum(1) + h[:, at:].sum(1)


class Sums(nn.Module):
    """Sums what its rows hold, and drops from that or, ``dead``, from what it throws away."""

    def __init__(self, seed: int, *, dead: bool = False, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last, self.act, self.drop = nn.Linear(4, 16), nn.Linear(16, 1), nn.Tanh(), nn.Dropout(p)
        self.dead = dead

    def forward(self, x: Tensor) -> Tensor:
        h = in_any_order(self.act(self.first(x)))
        dropped = self.drop(h)
        out: Tensor = self.last(h if self.dead else dropped)
        return out


def test_the_sums_of_these_tests_do_differ_in_their_last_digits() -> None:
    h = torch.tanh(SUMMED)
    seen = [in_any_order(h) for _ in range(8)]
    assert 0 < max(float((one - seen[0]).abs().max()) for one in seen) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_a_dead_draw_is_not_live_by_the_noise_of_sums(seed: int) -> None:
    with pytest.raises(NoStochasticSite, match="no mask on it changes the output"):
        mcdrop.wrap(Sums(seed, dead=True), example=SUMMED)


@pytest.mark.parametrize("seed", range(4))
def test_the_noise_of_sums_is_no_draw_out_of_sight(seed: int) -> None:
    model = mcdrop.wrap(Sums(seed), example=SUMMED)
    assert [site.verdict for site in model.audit.sites] == ["live"]
    assert model.audit.kept == {}
    assert model.audit.warnings == ()


class Gate(Sums):
    """Drops whole rows and hardly ever one: most masks leave the output as it is, noise aside."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, p=0.01)
        self.last = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(in_any_order(self.act(self.first(x)))) * self.drop(x.new_ones(len(x), 1))
        return out


@pytest.mark.parametrize("seed", range(4))
def test_masks_that_hardly_ever_move_the_output_do_not_measure_its_noise(seed: int) -> None:
    assert [site.verdict for site in mcdrop.wrap(Gate(seed), example=SUMMED).audit.sites] == ["live"]


class Hidden(Sums):
    """Something out of sight moves its output in training mode, beside the noise of its sums."""

    def __init__(self, size: float, *, noise: bool) -> None:
        super().__init__(0)
        self.size, self.noise = size, noise

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        out: Tensor = self.last(self.drop(in_any_order(h) if self.noise else h.sum(1)))
        return out * (1 + self.size * (1 + next(CALLS) * 7 % 9)) if self.training else out


@pytest.mark.parametrize(("size", "noise"), [(1e-1, True), (1e-4, True), (1e-1, False), (1e-4, False), (1e-6, False)])
def test_a_draw_out_of_sight_is_told_from_noise(size: float, *, noise: bool) -> None:
    with pytest.raises(UncontrolledDraw, match="out of sight"):
        mcdrop.wrap(Hidden(size, noise=noise), example=SUMMED)


class Added(Sums):
    """Something out of sight is added to outputs of which one row's is a million times as large."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x)).sum(1)
        out: Tensor = self.last(self.drop(h)) * torch.where(torch.arange(len(x)) == 3, 1e6, 1.0)[:, None]
        return out + 0.1 * (next(CALLS) % 5)


def test_a_row_that_is_very_large_hides_no_draw_out_of_sight() -> None:
    with pytest.raises(UncontrolledDraw, match="out of sight"):
        mcdrop.wrap(Added(0), example=SUMMED)


class Slight(Sums):
    """A draw that moves the output in its last digits alone, and always does."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x)).sum(1)
        out: Tensor = self.last(h + 1e-6 * self.drop(h))
        return out


def test_the_least_effect_is_one_where_the_network_repeats_to_the_bit() -> None:
    assert [site.verdict for site in mcdrop.wrap(Slight(0), example=SUMMED).audit.sites] == ["live"]
