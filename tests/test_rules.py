"""What each function that draws becomes: the closed form given its mask, torch's own distribution over many."""

import functools
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import mcdrop
from mcdrop import rules
from mcdrop.decisions import DECISION_RULES
from mcdrop.kernel_rules import KERNEL_RULES
from mcdrop.masks import Site, sample_masks
from mcdrop.model import Model
from mcdrop.rules import RULES, by_torchs_own
from mcdrop.sequences import SEQUENCE_RULES
from mcdrop.wrapping import wrap

Array = NDArray[np.float64]
Act = Callable[[Tensor, bool], Tensor]

P = 0.3
PASSES = 3000

VOLUME = torch.linspace(-2, 2, 2 * 3 * 2 * 2 * 1).reshape(2, 3, 2, 2, 1)
IMAGE, SEQUENCE, ROW = VOLUME[..., 0], VOLUME[:, :, :, 0, 0], VOLUME[:, :, 0, 0, 0]


class Acts(nn.Module):
    """A module that does one thing to a copy of its input; what it does may write in place."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x * 1, self.training)


def ours(model: Model, x: Tensor, passes: int, *, seed: int = 0) -> Array:
    """Outputs (T, N, ...) of the passes."""
    return np.asarray(model.backend.forward(model.rows(x), passes, seed=seed, start=0, sampler="iid"), np.float64)


def torchs(module: nn.Module, x: Tensor, passes: int) -> Array:
    """Outputs (T, N, ...) of the module in training mode, with torch's own draws."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        each = [np.asarray(module.train()(x.clone()), np.float64) for _ in range(passes)]
    return np.stack(each)


def drawn(model: Model, passes: int, *, seed: int = 0) -> Array:
    """The masks of a network's only site, (T, ...)."""
    (site,) = model.audit.sites
    known = Site(site.name, site.shape, 0.0 if site.p is None else site.p, site.kind)
    return np.asarray(sample_masks([known], passes, seed=seed)[site.name], np.float64)


# -- dropout in all its forms ------------------------------------------------------------------------------------------


def scaled(x: Array, keep: Array, p: float) -> Array:
    """Srivastava et al. 2014, section 10."""
    return np.asarray(x * keep / (1 - p))


def alpha(x: Array, keep: Array, p: float) -> Array:
    """Klambauer et al. 2017, section 3: a (x d + a' (1 - d)) + b, with a and b such that mean 0 and variance 1 stay."""
    floor = -1.0507009873554805 * 1.6732632423543772
    a = (1 - p + p * (1 - p) * floor**2) ** -0.5
    return np.asarray(a * (x * keep + floor * (1 - keep)) - a * p * floor)


@dataclass(frozen=True)
class Form:
    """A way to write dropout: a module, an input for it, its closed form, and how many axes of a row its mask has."""

    module: nn.Module
    x: Tensor
    law: Callable[[Array, Array, float], Array]
    axes: int


def functional(call: Callable[..., Tensor]) -> nn.Module:
    return Acts(lambda x, training: call(x, P, training))


def in_place(call: Callable[..., Tensor]) -> nn.Module:
    def act(x: Tensor, training: bool) -> Tensor:
        call(x, P, training, True)
        return x  # what the call wrote, not what it gave

    return Acts(act)


def written(call: Callable[..., Tensor]) -> nn.Module:
    def act(x: Tensor, training: bool) -> Tensor:
        call(x, P, training)
        return x

    return Acts(act)


FORMS = {
    "Dropout": Form(nn.Dropout(P), VOLUME, scaled, 4),
    "Dropout in place": Form(nn.Sequential(nn.Identity(), nn.Dropout(P, inplace=True)), IMAGE, scaled, 3),
    "Dropout1d": Form(nn.Dropout1d(P), SEQUENCE, scaled, 1),
    "Dropout2d": Form(nn.Dropout2d(P), IMAGE, scaled, 1),
    "Dropout3d": Form(nn.Dropout3d(P), VOLUME, scaled, 1),
    "AlphaDropout": Form(nn.AlphaDropout(P), IMAGE, alpha, 3),
    "FeatureAlphaDropout": Form(nn.FeatureAlphaDropout(P), IMAGE, alpha, 1),
    "F.dropout": Form(functional(F.dropout), IMAGE, scaled, 3),
    "F.dropout in place": Form(in_place(F.dropout), IMAGE, scaled, 3),
    "F.dropout1d": Form(functional(F.dropout1d), SEQUENCE, scaled, 1),
    "F.dropout2d": Form(functional(F.dropout2d), IMAGE, scaled, 1),
    "F.dropout2d in place": Form(in_place(F.dropout2d), IMAGE, scaled, 1),
    "F.dropout3d": Form(functional(F.dropout3d), VOLUME, scaled, 1),
    "F.alpha_dropout": Form(functional(F.alpha_dropout), ROW, alpha, 1),
    "F.alpha_dropout in place": Form(in_place(F.alpha_dropout), ROW, alpha, 1),
    "F.feature_alpha_dropout": Form(functional(F.feature_alpha_dropout), IMAGE, alpha, 1),
    "torch.dropout": Form(functional(torch.dropout), IMAGE, scaled, 3),
    "torch.dropout_": Form(written(torch.dropout_), IMAGE, scaled, 3),
    "torch.feature_dropout": Form(functional(torch.feature_dropout), IMAGE, scaled, 1),
    "torch.feature_dropout_": Form(written(torch.feature_dropout_), IMAGE, scaled, 1),
    "torch.alpha_dropout": Form(functional(torch.alpha_dropout), ROW, alpha, 1),
    "torch.alpha_dropout_": Form(written(torch.alpha_dropout_), ROW, alpha, 1),
    "torch.feature_alpha_dropout": Form(functional(torch.feature_alpha_dropout), IMAGE, alpha, 1),
    "torch.feature_alpha_dropout_": Form(written(torch.feature_alpha_dropout_), IMAGE, alpha, 1),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.filterwarnings("ignore:dropout2d:UserWarning")
def test_a_pass_is_the_closed_form_of_its_mask(form: Form) -> None:
    model = wrap(form.module, example=form.x)
    masks, x = drawn(model, 20, seed=5), form.x.double().numpy()
    unit = form.x.shape[1 : 1 + form.axes]
    assert masks.shape == (20, *unit)
    keep = masks.reshape(20, 1, *unit, *(1,) * (form.x.dim() - 1 - form.axes))
    np.testing.assert_allclose(ours(model, form.x, 20, seed=5), form.law(x[None], keep, P), rtol=1e-5, atol=1e-6)
    assert model.audit.tier not in {"direct", "loop"}


@every_form
@pytest.mark.statistical
def test_many_passes_have_torchs_own_distribution(form: Form) -> None:
    """All means, variances and covariances within a row, 3000 passes each, within 4 standard errors (and rounding)."""
    a, b = ours(wrap(form.module, example=form.x), form.x, PASSES), torchs(form.module, form.x, PASSES)
    a, b = a[:, 0].reshape(PASSES, -1), b[:, 0].reshape(PASSES, -1)
    np.testing.assert_array_less(abs(a.mean(0) - b.mean(0)), 4 * (stats.sem(a) ** 2 + stats.sem(b) ** 2) ** 0.5 + 1e-6)
    products = [np.einsum("ti,tj->tij", c - c.mean(0), c - c.mean(0)) for c in (a, b)]
    error = sum(stats.sem(product) ** 2 for product in products) ** 0.5
    np.testing.assert_array_less(abs(products[0].mean(0) - products[1].mean(0)), 4 * error + 1e-6)


@every_form
def test_eval_is_eval(form: Form) -> None:
    model = wrap(form.module, example=form.x)
    with torch.no_grad():
        expected = form.module.eval()(form.x).numpy()
    np.testing.assert_allclose(model.backend.deterministic(model.rows(form.x)), expected, rtol=1e-6)


MODULES = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_rates_of_0_and_1_do_what_they_do_in_training(kind: type[nn.Module], p: float, inplace: bool) -> None:
    """Beside a live dropout, whose part is taken away again by its closed form."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge, self.live = kind(p, inplace=inplace), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            both: Tensor = torch.cat([self.edge(x * 1), self.live(x)], dim=1)
            return both

    x = SEQUENCE if kind is nn.Dropout1d else VOLUME if kind is nn.Dropout3d else IMAGE
    net = Both()
    passes = ours(wrap(net, example=x), x, 3)[:, :, : x.shape[1]]
    np.testing.assert_allclose(passes, torchs(net, x, 3)[:, :, : x.shape[1]], atol=1e-7)


# -- other draws -------------------------------------------------------------------------------------------------------

ZEROS = torch.zeros(2, 3)

DRAWS: dict[str, Act] = {
    "F.rrelu": lambda x, on: F.rrelu(x - 1, 0.1, 0.6, on),
    "F.rrelu in place": lambda x, on: F.rrelu(x.sub_(1), 0.1, 0.6, on, True),
    "torch.bernoulli of chances": lambda x, on: torch.bernoulli(x + 0.3) if on else x,
    "torch.bernoulli with a rate": lambda x, on: torch.bernoulli(x, 0.3) if on else x,
    "Tensor.bernoulli": lambda x, on: (x + 0.3).bernoulli() if on else x,
    "Tensor.bernoulli_": lambda x, on: x.bernoulli_(0.3) if on else x,
    "Tensor.bernoulli_ with chances": lambda x, on: x.bernoulli_(x + 0.3) if on else x,
    "Tensor.uniform_": lambda x, on: x.uniform_(-1, 3) if on else x,
    "Tensor.normal_": lambda x, on: x.normal_(2, 0.5) if on else x,
    "Tensor.exponential_": lambda x, on: x.exponential_(2.0) if on else x,
    "torch.normal of tensors": lambda x, on: torch.normal(x + 2, x + 0.5) if on else x,
    "torch.normal of a tensor and a number": lambda x, on: torch.normal(x + 2, 0.5) if on else x,
    "torch.normal with a size": lambda x, on: x + torch.normal(2.0, 0.5, x.shape) if on else x,
    "torch.rand": lambda x, on: x + torch.rand(x.shape) if on else x,
    "torch.rand of numbers": lambda x, on: x + torch.rand(x.shape[0], x.shape[1]) if on else x,
    "torch.randn": lambda x, on: x + torch.randn(x.size()) if on else x,
    "torch.rand_like": lambda x, on: x + torch.rand_like(x) if on else x,
    "torch.randn_like": lambda x, on: x + torch.randn_like(x) if on else x,
    "torch.randint": lambda x, on: x + torch.randint(7, x.shape) if on else x,
    "torch.randint from": lambda x, on: x + torch.randint(-2, 3, size=x.shape) if on else x,
}


@pytest.mark.parametrize("act", DRAWS.values(), ids=DRAWS)
@pytest.mark.statistical
def test_other_draws_have_torchs_own_distribution(act: Act) -> None:
    """One unit over 3000 passes against 3000 of torch's (two-sample test at 0.001), another unit independent of it."""
    module = Acts(act)
    a, b = ours(wrap(module, example=ZEROS), ZEROS, PASSES), torchs(module, ZEROS, PASSES)
    values = np.unique(b[:, 0, 0])
    if len(values) < 20:
        table = [[(c[:, 0, 0] == value).sum() for value in values] for c in (a, b)]
        assert sum(table[0]) == PASSES
        assert stats.chi2_contingency(table).pvalue > 1e-3
    else:
        assert stats.ks_2samp(a[:, 0, 0], b[:, 0, 0]).pvalue > 1e-3
    assert abs(float(stats.pearsonr(a[:, 0, 0], a[:, 0, 1])[0])) < 4 / np.sqrt(PASSES)


def test_every_rule_is_tested() -> None:
    """Those of sequences, packed or not, of decisions, and the one that runs torch's own body have tests elsewhere."""
    rules = (
        RULES.keys()
        - SEQUENCE_RULES.keys()
        - DECISION_RULES.keys()
        - {F.gumbel_softmax, torch._pack_padded_sequence, torch._pad_packed_sequence}
    )
    homes = {"torch.nn.functional": "F", "torch": "torch", None: "Tensor"}
    names = {f"{homes[getattr(rule, '__module__', None)]}.{rule.__name__}" for rule in rules}
    assert names <= {name.split()[0] for name in (*FORMS, *DRAWS)}


# -- functions of torch's that a library has put its own in the place of ----------------------------------------------


class Reversed(nn.Module):
    """Picks units, in another order, by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.index_select(self.drop(self.first(x)), 1, torch.arange(7, -1, -1)))
        return output


@pytest.mark.parametrize("alike", [False, True])
def test_rules_hold_where_a_library_has_replaced_functions_of_torch(
    monkeypatch: pytest.MonkeyPatch, alike: bool
) -> None:
    """As torch_geometric does; the tables are made anew, as where mcdrop is imported later."""
    owns = {name: getattr(torch, name) for name in ("index_select", "gather", "rand", "bernoulli", "dropout")}

    def replaced(own: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **named: Any) -> Any:
            return own(*args, **named)

        return functools.wraps(own)(wrapper) if alike else wrapper

    for name, own in owns.items():
        monkeypatch.setattr(torch, name, replaced(own))
    fresh = {name: runpy.run_path(str(Path(rules.__file__).with_name(f"{name}.py"))) for name in ("rules", "row_rules")}
    tables = [fresh["rules"]["RULES"], by_torchs_own(dict(fresh["row_rules"]["ROW_RULES"]))]
    assert {owns["rand"], owns["bernoulli"], owns["dropout"]} <= tables[0].keys()
    assert {owns["index_select"], owns["gather"], Tensor.index_select, Tensor.gather} <= tables[1].keys()
    monkeypatch.setattr("mcdrop.capture.KERNEL_RULES", {**KERNEL_RULES, **tables[1]})
    torch.manual_seed(0)
    net, x = Reversed(), torch.randn(3, 4)
    model = wrap(net, example=x, tuning={})
    assert model.audit.tier == "captured", model.audit.tier_reason
    plain = nn.Sequential(net.first, net.drop, nn.Linear(8, 1))
    plain[2].load_state_dict({"weight": net.last.weight.flip(1), "bias": net.last.bias})
    found, expected = (mcdrop.predict(one, x, passes=20) for one in (model, wrap(plain, example=x, tuning={})))
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-4, atol=1e-6)


def test_rules_of_torch_as_it_is_are_as_they_are() -> None:
    assert by_torchs_own(dict(KERNEL_RULES)) == KERNEL_RULES
    assert {*KERNEL_RULES} >= {F.dropout, torch.dropout, F.scaled_dot_product_attention, torch.index_select}
