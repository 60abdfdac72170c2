"""Draws in every form that torch's functions take, outputs of every type, and queries that see no key."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError

PASSES = 4000
X = torch.tensor([[1.0, -2.0, 0.5], [4.0, 1.5, 3.0]])


class Net(nn.Module):
    """Multiplies its input by what a test draws."""

    def __init__(self, factor: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(0.3, dtype=torch.float64))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(self, x)


def _to(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Lets a function write to a tensor without entries, which it makes larger."""
    found = torch.empty(0)
    function(*args, out=found)
    return found


def _uniform(low: float, high: float) -> tuple[float, float, float]:
    """Mean, variance and excess kurtosis."""
    return (low + high) / 2, (high - low) ** 2 / 12, -1.2


def _whole(low: int, high: int) -> tuple[float, float, float]:
    """Of whole numbers from low to below high."""
    n = high - low
    return (low + high - 1) / 2, (n**2 - 1) / 12, -1.2 * (n**2 + 1) / (n**2 - 1)


def _kept(q: float, scale: float) -> tuple[float, float, float]:
    """Of what is ``scale`` with the probability q, else 0."""
    return q * scale, q * (1 - q) * scale**2, (1 - 6 * q * (1 - q)) / (q * (1 - q))


FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[float, float, float]]] = {
    "randint, all named": (lambda net, x: torch.randint(low=1, high=4, size=x.shape), _whole(1, 4)),
    "randint, high named": (lambda net, x: torch.randint(0, high=3, size=x.shape), _whole(0, 3)),
    "randint, size named": (lambda net, x: torch.randint(2, 9, size=x.shape), _whole(2, 9)),
    "randint, without low": (lambda net, x: torch.randint(5, x.shape), _whole(0, 5)),
    "bernoulli to a tensor": (lambda net, x: _to(torch.bernoulli, torch.full_like(x, 0.3)), _kept(0.3, 1.0)),
    "rand to a tensor": (lambda net, x: _to(torch.rand, x.shape), _uniform(0, 1)),
    "randn to a tensor": (lambda net, x: _to(torch.randn, x.shape), (0.0, 1.0, 0.0)),
    "normal to a tensor": (lambda net, x: _to(torch.normal, x * 0 + 2, x * 0 + 3), (2.0, 9.0, 0.0)),
    "a part of a complex normal": (lambda net, x: torch.randn(x.shape, dtype=torch.complex64).imag, (0.0, 0.5, 0.0)),
    "a part of a complex uniform": (lambda net, x: torch.rand_like(torch.complex(x, x)).imag, _uniform(0, 1)),
    "a rate in a buffer": (lambda net, x: F.dropout(torch.ones_like(x), net.rate, net.training), _kept(0.7, 1 / 0.7)),
    "a rate that is 0 in eval": (
        lambda net, x: F.dropout(torch.ones_like(x), 0.4 if net.training else 0.0), _kept(0.6, 1 / 0.6)
    ),
    "noise that is 0 in eval": (
        lambda net, x: 1 + torch.randn_like(x) * (0.5 if net.training else 0.0), (1.0, 0.25, 0.0)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("factor", "law"), FORMS.values(), ids=FORMS)
def test_moments_are_those_of_the_law(factor: Callable[[Any, Tensor], Tensor], law: tuple[float, ...]) -> None:
    """Within five standard errors: of a mean sqrt(variance / T), of a variance sqrt((2 + excess kurtosis) / T)."""
    mean, variance, excess = law
    model = mcdrop.wrap(Net(factor).eval(), example=X)
    found = mcdrop.sample(model, X, mcdrop.PassPlan(PASSES, 0, "iid"))
    x = X.double().numpy()
    assert (np.abs(found.mean / x - mean) <= 5 * np.sqrt(variance / PASSES)).all()
    assert (np.abs(found.variance / x**2 / variance - 1) <= 5 * np.sqrt((2 + excess) / PASSES)).all()


def test_a_layer_takes_its_rate_as_a_tensor() -> None:
    rate: Any = torch.tensor(0.3)
    model = mcdrop.wrap(nn.Sequential(nn.Dropout(rate)).eval(), example=X)
    mean = mcdrop.predict(model, X, passes=PASSES, sampler="iid").mean
    assert (np.abs(mean / X.numpy() - 1) <= 5 * np.sqrt(0.3 / 0.7 / PASSES)).all()


def test_a_rate_of_eval_too_does_not_hide_what_else_the_flag_does() -> None:
    net = Net(lambda net, x: F.dropout(torch.ones_like(x), 0.4) * (2.0 if net.training else 1.0)).eval()
    with pytest.raises(mcdrop.errors.UncontrolledDraw, match="gives other numbers at each call"):
        mcdrop.wrap(net, example=X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_numbers_of_few_digits_stay_below_one(dtype: torch.dtype) -> None:
    """Rounded to bf16, one in 512 would be 1; numbers are those of torch, whole multiples of half of the precision."""
    x = torch.ones(1, 100)
    model = mcdrop.wrap(Net(lambda net, x: torch.rand_like(x, dtype=dtype).to(x.dtype)), example=x)
    samples = mcdrop.sample(model, x, mcdrop.PassPlan(200, 0, "iid", keep_samples=True)).samples
    assert samples is not None
    assert samples.max() < 1
    steps = samples.astype(np.float64) * 2 / torch.finfo(dtype).eps
    np.testing.assert_array_equal(steps, np.round(steps))


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["captured", "by its own code"])
@pytest.mark.parametrize("offset", [1e8, 1e12])
def test_outputs_in_double_precision_keep_their_digits(offset: float, tier: str) -> None:
    """Of x m / q + c the variance is x^2 (1 / q - 1), whatever c is; in float32 nothing of it would be left."""

    def act(net: Any, x: Tensor) -> Tensor:
        if tier != "captured":
            float(x.sum())
        return F.dropout(torch.ones_like(x), 0.5, net.training) + offset / x

    x = X.double()
    model = mcdrop.wrap(Net(act).double().eval(), example=x)
    assert (model.audit.tier == "captured") == (tier == "captured")
    answer = mcdrop.sample(model, x, mcdrop.PassPlan(PASSES, 0, "iid", keep_samples=True))
    assert answer.samples is not None
    wanted = x.numpy() ** 2
    for found in (answer.variance, answer.samples.var(axis=0)):
        np.testing.assert_allclose(found, wanted, rtol=5 / np.sqrt(PASSES))
    assert answer.deterministic is not None
    np.testing.assert_allclose(answer.deterministic, x.numpy() + offset, rtol=1e-15)


def test_whole_and_boolean_outputs_are_numbers() -> None:
    above = mcdrop.wrap(_Returns(lambda kept: kept > 0), example=X)
    whole = mcdrop.wrap(_Returns(lambda kept: kept.sign().long() + 2**30), example=X)
    plan = mcdrop.PassPlan(PASSES, 0, "iid")
    np.testing.assert_allclose(mcdrop.sample(above, X, plan).mean, 0.7, atol=5 * np.sqrt(0.21 / PASSES))
    np.testing.assert_allclose(mcdrop.sample(whole, X, plan).variance, 0.21, atol=5 * 0.21 * np.sqrt(0.77 / PASSES))


class _Returns(nn.Module):
    """Ends a network that drops ones, or its rows, by what a test asks for."""

    def __init__(self, last: Callable[[Tensor], Tensor], *, ones: bool = True) -> None:
        super().__init__()
        self.last, self.ones = last, ones

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(torch.ones_like(x) if self.ones else x, 0.3, self.training))


def test_complex_outputs_are_refused() -> None:
    with pytest.raises(InputError, match="the picked output is complex; return real numbers"):
        mcdrop.wrap(_Returns(lambda kept: torch.complex(kept, kept)), example=X)


def test_rows_are_given_in_the_type_of_the_weights_whatever_buffers_have() -> None:
    net = nn.Sequential(nn.Linear(3, 2).double(), nn.Dropout(0.5))
    net.register_buffer("positions", torch.ones(3))
    model = mcdrop.wrap(net.eval(), example=X.double())
    found = mcdrop.predict(model, X.double(), passes=2).deterministic
    assert found is not None
    np.testing.assert_allclose(found, net(X.double()).detach().numpy(), rtol=1e-12)


SQUEEZED: dict[str, Callable[[Tensor], Tensor]] = {
    "several numbers": lambda h: h[:, None].squeeze(),
    "one number": lambda h: h.sum(1, keepdim=True).squeeze(),
    "an image": lambda h: h[:, None, :, None].expand(-1, -1, -1, 2).squeeze(),
    "before a draw": lambda h: F.dropout(h[:, None].squeeze(), 0.2),
    "before layers that know rows": lambda h: F.dropout(F.linear(h[:, None].squeeze(), torch.ones(2, 3)), 0.2)[:, :1],
    "by its own code": lambda h: h[:, None].squeeze() + 0 * float(h.sum()),
}


@pytest.mark.parametrize("last", SQUEEZED.values(), ids=SQUEEZED)
def test_a_single_row_keeps_its_axis_where_a_network_squeezes(last: Callable[[Tensor], Tensor]) -> None:
    model = mcdrop.wrap(_Returns(last, ones=False), example=X)
    assert not model.audit.warnings
    plan = mcdrop.PassPlan(50, 3)
    whole, alone = mcdrop.sample(model, X, plan), mcdrop.sample(model, X[1:], plan)
    for name in ("mean", "variance", "deterministic"):
        np.testing.assert_allclose(getattr(alone, name), getattr(whole, name)[1:], rtol=1e-5, atol=1e-6)


def test_an_example_of_a_single_row_that_loses_its_axis_is_refused() -> None:
    with pytest.raises(InputError, match=r"squeeze\(\) leaves that axis"):
        mcdrop.wrap(_Returns(SQUEEZED["several numbers"], ones=False), example=X[:1])


# -- attention ---------------------------------------------------------------------------------------------------------


class Padded(nn.Module):
    """Attention over words of which some rows have none."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask, self.layer = mask, nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        if self.mask == "layer":
            return self.layer(x, x, x, key_padding_mask=padding, need_weights=False)[0].mean(1)  # type: ignore[no-any-return]
        seen = ~padding[:, None, :]
        given = seen if self.mask == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return F.scaled_dot_product_attention(x, x, x, given, 0.3 if self.training else 0.0).mean(1)


@pytest.mark.parametrize("mask", ["layer", "bool", "float"])
def test_rows_without_a_word_get_what_torch_gives_them(mask: str) -> None:
    """Without keys attention is 0 in torch; of the others mean and variance are those of torch's own passes."""
    torch.manual_seed(0)
    net = Padded(mask).eval()
    x, padding = torch.randn(3, 5, 4), torch.zeros(3, 5, dtype=torch.bool)
    padding[1], padding[2, 3:] = True, True
    model = mcdrop.wrap(net, example=(x, padding))
    plan = mcdrop.PassPlan(PASSES, 0, "iid")
    found = mcdrop.sample(model, (x, padding), plan)
    net.train()
    with torch.no_grad():
        passes = torch.stack([net(x, padding) for _ in range(PASSES)]).double().numpy()
    np.testing.assert_allclose(found.mean[1], passes[0, 1], atol=1e-6)
    assert (found.variance[1] <= 1e-12).all()
    some = [0, 2]
    error = np.sqrt((found.variance + passes.var(axis=0))[some] / PASSES)
    assert (np.abs(found.mean - passes.mean(axis=0))[some] <= 5 * error).all()
    fourth = ((passes - passes.mean(axis=0)) ** 4).mean(axis=0) - passes.var(axis=0) ** 2
    assert (np.abs(found.variance - passes.var(axis=0))[some] <= 5 * np.sqrt(2 * fourth / PASSES)[some]).all()
    alone = mcdrop.sample(model, (x[1:2], padding[1:2]), plan)
    np.testing.assert_allclose(alone.mean, found.mean[1:2], atol=1e-6)
