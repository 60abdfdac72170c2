"""The layers that torch lacks: against closed forms, brute force and torch's own layers, and each found live."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mcdrop
from mcdrop.layers import ConcreteDropout, DropBlock2d, DropConnect, StochasticDepth


def many(layer: nn.Module, x: Tensor, passes: int) -> Tensor:
    """Passes of a layer in training mode, by torch's own generator: (T, N, ...), in float64."""
    torch.manual_seed(0)
    layer.train()
    with torch.no_grad():
        return torch.stack([layer(x).double() for _ in range(passes)])


def close_to_law(draws: Tensor, mean: Tensor, variance: Tensor) -> bool:
    """Mean and variance over the passes within 5 standard errors (some ten numbers are compared)."""
    squares = (draws - mean) ** 2
    off = (draws.mean(0) - mean).abs() / (variance / len(draws)).sqrt()
    off_variance = (squares.mean(0) - variance).abs() / (squares.var(0) / len(draws)).sqrt()
    return bool(off.max() < 5) and bool(off_variance.max() < 5)


# -- DropConnect -------------------------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("bias", [True, False])
def test_dropped_weights_have_the_mean_and_variance_of_their_law(bias: bool) -> None:
    """Mean Wx + b and variance p / (1 - p) times the sum of (w x)^2."""
    torch.manual_seed(1)
    linear, x, p = nn.Linear(6, 3, bias=bias), torch.randn(4, 6), 0.3
    draws = many(DropConnect(linear, p), x, 4000)
    variance = p / (1 - p) * (linear.weight.double() ** 2 @ x.double().T ** 2).T
    assert close_to_law(draws, linear(x).detach().double(), variance.detach())


@pytest.mark.statistical
def test_dropped_filters_have_the_mean_and_variance_of_their_law() -> None:
    torch.manual_seed(1)
    conv, x, p = nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(2, 2, 5, 5), 0.4
    draws = many(DropConnect(conv, p), x, 4000)
    squared = nn.functional.conv2d(x.double() ** 2, conv.weight.double() ** 2, stride=2, padding=1)
    assert close_to_law(draws, conv(x).detach().double(), (p / (1 - p) * squared).detach())


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2},
    "padding": {"padding": 2, "padding_mode": "reflect"},
    "same": {"padding": "same"},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_keeps_its_geometry(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 4, 3, **options), torch.randn(2, 4, 9, 9)
    assert torch.equal(DropConnect(conv, 0.5).eval()(x), conv(x))
    assert DropConnect(conv, 0.5).train()(x).shape == conv(x).shape


def test_the_layer_that_is_dropped_stays_itself() -> None:
    linear = nn.Linear(4, 2)
    before = linear.weight.clone()
    wrapped = DropConnect(linear, 0.5)
    wrapped(torch.randn(3, 4)).sum().backward()
    assert wrapped.layer is linear
    assert torch.equal(linear.weight, before)
    assert linear.weight.grad is not None
    assert [*wrapped.state_dict()] == ["layer.weight", "layer.bias"]


def test_only_linear_layers_and_convolutions_have_weights_to_drop() -> None:
    with pytest.raises(TypeError, match="takes a Linear or Conv2d layer, got LSTM"):
        DropConnect(nn.LSTM(2, 2))


# -- DropBlock ---------------------------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize(("p", "size", "side"), [(0.1, 3, 12), (0.25, 5, 20), (0.1, 7, 7), (0.3, 1, 8)])
def test_about_the_share_p_is_dropped(p: float, size: int, side: int) -> None:
    """A unit is kept if no block that covers it starts: (1 - gamma)^starts; the average is p or a little below."""
    places = side - size + 1
    gamma = p * side**2 / (size**2 * places**2)
    along = np.array([min(i, places - 1) - max(0, i - size + 1) + 1 for i in range(side)])
    exact = 1 - ((1 - gamma) ** np.outer(along, along)).mean()
    dropped = (many(DropBlock2d(p, size), torch.ones(8, 4, side, side), 100) == 0).double().mean((2, 3, 4)).flatten()
    assert abs(float(dropped.mean()) - exact) < 4 * float(dropped.std()) / len(dropped) ** 0.5
    assert 0.8 * p < exact <= p * (1 + 1e-9)


def test_what_is_dropped_are_whole_blocks() -> None:
    """Every dropped unit lies in a square block that is dropped as a whole, and single blocks have the size asked."""
    size = 3
    gone = (many(DropBlock2d(0.05, size), torch.ones(4, 2, 10, 10), 50) == 0).flatten(0, 2).float()
    whole = nn.functional.avg_pool2d(gone, size, stride=1) > 0.999  # where a whole block is gone
    covered = nn.functional.max_pool2d(nn.functional.pad(whole.float(), [size - 1] * 4), size, stride=1)
    assert torch.equal(covered, gone)
    assert {int(n) for n in gone.sum((1, 2))} & set(range(1, size**2)) == set()
    assert (gone.sum((1, 2)) == size**2).any()


def test_each_row_is_rescaled_by_what_it_kept_itself() -> None:
    draws = many(DropBlock2d(0.3, 3), torch.ones(5, 2, 9, 9), 20)
    torch.testing.assert_close(draws.mean((2, 3, 4)), torch.ones(20, 5, dtype=torch.float64))
    assert len({round(float(value), 6) for value in draws[0].amax((1, 2, 3))}) > 1  # rows kept different shares


def test_rows_are_dropped_independently() -> None:
    layer = DropBlock2d(0.3, 3).train()
    x = torch.randn(3, 2, 8, 8)
    other = torch.cat([x[:1], 100 * torch.randn(2, 2, 8, 8)])
    answers = []
    for inputs in (x, other):
        torch.manual_seed(3)
        answers.append(layer(inputs)[0])
    assert torch.equal(*answers)


def test_a_block_larger_than_the_map_drops_whole_maps() -> None:
    maps = (many(DropBlock2d(0.4, 9), torch.ones(6, 5, 4, 4), 20) == 0).flatten(3)
    assert torch.equal(maps.any(-1), maps.all(-1))
    assert maps.any()


# -- StochasticDepth ---------------------------------------------------------------------------------------------------


@pytest.mark.statistical
def test_a_branch_is_kept_whole_or_dropped_whole_row_by_row() -> None:
    p, x = 0.3, torch.rand(50, 2, 3) + 1
    draws = many(StochasticDepth(p), x, 100)
    kept = draws != 0
    assert torch.equal(kept.flatten(2).any(-1), kept.flatten(2).all(-1))
    torch.testing.assert_close(draws[kept], (x.double() / (1 - p)).expand_as(draws)[kept], rtol=1e-6, atol=0)
    share = kept[:, :, 0, 0].double()
    assert abs(float(share.mean()) - (1 - p)) < 4 * (p * (1 - p) / share.numel()) ** 0.5
    assert share.std(1).min() > 0  # rows of one batch differ


# -- ConcreteDropout ---------------------------------------------------------------------------------------------------


@pytest.mark.statistical
def test_a_cold_concrete_dropout_is_dropout() -> None:
    """At a low temperature nearly all masks are 0 or 1, and the share p of them 0."""
    p = 0.3
    draws = many(ConcreteDropout(p, temperature=0.01), torch.ones(50, 40), 20) * (1 - p)
    assert float(((draws > 0.01) & (draws < 0.99)).double().mean()) < 0.05
    dropped = (draws < 0.5).double()
    assert abs(float(dropped.mean()) - p) < 4 * (p * (1 - p) / dropped.numel()) ** 0.5


def test_the_rate_is_learnt_through_the_mask() -> None:
    """The gradient of a draw with respect to the logit, against a finite difference with the same uniform numbers."""
    layer = ConcreteDropout(0.3).double().train()
    x = torch.ones(200, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(0)
        answer: Tensor = (layer(x) - 0.5).square().mean()
        return answer

    loss().backward()
    assert layer.logit.grad is not None
    step, start = 1e-6, layer.logit.item()
    values = []
    for shift in (step, -step):
        with torch.no_grad():
            layer.logit.fill_(start + shift)
            values.append(float(loss()))
    np.testing.assert_allclose(float(layer.logit.grad), (values[0] - values[1]) / (2 * step), rtol=1e-4)
    assert abs(float(layer.logit.grad)) > 1e-3


def test_the_penalty_is_the_one_of_the_paper() -> None:
    """Gal, Hron and Kendall 2017, eq. 3: l^2 (1 - p) |W|^2 / 2 - K H(p), for each of the N rows a part."""
    p, rows, length = 0.2, 50, 0.7
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    squares = 1 + 4 + 0.25 + 9 + 1
    entropy = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    expected = (length**2 * 0.8 * squares / 2 - 3 * entropy) / rows
    penalty = ConcreteDropout(p).penalty(weight, rows=rows, length_scale=length)
    np.testing.assert_allclose(float(penalty.detach()), expected, rtol=1e-5)


def test_the_penalty_pulls_the_rate_up_where_weights_are_small_and_down_in_large_data() -> None:
    layer = ConcreteDropout(0.2)
    layer.penalty(0.01 * torch.ones(2, 3), rows=10).backward()
    assert layer.logit.grad is not None
    assert layer.logit.grad < 0  # a step against the gradient raises the rate
    small = float(layer.penalty(torch.ones(2, 3), rows=10).detach())
    assert abs(float(layer.penalty(torch.ones(2, 3), rows=1000).detach())) < abs(small)


@pytest.mark.parametrize(("p", "temperature"), [(0.0, 0.1), (1.0, 0.1), (0.5, 0.0)])
def test_a_rate_to_be_learnt_starts_inside(p: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="p must be between 0 and 1 and temperature above 0"):
        ConcreteDropout(p, temperature)


# -- all of them -------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DropConnect Linear": (lambda: DropConnect(nn.Linear(6, 6), 0.3), (6,)),
    "DropConnect Conv2d": (lambda: DropConnect(nn.Conv2d(2, 3, 3), 0.3), (2, 6, 6)),
    "DropBlock2d": (lambda: DropBlock2d(0.3, 3), (2, 6, 6)),
    "StochasticDepth": (lambda: StochasticDepth(0.3), (2, 3)),
    "ConcreteDropout": (lambda: ConcreteDropout(0.3), (6,)),
}
every = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


@every
def test_eval_changes_nothing(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = make().eval(), torch.randn(3, *shape)
    plain = layer.layer if isinstance(layer, DropConnect) else nn.Identity()
    assert torch.equal(layer(x), plain(x))


@every
def test_each_is_found_live(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.rand(3, *shape) + 0.5
    net.eval()(x)
    model = mcdrop.wrap(net, example=x)
    assert [site.path for site in model.audit.live] == ["0"]
    assert model.audit.tier == "captured", model.audit.tier_reason
    assert not any("depends on its batch" in warning for warning in model.audit.warnings)
    together = mcdrop.predict(model, x, passes=30)
    assert (together.std > 0).all()
    np.testing.assert_allclose(mcdrop.predict(model, x[1:2], passes=30).mean, together.mean[1:2], rtol=1e-5)


@pytest.mark.parametrize("kind", [lambda p: DropConnect(nn.Linear(1, 1), p), DropBlock2d, StochasticDepth])
@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_outside_is_refused(kind: Callable[[float], nn.Module], p: float) -> None:
    with pytest.raises(ValueError, match="p must be at least 0 and below 1"):
        kind(p)


def test_a_block_has_a_size() -> None:
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        DropBlock2d(0.1, 0)


def test_a_layer_shows_its_rate() -> None:
    assert "p=0.2" in repr(DropConnect(nn.Linear(1, 1), 0.2))
    assert "p=0.2, block_size=5" in repr(DropBlock2d(0.2, 5))
    assert "p=0.2" in repr(StochasticDepth(0.2))
