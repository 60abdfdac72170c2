"""What mcdrop promises of every network of the zoo: all draws live and under control, nothing of the user's changed."""

import numpy as np
import pytest
import torch
from torch import nn

import mcdrop
from mcdrop.backends.torch import TorchBackend
from mcdrop.errors import ModelRefused, NoStochasticSite, UncontrolledDraw

from . import ZOO, Expected
from .wrapped import CONTROLLED, REFUSED, built, passes, plain, same, snapshot, tolerance, wrapped

every = pytest.mark.parametrize("name", CONTROLLED)

# A value without a mean of its own type: a boolean, or a whole number between 0 and 1.
NO_EXPECTATION = {"bool_mask", "randint_mask"}


# -- live, or refused --------------------------------------------------------------------------------------------------


@every
def test_every_draw_is_live(name: str) -> None:
    audit = wrapped(name).model.audit
    assert len(audit.live) == ZOO[name].draws - ZOO[name].idle, str(audit)


@every
def test_the_audit_knows_whether_the_mean_is_preserved(name: str) -> None:
    if name in NO_EXPECTATION:
        pytest.skip("its draw has no expectation of its own type")
    assert wrapped(name).model.audit.mean_preserving == ZOO[name].mean_preserving


# What the refusal must say: the place, and the reason.
REASONS: dict[str, tuple[type[ModelRefused], str]] = {
    "dropout_all_zero": (NoStochasticSite, "2: bernoulli, its drop rate is 0"),
    "dropout_rate_one": (NoStochasticSite, "2: bernoulli, its drop rate is 1"),
    "no_dropout": (NoStochasticSite, "no draw at all"),
    "literal_false": (NoStochasticSite, r"dropout switched off in root \(force_literal=True drops there\)"),
    "own_switch": (NoStochasticSite, r"dropout switched off in root \(force_literal=True drops there\)"),
    "multinomial": (UncontrolledDraw, "multinomial.default in the root module"),
    "fractional_pool": (UncontrolledDraw, "rand.default in 2"),
    "numpy_mask": (UncontrolledDraw, "numpy.random in the root module"),
    "python_random": (UncontrolledDraw, "Python's random in the root module"),
    "other_thread": (UncontrolledDraw, "torch's generator in another thread"),
    "mixup": (UncontrolledDraw, "randperm.default in the root module"),
    "torchscript": (ModelRefused, "RecursiveScriptModule is or holds a TorchScript module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_controlled_is_refused_with_place_and_reason(name: str) -> None:
    module, example = built(name)
    kind, said = REASONS[name]
    before = snapshot(module, example)
    with pytest.raises(kind, match=said):
        mcdrop.wrap(module, example=example, output=ZOO[name].output)
    after = snapshot(module, example)
    assert [key for key in before if str(before[key]) != str(after[key])] == []


@pytest.mark.parametrize("nested", [False, True])
def test_the_fused_encoder_is_live_in_inference_mode(nested: bool) -> None:
    """In eval and without gradients torch takes a fused kernel that skips all eight draws."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    with torch.inference_mode():
        x = torch.randn(3, 5, 16)
        model = mcdrop.wrap(encoder, example=x)
        prediction = mcdrop.predict(model, x, passes=30)
        assert not torch.equal(encoder(x), torch.from_numpy(prediction.mean).float())
    paths = ["self_attn", "dropout1", "dropout", "dropout2"]
    assert [site.path for site in model.audit.live] == [f"layers.{i}.{path}" for i in (0, 1) for path in paths]
    assert (prediction.std > 0.01).all()


# -- nothing changes ---------------------------------------------------------------------------------------------------


@every
def test_nothing_of_the_users_module_changes(name: str) -> None:
    assert wrapped(name).changed == []


# -- answers -----------------------------------------------------------------------------------------------------------


@every
def test_the_tier_gives_what_the_loop_gives_with_the_same_masks(name: str) -> None:
    made = wrapped(name)
    backend = made.model.backend
    assert isinstance(backend, TorchBackend)
    loop = backend.run(made.rows, 8, only=None, tier="loop")
    for tier in (None, "direct"):
        assert same(backend.run(made.rows, 8, only=None, tier=tier).float(), loop.float(), tolerance(made.module))
    assert same(passes(made, made.example, 8), loop.float(), tolerance(made.module))


@every
def test_a_seed_is_an_answer(name: str) -> None:
    made = wrapped(name)
    first = passes(made, made.example, 12, seed=1)
    np.testing.assert_array_equal(passes(made, made.example, 12, seed=1), first)
    other = passes(made, made.example, 12, seed=2)
    assert all(not np.array_equal(first[:, row], other[:, row]) for row in range(first.shape[1]))


@every
def test_the_deterministic_answer_is_that_of_plain_eval(name: str) -> None:
    made = wrapped(name)
    module, _ = built(name)
    if ZOO[name].draws_in_eval:  # then it is eval with every draw at its expectation
        with Expected():
            expected = plain(made, module)
    else:
        expected = plain(made, module)
    assert same(made.model.backend.deterministic(made.rows), expected.float(), tolerance(made.module))
