"""Model folders in every format: the same answers, the same audit, and what was fitted is still bound."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import built, exported
from zoo import conv, mlp, sequence
from zoo.specimen import Specimen

import mcdrop
from mcdrop.audit import Audit
from mcdrop.errors import ArtifactError, InputError, MCDropError, ModelNotFound, UncontrolledDraw, UnknownName
from mcdrop.formats import FORMATS, same_numbers
from mcdrop.screening import SCORES
from mcdrop.store import MANIFEST
from models import networks

NETS: dict[str, Any] = {
    "digits": lambda: (networks.digits(2, 16).eval(), torch.randn(4, 16)),
    "noisy_line": lambda: (networks.noisy_line().eval(), torch.randn(4, 1)),
}
ZOO: list[Specimen] = [
    mlp.dropout_everywhere, mlp.dropconnect, mlp.functional_dropout, mlp.variational_linear,
    conv.dropout2d_before_batchnorm, conv.dropout_in_head, conv.shake_shake, conv.unet,
    sequence.encoder_padded, sequence.hand_attention, sequence.lstm_bidirectional, sequence.lstm_cell_loop,
]  # fmt: skip


def _net(name: str) -> tuple[Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETS[name]() if name in NETS else next(one for one in ZOO if one.name == name).build()


@cache
def _model(name: str) -> mcdrop.Model:
    module, example = _net(name)
    return mcdrop.wrap(module, example=example, tuning={})


def _live(model: mcdrop.Model) -> list[Any]:
    return [(site.name, site.kind, site.p, site.shape) for site in model.audit.live]


@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("name", [*NETS, *(one.name for one in ZOO)])
def test_round_trips(name: str, form: str, tmp_path: Path) -> None:
    model = _model(name)
    folder = mcdrop.save(model, tmp_path / "net" / "1", format=form)
    loaded = mcdrop.load(folder)
    assert _live(loaded) == _live(model)
    ask: dict[str, Any] = {"passes": 30, "seed": 7}
    ours, theirs = mcdrop.predict(model, model.example, **ask), mcdrop.predict(loaded, loaded.example, **ask)
    for field in ("mean", "variance", "lower", "upper"):
        assert np.abs(getattr(ours, field) - getattr(theirs, field)).max() <= 1e-5
    if form == "pt2":
        _assert_audited_alike(loaded.audit, model.audit)


def _assert_audited_alike(theirs: Audit, ours: Audit) -> None:
    """A program runs as the network it came from: by the same tier, with the same to say of norm layers."""
    assert (theirs.tier, theirs.exact_last) == (ours.tier, ours.exact_last)
    assert [norm.path for norm in theirs.norms] == [norm.path for norm in ours.norms]
    for found, expected in zip(theirs.norms, ours.norms, strict=True):
        assert found.mask_effect == pytest.approx(expected.mask_effect, rel=1e-3)
    shifts = [[text for text in audit.warnings if "shifts the variance" in text] for audit in (ours, theirs)]
    assert len(shifts[0]) == len(shifts[1])


@pytest.mark.parametrize("form", ["onnx", "pt2", "safetensors"])
def test_calibrations_and_screens_stay_bound(form: str, tmp_path: Path) -> None:
    module, _ = _net("digits")
    x = np.random.default_rng(0).standard_normal((80, 16)).astype(np.float32)
    model = mcdrop.wrap(module, example=x, task="classification")
    model = model.with_calibration(mcdrop.calibrate(model, x[:40], np.arange(40) % 10))
    model = model.with_screen(mcdrop.fit_screen(model, x[:40], fpr=0.05))
    factory = {"factory": "models.networks:digits", "arguments": {"hidden_layers": 2, "inputs": 16}}
    given: dict[str, Any] = factory if form == "safetensors" else {"format": form}
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", **given))
    ours, theirs = (mcdrop.predict(one, x[40:]) for one in (model, loaded))
    assert loaded.calibration is not None
    assert theirs.p_value is not None
    assert theirs.prediction_set is not None
    assert np.abs(np.asarray(ours.score) - np.asarray(theirs.score)).max() <= 1e-5
    assert np.array_equal(np.asarray(ours.prediction_set), theirs.prediction_set)


def _screened(score: str, **options: Any) -> tuple[mcdrop.Model, Any]:
    """A perceptron with a screen that compares hidden features, and other rows."""
    module, _ = _net("digits")
    x = np.random.default_rng(0).standard_normal((120, 16)).astype(np.float32)
    model = mcdrop.wrap(module, example=x, task="classification", tuning={})
    screen = mcdrop.fit_screen(model, x[:100], score=score, fpr=0.1, **options)
    return model.with_screen(screen), 3 * x[100:]


@pytest.mark.parametrize("score", sorted(name for name, score in SCORES.items() if score.needs_features))
@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_graph_gives_the_features_that_its_screen_compares(form: str, score: str, tmp_path: Path) -> None:
    model, x = _screened(score)
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format=form))
    ours, theirs = (mcdrop.predict(one, x) for one in (model, loaded))
    np.testing.assert_allclose(np.asarray(theirs.score), np.asarray(ours.score), rtol=1e-5)
    assert np.array_equal(np.asarray(ours.p_value), np.asarray(theirs.p_value))


@pytest.mark.parametrize(
    ("form", "layer", "remedy"),
    [
        ("onnx", "1", "factory="),
        ("pt2", "1", "factory="),  # a sigmoid, which is no module in a program
    ],
)
def test_a_screen_of_features_that_a_format_loses_is_refused(
    form: str, layer: str | None, remedy: str, tmp_path: Path
) -> None:
    model, x = _screened("feature_distance", layer=layer)
    with pytest.raises(ArtifactError, match=f"compares hidden features.*; save it with {re.escape(remedy)}$"):
        mcdrop.save(model, tmp_path / "net" / "1", format=form)
    assert [*(tmp_path / "net").iterdir()] == []
    shape: dict[str, Any] = {"hidden_layers": 2, "inputs": 16}
    folder = mcdrop.save(model, tmp_path / "net" / "1", factory="models.networks:digits", arguments=shape)
    ours, theirs = (mcdrop.predict(one, x).p_value for one in (model, mcdrop.load(folder)))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_folder_whose_screen_cannot_run_is_not_loaded(tmp_path: Path) -> None:
    manifest = mcdrop.save(_screened("combined")[0], tmp_path / "net" / "1") / MANIFEST
    text = manifest.read_text()
    assert "\n[screen]\n" in text
    manifest.write_text(text.replace("\n[screen]\n", '\n[screen]\nlayer = "nope"\n'))
    with pytest.raises(ArtifactError, match=r"compares hidden features.*\(unknown layer 'nope'"):
        mcdrop.load(tmp_path / "net" / "1")


def test_a_graph_with_injected_sites_can_be_saved(tmp_path: Path) -> None:
    x = built("mlp")[1]
    (tmp_path / "net.onnx").write_bytes(exported("mlp", training=False))
    model = mcdrop.load(tmp_path / "net.onnx", example=x, inject={"node_relu": 0.25})
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1"))
    assert _live(loaded) == _live(model)
    assert np.array_equal(mcdrop.predict(model, x).variance, mcdrop.predict(loaded, x).variance)


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    packed, example = sequence.lstm_packed.build()
    model = mcdrop.wrap(packed, example=example)
    with pytest.raises(MCDropError, match="cannot export"):
        mcdrop.save(model, tmp_path / "net" / "1", format="onnx")
    with pytest.raises(UnknownName, match="onnx, pt2, safetensors"):
        mcdrop.save(model, tmp_path / "net" / "1", format="pickle")
    with pytest.raises(InputError, match="factory"):
        mcdrop.save(model, tmp_path / "net" / "1", format="safetensors")
    assert (
        not [path for path in (tmp_path / "net").iterdir() if path.name != "1"] if (tmp_path / "net").exists() else True
    )
    assert not (tmp_path / "net" / "1").exists()


def test_a_network_whose_draws_off_are_not_its_eval_is_not_for_a_graph(tmp_path: Path) -> None:
    module, example = mlp.alpha_dropout.build()
    model = mcdrop.wrap(module, example=example)
    with pytest.raises(MCDropError, match="not its output in eval"):
        mcdrop.save(model, tmp_path / "onnx" / "1", format="onnx")
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "pt2" / "1", format="pt2"))
    assert np.array_equal(mcdrop.predict(model, example).variance, mcdrop.predict(loaded, example).variance)


def test_a_graph_that_rounds_otherwise_names_the_format_that_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Dropout(0.25), torch.nn.Linear(16, 2))
    x = torch.randn(5, 6)
    for model in (
        mcdrop.wrap(copy.deepcopy(net).eval(), example=x, precision="bf16", tuning={}),
        mcdrop.wrap(copy.deepcopy(net).bfloat16().eval(), example=x.bfloat16(), tuning={}),
    ):
        with pytest.raises(MCDropError, match=r"save it with format='pt2'$"):
            mcdrop.save(model, tmp_path / "net" / "1", format="onnx")
    assert mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format="pt2"))


def test_defaults_that_a_format_cannot_give_are_refused(tmp_path: Path) -> None:
    """The folder would load, and then be refused by the service, with the whole store that it lies in."""
    layers = torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
    net = torch.nn.Sequential(*layers).eval()
    model = replace(mcdrop.wrap(net, example=torch.randn(4, 4), tuning={}), defaults=mcdrop.Options(exact_last=True))
    with pytest.raises(InputError, match=r"exact_last=True, which the format 'onnx' cannot.*format='pt2'$"):
        mcdrop.save(model, tmp_path / "net" / "1", format="onnx")
    assert not [*(tmp_path / "net").iterdir()]
    assert mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1", format="pt2")).defaults.exact_last


class _Off(torch.nn.Module):
    """Draws that are left off in front of and between others: by a literal, by ``exclude``, of dropout and of noise."""

    def __init__(self, left_off: str) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        self.drop, self.inner = torch.nn.Dropout(0.2), _Inner(left_off)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.drop(self.inner(self.first(x))))
        y: torch.Tensor = self.last(torch.nn.functional.alpha_dropout(x, 0.2, True))
        return y


class _Inner(torch.nn.Module):
    def __init__(self, left_off: str) -> None:
        super().__init__()
        self.left_off, self.drop = left_off, torch.nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = torch.nn.functional.dropout
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "literal": lambda: dropout(x, 0.4, False),
            "module": lambda: self.drop(x),
            "always": lambda: dropout(x, 0.4, True),
            "channels": lambda: torch.nn.functional.dropout2d(x[..., None], 0.4, True)[..., 0],
            "noise": lambda: x + torch.randn_like(x),
        }
        return ways[self.left_off]()


@pytest.mark.parametrize("left_off", ["literal", "module", "always", "channels", "noise"])
def test_what_is_left_off_stays_off_in_a_program(left_off: str, tmp_path: Path) -> None:
    """Whoever reads a program puts all of its dropout on."""
    torch.manual_seed(0)
    excluded: dict[str, Any] = {} if left_off == "literal" else {"exclude": ["inner", "inner.drop"]}
    x = torch.randn(6, 4)
    model = mcdrop.wrap(_Off(left_off).eval(), example=x, tuning={}, **excluded)
    assert [site.p for site in model.audit.live] == [0.2, 0.2]
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1"))
    assert _live(loaded) == _live(model)
    for rows in (x, torch.cat([x, x + 1])):
        ours, theirs = (mcdrop.predict(one, rows, passes=20, seed=3) for one in (model, loaded))
        np.testing.assert_allclose(theirs.std, ours.std, atol=1e-6)
        np.testing.assert_allclose(theirs.mean, ours.mean, atol=1e-6)


def test_every_format_has_a_file_of_its_own() -> None:
    assert len({form.file for form in FORMATS.values()}) == len(FORMATS)


def test_a_bare_program_needs_an_example(tmp_path: Path) -> None:
    module, x = built("mlp")
    folder = mcdrop.save(mcdrop.wrap(module, example=x), tmp_path / "net" / "1", format="pt2")
    with pytest.raises(InputError, match="needs example rows"):
        mcdrop.load(folder / "model.pt2")
    bare = mcdrop.load(folder / "model.pt2", example=x, task="classification")
    assert bare.task == "classification"
    with pytest.raises(InputError, match="are for bare files"):
        mcdrop.load(folder, task="regression")
    with pytest.raises(InputError, match="are for bare files"):
        mcdrop.load(folder, example=np.ones((4, 2)))
    with pytest.raises(ModelNotFound, match="there is no model at"):
        mcdrop.load(tmp_path / "missing.onnx", example=np.ones((4, 2)), task="regression")


class _Draws(torch.nn.Module):
    """Draws in every way but by dropout; in eval each draw is its expectation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        if not self.training:
            return 4 * y + torch.softmax(y, dim=-1)
        like = torch.empty_like
        parts = [
            torch.nn.functional.gumbel_softmax(y),
            y * like(y).exponential_(),
            y * like(y).bernoulli_(0.5) * 2 + like(y).normal_(0, 0.1),
            y * like(y).uniform_(0.5, 1.5) + torch.randint(0, 5, y.shape) + torch.randint(5, y.shape) - 4,
            y * like(y).bernoulli_(torch.full_like(y, 0.5)) * 2 + torch.normal(0.0, 0.1, y.shape),
        ]
        return torch.stack(parts).sum(0)


def test_draws_in_place_are_draws_of_a_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = mcdrop.wrap(_Draws().eval(), example=x)
    loaded = mcdrop.load(mcdrop.save(model, tmp_path / "net" / "1"))
    assert len(model.audit.live) == 9
    assert [site.kind for site in loaded.audit.live] == [site.kind for site in model.audit.live]
    ours, theirs = (mcdrop.predict(one, x, passes=20) for one in (model, loaded))
    np.testing.assert_allclose(theirs.mean, ours.mean, atol=1e-5)
    np.testing.assert_allclose(theirs.std, ours.std, atol=1e-5)


class _Cauchy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.empty_like(x).cauchy_()


def test_a_program_whose_only_draw_no_mask_reaches_says_which(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    torch.export.save(torch.export.export(_Cauchy(), (x,)), tmp_path / "net.pt2")
    with pytest.raises(UncontrolledDraw, match="cauchy_"):
        mcdrop.load(tmp_path / "net.pt2", example=x)


_WEIGHTS: list[dict[str, Any]] = []  # of the user's own network, its own dict
_SEEN: set[type] = set()


class _Watched(torch.nn.Module):
    """Notes what stands in the user's own network while another one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.drop = torch.nn.Linear(4, 2), torch.nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _SEEN.update(type(weight) for weights in _WEIGHTS for weight in weights.values())
        found: torch.Tensor = self.line(self.drop(x))
        return found


@pytest.mark.parametrize("form", ["pt2", "onnx", "export_torch"])
def test_a_network_keeps_its_weights_while_it_is_exported(form: str, tmp_path: Path) -> None:
    """Torch puts stand-ins without numbers in their places, and other threads would predict with these."""
    net = _Watched().eval()
    model = mcdrop.wrap(net, example=torch.randn(5, 4), tuning={})
    _SEEN.clear()
    _WEIGHTS[:] = [vars(net.line)["_parameters"]]
    if form == "export_torch":
        mcdrop.export_torch(model, tmp_path / "net.pt2")
    else:
        mcdrop.save(model, tmp_path / "net" / "1", format=form)
    assert {torch.nn.Parameter} == _SEEN


def test_outputs_are_the_same_when_they_differ_by_the_rounding_of_their_usual_numbers() -> None:
    """A logit near 0 has the rounding of its class in other rows, but not that of a larger output beside it."""
    ours = np.array([[4.3, 1e6, -2.0], [1e-7, -3e6, -1e9], [-2.1, 2e6, 0.5]])
    rounding = np.array([1e-5, 10.0, 1e-5])
    assert same_numbers(ours, ours + rounding)
    assert same_numbers(ours * 1e6, (ours + rounding) * 1e6)
    assert not same_numbers(ours, ours + 10 * rounding)
    assert not same_numbers(ours, ours + np.array([0.0, 0.0, 0.8]))
    assert not same_numbers(ours, ours[:1])
    assert same_numbers(ours * np.nan, ours * np.nan)
    assert not same_numbers(ours, ours * np.nan)
    assert same_numbers(ours * 0, ours * 0 + 1e-7)
    assert same_numbers(ours[:, 0], ours[:, 0] + 1e-5)
