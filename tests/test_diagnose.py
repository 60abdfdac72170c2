"""What the audit says about variance, norm layers and the deterministic prefix, against what is computed by hand."""

import numpy as np
import pytest
import torch
from made import EIGHT, audit_of, centred
from numpy.typing import NDArray
from torch import Tensor, nn

import mcdrop
from mcdrop import diagnose
from mcdrop.masks import sample_masks

# -- shares of variance ------------------------------------------------------------------------------------------------


def two_dropouts() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2))


def by_hand(net: nn.Sequential, first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The network written out in numpy, with kept units (T, units) given: (T, N, 2)."""
    (w1, b1), (w2, b2) = (
        [parameter.detach().double().numpy() for parameter in (layer.weight, layer.bias)]
        for layer in net
        if isinstance(layer, nn.Linear)
    )
    x = EIGHT.double().numpy()
    hidden = np.tanh((x * first[:, None]) @ w1.T + b1)
    answer: NDArray[np.float64] = (hidden * second[:, None]) @ w2.T + b2
    return answer


def test_a_share_is_the_variance_of_one_site_alone_over_that_of_all() -> None:
    net = two_dropouts()
    audit = mcdrop.wrap(net, example=EIGHT).audit
    sites = [mcdrop.masks.Site(site.name, site.shape, site.p or 0.0) for site in audit.sites]
    masks = sample_masks(sites, 32, seed=0)
    first, second = (masks[site.name].astype(np.float64) / (1 - site.p) for site in sites)
    ones = np.ones_like(first), np.ones_like(second)
    total, alone_first, alone_second = (
        by_hand(net, *pair).var(axis=0, ddof=1).sum() for pair in ((first, second), (first, ones[1]), (ones[0], second))
    )
    shares = [site.share for site in audit.sites]
    np.testing.assert_allclose(np.array(shares, float), [alone_first / total, alone_second / total], rtol=1e-4)


class IntoTokens(nn.Module):
    """Adds to a view in place, as positions to tokens: with the masks of the addend alone it has no sample axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.linear = nn.Dropout(0.2), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.first(self.linear(x)).unflatten(1, (2, 4)).transpose(1, 2)
        tokens += self.second(x).unflatten(1, (4, 2))
        return tokens


def test_a_draw_that_is_added_to_a_view_in_place_has_its_share_too() -> None:
    torch.manual_seed(0)
    net = IntoTokens()
    audit = mcdrop.wrap(net, example=EIGHT).audit
    masks = sample_masks([mcdrop.masks.Site(site.name, site.shape, site.p or 0.0) for site in audit.sites], 32, seed=0)
    first, second = (masks[site.name][:, None] / (1 - (site.p or 0)) for site in audit.sites)
    hidden = net.linear(EIGHT).detach().double().numpy().reshape(4, 2, 4).transpose(0, 2, 1)
    first = (first.reshape(32, 1, 2, 4).transpose(0, 1, 3, 2)) * hidden
    second = second.reshape(32, 1, 4, 2) * EIGHT.double().numpy().reshape(4, 4, 2)
    total, *alone = (passes.var(axis=0, ddof=1).sum() for passes in (first + second, first, second))
    np.testing.assert_allclose([site.share or 0 for site in audit.sites], np.array(alone) / total, rtol=1e-4)


def test_a_single_site_makes_all_of_the_variance() -> None:
    (site,) = audit_of(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 1)).sites
    assert site.share == pytest.approx(1, abs=1e-6)


def test_what_is_not_live_has_no_share() -> None:
    audit = audit_of(nn.Dropout(1e-12), nn.Linear(8, 4), nn.Dropout(0.5))
    shares = {site.path: site.share for site in audit.sites}
    assert shares["2"] == pytest.approx(1)
    excluded = mcdrop.wrap(two_dropouts(), example=EIGHT, exclude=["0"]).audit
    assert [site.share for site in excluded.sites if site.verdict != "live"] == []


def test_shares_that_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "_SECONDS", -1.0)
    audit = audit_of(nn.Dropout(0.5), nn.Linear(8, 1))
    assert [site.share for site in audit.sites] == [None]
    assert audit.mean_gap is not None


# -- mean gap ----------------------------------------------------------------------------------------------------------


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def test_the_gap_of_a_linear_network_is_monte_carlo_error_alone() -> None:
    """The largest of 4 errors of a mean of 32 passes: below 4 / sqrt(32) standard deviations."""
    audit = audit_of(nn.Dropout(0.5), nn.Linear(8, 1))
    assert audit.mean_gap is not None
    assert audit.mean_gap < 4 / 32**0.5


def test_the_gap_of_a_square_is_the_one_of_its_law() -> None:
    """(x m / (1 - p))^2 has the mean x^2 / (1 - p), which lies sqrt(p (1 - p)) std from x^2; within 4 errors."""
    audit = audit_of(nn.Dropout(0.5), Square(), example=torch.ones(4, 1))
    assert audit.mean_gap == pytest.approx(0.5, abs=4 / 32**0.5)


# -- prefix ------------------------------------------------------------------------------------------------------------


def test_the_prefix_of_a_convolutional_trunk_is_its_part_of_the_operations() -> None:
    """Two operations for each multiplication: two convolutions once, the head at every pass."""
    torch.manual_seed(0)
    rows, side = 4, 8
    trunk = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1), nn.Flatten())
    audit = audit_of(
        *trunk, nn.Dropout(0.5), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3),
        example=torch.randn(rows, 3, side, side),
    )  # fmt: skip
    once = 2 * rows * (8 * 3 * 9 * side**2 + 4 * 8 * 9 * (side // 2) ** 2)
    repeated = 2 * rows * (64 * 16 + 16 * 3)
    assert audit.tier == "captured"
    assert audit.prefix_share == pytest.approx(once / (once + repeated))
    assert audit.speed_up == pytest.approx(100 * (once + repeated) / (once + 100 * repeated))


def test_nothing_comes_before_dropout_on_the_inputs() -> None:
    audit = audit_of(nn.Dropout(0.5), nn.Linear(8, 16), nn.Linear(16, 1))
    assert audit.prefix_share == pytest.approx(0)
    assert audit.speed_up == pytest.approx(1)


def test_all_comes_before_dropout_on_the_outputs() -> None:
    audit = audit_of(nn.Linear(8, 16), nn.Linear(16, 1), nn.Dropout(0.5))
    assert audit.prefix_share == pytest.approx(1)
    assert audit.speed_up == pytest.approx(100)


def test_a_network_without_operations_to_count_has_no_prefix() -> None:
    audit = audit_of(nn.Dropout(0.5))
    assert (audit.prefix_share, audit.speed_up) == (None, None)


def test_what_torch_cannot_count_has_no_prefix() -> None:
    """Its counter fails where a module gives a view of a parameter of its own."""

    class Expands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 4))

        def forward(self, rows: int) -> torch.Tensor:
            return self.weight.expand(rows, -1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.weight = nn.Dropout(0.5), Expands()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.drop(x) + self.weight(len(x))
            return out

    audit = mcdrop.wrap(Net(), example=torch.randn(4, 4)).audit
    assert (audit.prefix_share, audit.speed_up) == (None, None)


def test_a_person_can_read_all_of_it() -> None:
    text = str(audit_of(nn.Linear(8, 64), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 1), example=centred(8)))
    for said in ("live 100%", "tier: captured", "before the first draw: 89% of a pass", "norm layer 2", "std of the"):
        assert said in text, text
