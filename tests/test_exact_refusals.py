"""The last dropout in closed form is right or refused: what ends in something other than dropout and a linear layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mcdrop
from mcdrop.errors import InputError

PASSES = 20_000
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Ends(nn.Module):
    """A hidden layer of six units, and an end that a function makes of it."""

    def __init__(self, end: Callable[["Ends", Tensor], Tensor], inputs: int = 6) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(4, 6), nn.Linear(inputs, 2), nn.Linear(6, inputs)
        self.dropout, self.channels = nn.Dropout(0.4), nn.Dropout1d(0.4)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, torch.tanh(self.body(x)))


def _head(net: Ends, h: Tensor) -> Tensor:
    out: Tensor = net.head(h)
    return out


def _ones(h: Tensor, width: int) -> Tensor:
    return torch.ones(h.shape[0], width)


def _naive(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * torch.bernoulli(torch.full_like(h, 0.8)))


def _filled(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * torch.empty_like(h).bernoulli_(0.8))


def _scaled(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * (torch.empty_like(h).bernoulli_(0.8) * 3 - 1))


def _uniform(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * (torch.rand_like(h) < 0.8).float())


def _normal(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * (1 + 0.5 * torch.randn_like(h)))


def _channels(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.channels(h.view(-1, 2, 3)).flatten(1))


def _channels_by_step(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.channels(h.view(-1, 2, 3)))


def _single_steps(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.channels(h.unsqueeze(2)))


def _one_for_all(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * net.dropout(_ones(h, 1)))


def _one_for_all_expanded(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * net.dropout(_ones(h, 1)).expand(-1, 6))


def _one_for_two(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * net.dropout(_ones(h, 3)).repeat(1, 2))


def _one_for_neighbours(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * net.dropout(_ones(h, 3)).repeat_interleave(2, dim=1))


def _mean_of_units(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * net.dropout(_ones(h, 6)).mean(dim=1, keepdim=True).expand(-1, 6))


def _smoothed(net: Ends, h: Tensor) -> Tensor:
    mask = net.dropout(_ones(h, 6))
    return _head(net, h * (mask + mask.roll(1, dims=1)) / 2)


def _rolled(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * net.dropout(_ones(h, 6)).roll(1, dims=1))


def _squared(net: Ends, h: Tensor) -> Tensor:
    return _head(net, h * net.dropout(_ones(h, 6)) ** 2)


def _shared_by_steps(net: Ends, h: Tensor) -> Tensor:
    steps = torch.stack([h, h * 2], dim=1)
    return _head(net, steps * net.dropout(_ones(h, 6)).unsqueeze(1))


def _across_steps(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.dropout(h.view(-1, 2, 3))).sum(1)


def _alpha(net: Ends, h: Tensor) -> Tensor:
    return _head(net, F.alpha_dropout(h, 0.4, net.dropout.training))


def _connections(net: Ends, h: Tensor) -> Tensor:
    return F.linear(h, net.dropout(net.head.weight), net.head.bias)


def _both(net: Ends, h: Tensor) -> Tensor:
    return F.linear(net.dropout(h), net.dropout(net.head.weight), net.head.bias)


def _bias(net: Ends, h: Tensor) -> Tensor:
    return F.linear(net.dropout(h), net.head.weight, net.dropout(net.head.bias))


def _twice(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.dropout(net.dropout(h)))


def _squared_output(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.dropout(h)).square()


def _doubled_output(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.dropout(h)) * 2


def _no_axis(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.dropout(h))[:, 0]


def _activated(net: Ends, h: Tensor) -> Tensor:
    return _head(net, torch.relu(net.dropout(h)))


def _shifted(net: Ends, h: Tensor) -> Tensor:
    return _head(net, net.dropout(h) + 1)


def _with_input(net: Ends, h: Tensor) -> Tensor:
    return _head(net, torch.cat([net.dropout(h), h], dim=1))


def _two_heads(net: Ends, h: Tensor) -> Tensor:
    h = net.dropout(h)
    return _head(net, h) + h[:, :2]


def _skip(net: Ends, h: Tensor) -> Tensor:
    dropped = net.dropout(h)
    return _head(net, torch.tanh(net.other(dropped)) + dropped)


def _same_mask_before(net: Ends, h: Tensor) -> Tensor:
    mask = net.dropout(_ones(h, 6))
    return _head(net, torch.tanh(net.other(h * mask)) * mask)


def _random_rate(net: Ends, h: Tensor) -> Tensor:
    return _head(net, F.dropout(h, float(torch.rand(())) * 0.5, net.dropout.training))


def _earlier_is_last(net: Ends, h: Tensor) -> Tensor:
    first, second = net.dropout(_ones(h, 6)), net.dropout(h)
    return _head(net, torch.tanh(net.other(second)) * first)


REFUSED = {
    "units of a channel fall together": (_channels, 6),
    "masks of weights": (_connections, 6),
    "an activation after dropout": (_activated, 6),
    "an activation after the layer": (_squared_output, 6),
    "dropout beside what is kept": (_with_input, 12),
    "dropout read twice": (_two_heads, 6),
    "dropout that goes around a layer": (_skip, 6),
    "one mask in two places": (_same_mask_before, 6),
    "masks that are normal numbers": (_normal, 6),
    "a rate that is drawn": (_random_rate, 6),
}

RIGHT_OR_REFUSED = {
    "naive": (_naive, 6),
    "naive, filled in place": (_filled, 6),
    "kept by two, dropped by minus one": (_scaled, 6),
    "uniform numbers compared": (_uniform, 6),
    "channels of steps": (_channels_by_step, 3),
    "channels of one step each": (_single_steps, 1),
    "one mask for all units": (_one_for_all, 6),
    "one mask for all units, expanded": (_one_for_all_expanded, 6),
    "one mask for two units": (_one_for_two, 6),
    "one mask for two neighbours": (_one_for_neighbours, 6),
    "the mean of all masks": (_mean_of_units, 6),
    "the mean of two masks": (_smoothed, 6),
    "each the mask of its neighbour": (_rolled, 6),
    "masks squared": (_squared, 6),
    "one mask for all steps": (_shared_by_steps, 6),
    "steps added up": (_across_steps, 3),
    "alpha dropout": (_alpha, 6),
    "masks of weights and units": (_both, 6),
    "masks of biases and units": (_bias, 6),
    "dropout of dropout": (_twice, 6),
    "an output doubled": (_doubled_output, 6),
    "an output without an axis of its own": (_no_axis, 6),
    "a shift after dropout": (_shifted, 6),
    "the first draw is the last to be used": (_earlier_is_last, 6),
}


def made(end: Any, inputs: int) -> mcdrop.Model:
    torch.manual_seed(0)
    return mcdrop.wrap(Ends(end, inputs).eval(), example=X, strict=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_closed_form_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="whose output is a linear layer straight after dropout"):
        mcdrop.predict(made(*REFUSED[name]), X, exact_last=True)


@pytest.mark.statistical
@pytest.mark.parametrize("name", RIGHT_OR_REFUSED)
def test_a_closed_form_is_right_or_refused(name: str) -> None:
    """Means and variances within 5 standard errors of 20000 independent passes, where there is an answer."""
    model = made(*RIGHT_OR_REFUSED[name])
    try:
        found = mcdrop.predict(model, X, passes=PASSES, seed=1, sampler="iid", exact_last=True)
    except InputError:
        return
    drawn = mcdrop.predict(model, X, passes=PASSES, sampler="iid", keep_samples=True)
    assert drawn.samples is not None
    assert (np.abs(found.mean - drawn.mean) <= 5 * np.hypot(found.standard_error, drawn.standard_error)).all()
    deviation = drawn.samples.astype(np.float64) - drawn.mean
    spread = np.sqrt(((deviation**4).mean(axis=0) - drawn.variance**2) / PASSES)
    assert (np.abs(found.variance - drawn.variance) < 5 * np.sqrt(2) * spread).all()


@pytest.mark.parametrize("end", [_head, _filled, _scaled])
def test_dropout_in_one_line_or_by_hand_has_a_closed_form(end: Any) -> None:
    """Kept with probability 0.8: by 1 or 0, by 2 or -1, and by torch's own layer."""
    torch.manual_seed(0)
    net = Ends(end if end is not _head else lambda net, h: _head(net, F.dropout(h, 0.2, net.dropout.training))).eval()
    found = mcdrop.predict(mcdrop.wrap(net, example=X, strict=False), X, passes=2, exact_last=True)
    kept, dropped = {_head: (1.25, 0.0), _filled: (1.0, 0.0), _scaled: (2.0, -1.0)}[end]
    with torch.no_grad():
        h = torch.tanh(net.body(X)).double()
    weight, bias = net.head.weight.detach().double(), net.head.bias.detach().double()
    mean = (h * (0.8 * kept + 0.2 * dropped)) @ weight.T + bias
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6)
    variance = h**2 @ (weight**2).T * 0.8 * 0.2 * (kept - dropped) ** 2
    np.testing.assert_allclose(found.variance, variance, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.standard_error, 0)
