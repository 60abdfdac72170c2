"""What the audit says about variance, norm layers and the deterministic prefix, against what is computed by hand."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import mcdrop
from mcdrop import diagnose
from mcdrop.backends.torch import TorchBackend
from mcdrop.layers import DropConnect
from mcdrop.masks import sample_masks

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def audit_of(*layers: nn.Module, example: Tensor = X) -> mcdrop.audit.Audit:
    return mcdrop.wrap(nn.Sequential(*layers).eval(), example=example).audit


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
    x = X.double().numpy()
    hidden = np.tanh((x * first[:, None]) @ w1.T + b1)
    answer: NDArray[np.float64] = (hidden * second[:, None]) @ w2.T + b2
    return answer


def test_a_share_is_the_variance_of_one_site_alone_over_that_of_all() -> None:
    net = two_dropouts()
    audit = mcdrop.wrap(net, example=X).audit
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
    audit = mcdrop.wrap(net, example=X).audit
    masks = sample_masks([mcdrop.masks.Site(site.name, site.shape, site.p or 0.0) for site in audit.sites], 32, seed=0)
    first, second = (masks[site.name][:, None] / (1 - (site.p or 0)) for site in audit.sites)
    hidden = net.linear(X).detach().double().numpy().reshape(4, 2, 4).transpose(0, 2, 1)
    first = (first.reshape(32, 1, 2, 4).transpose(0, 1, 3, 2)) * hidden
    second = second.reshape(32, 1, 4, 2) * X.double().numpy().reshape(4, 4, 2)
    total, *alone = (passes.var(axis=0, ddof=1).sum() for passes in (first + second, first, second))
    np.testing.assert_allclose([site.share or 0 for site in audit.sites], np.array(alone) / total, rtol=1e-4)


def test_a_single_site_makes_all_of_the_variance() -> None:
    (site,) = audit_of(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 1)).sites
    assert site.share == pytest.approx(1, abs=1e-6)


def test_what_is_not_live_has_no_share() -> None:
    audit = audit_of(nn.Dropout(1e-12), nn.Linear(8, 4), nn.Dropout(0.5))
    shares = {site.path: site.share for site in audit.sites}
    assert shares["2"] == pytest.approx(1)
    excluded = mcdrop.wrap(two_dropouts(), example=X, exclude=["0"]).audit
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


# -- norm layers -------------------------------------------------------------------------------------------------------


def centred(channels: int) -> Tensor:
    """Four rows whose every channel has the mean 0."""
    rows = torch.randn(2, channels, generator=torch.Generator().manual_seed(0))
    return torch.cat([rows, -rows])


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_dropout_before_a_norm_layer_raises_the_variance_by_one_over_the_keep_rate(p: float) -> None:
    """Of a centred channel E[(x m / (1 - p))^2] = x^2 / (1 - p) (Li et al. 2018); the median of 400 channels."""
    channels, passes = 400, 32
    x = centred(channels)
    norm = nn.BatchNorm1d(channels)
    assert norm.running_var is not None
    norm.running_var.copy_(2 * x.var(dim=0, unbiased=False))
    (report,) = audit_of(nn.Dropout(p), norm, nn.Linear(channels, 1), example=x).norms
    error = 1.25 * (p * (1 - p) / passes) ** 0.5 / (1 - p) ** 2 / channels**0.5
    steps = 1 / passes / (1 - p) ** 2  # a median of counts of kept passes moves in steps
    assert report.path == "1"
    assert report.mask_effect == pytest.approx(1 / (1 - p), abs=4 * error + steps)
    assert report.variance_ratio == pytest.approx(report.mask_effect / 2, rel=1e-3)


def test_a_norm_layer_before_all_draws_is_not_shifted() -> None:
    audit = audit_of(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    assert [norm.mask_effect for norm in audit.norms] == [pytest.approx(1)]
    assert audit.warnings == ()


class Difference(nn.Module):
    """Noise that is nothing where all numbers drawn are the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) - torch.rand_like(x) if self.training else x


def test_only_norm_layers_after_a_draw_are_looked_at_under_masks_however_rare_it_is() -> None:
    (before,) = audit_of(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).norms
    (after,) = audit_of(nn.Dropout(0.001), nn.BatchNorm1d(8), nn.Linear(8, 1)).norms
    (noisy,) = audit_of(Difference(), nn.BatchNorm1d(8), nn.Linear(8, 1)).norms
    assert before.mask_effect == 1
    assert after.mask_effect != 1
    assert noisy.mask_effect > 1.01


def test_a_network_that_cannot_be_dropped_whole_has_its_norm_layers_looked_at() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not x.any():
                raise RuntimeError("nothing is left")
            return x

    (report,) = audit_of(nn.Dropout(0.5), Strict(), nn.BatchNorm1d(64), nn.Linear(64, 1), example=centred(64)).norms
    assert report.mask_effect == pytest.approx(2, abs=0.25)


def test_a_shifted_norm_layer_is_warned_of_with_advice() -> None:
    x = centred(64)
    net = (nn.BatchNorm1d(64), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 1))
    (warning,) = audit_of(*net, example=x).warnings
    said = re.search(r"shifts the variance at 1 of 2 norm layers, most x(\S+) at 2 \(x\S+ of .*, on 4 rows\)", warning)
    assert said
    assert float(said[1]) == pytest.approx(2, abs=0.25)
    assert "Put dropout after the last norm layer" in warning
    assert "mcdrop.recalibrate_batchnorm" in warning


def test_statistics_that_fit_the_passes_are_not_to_be_fitted_to_them() -> None:
    """Of rows in order, the first few have no variance; E[h^2] / (1 - p) - E[h]^2 under masks is that of them all."""
    x = (torch.linspace(-1, 1, 200)[:, None] * 3**0.5 + 2).expand(-1, 64)
    norm = nn.BatchNorm1d(64)
    assert norm.running_var is not None
    norm.running_var.fill_(expected := (1 + 4) / 0.5 - 4)
    audit = audit_of(nn.Dropout(0.5), norm, nn.Linear(64, 1), example=x)
    (report,), (warning,) = audit.norms, audit.warnings
    assert report.variance_ratio == pytest.approx(1, abs=0.1)
    assert report.mask_effect == pytest.approx(expected, abs=0.6)
    assert "Here they fit the passes" in warning
    assert "recalibrate" not in warning


def test_a_large_mean_takes_no_digits_of_a_variance() -> None:
    x = centred(8) + 3000
    norm = nn.BatchNorm1d(8)
    assert norm.running_var is not None
    norm.running_var.copy_(x.double().var(dim=0, unbiased=False))
    (report,) = audit_of(norm, nn.Dropout(0.5), nn.Linear(8, 1), example=x).norms
    assert report.variance_ratio == pytest.approx(1, rel=1e-4)


def test_a_network_of_few_rows_is_looked_at_with_few() -> None:
    class Few(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 16:
                raise RuntimeError("too many rows")
            out: Tensor = super().forward(x)
            return out

    assert len(audit_of(Few(8), nn.Dropout(0.5), nn.Linear(8, 1), example=torch.randn(20, 8)).norms) == 1


@pytest.mark.parametrize(
    ("norm", "drop", "rows", "forwards"),
    [
        (nn.LayerNorm(8), nn.Dropout(0.5), 200, 0),
        (nn.BatchNorm1d(8), nn.Dropout(0.5), 200, 1),
        (nn.BatchNorm1d(8), nn.Dropout(0.5), 4, 1),
        (nn.BatchNorm1d(8), DropConnect(nn.Linear(8, 8), 0.5), 200, 29),  # of 7 rows, for as many masks
    ],
)
def test_norm_layers_are_looked_at_in_as_few_forwards_as_there_are_masks_to_see(
    norm: nn.Module, drop: nn.Module, rows: int, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    each_row, ran = TorchBackend.each_row, list[int]()

    def counted(self: TorchBackend, block: Any, **how: Any) -> None:
        ran.append(block.count)
        each_row(self, block, **how)

    monkeypatch.setattr(TorchBackend, "each_row", counted)
    audit_of(drop, norm, nn.Linear(8, 1), example=torch.randn(rows, 8))
    assert (len(ran), sum(ran)) == (forwards, max(rows, 128) * bool(forwards))


@pytest.mark.parametrize("norm", [nn.LayerNorm(2), nn.InstanceNorm1d(4, affine=True)])
def test_a_norm_layer_without_running_statistics_is_not_reported(norm: nn.Module) -> None:
    audit = audit_of(nn.Dropout(0.5), nn.Unflatten(1, (4, 2)), norm, nn.Linear(2, 1))
    assert (audit.norms, audit.kept) == ((), {})


def test_a_draw_that_a_hook_on_one_makes_is_live() -> None:
    norm = nn.InstanceNorm1d(4)
    norm.register_forward_hook(lambda layer, given, out: F.dropout(out, 0.3, layer.training))
    audit = audit_of(nn.Dropout(0.5), nn.Unflatten(1, (4, 2)), norm, nn.Linear(2, 1))
    assert [site.path for site in audit.live] == ["0", "2"]


def test_one_with_running_statistics_is_said_to_keep_them() -> None:
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    audit = audit_of(nn.Dropout(0.5), nn.Unflatten(1, (4, 2)), norm, nn.Linear(2, 1))
    assert "running statistics stay frozen" in audit.kept["2"]


def test_rows_that_vary_under_masks_alone_are_not_told_in_endless_digits() -> None:
    audit = audit_of(nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1), example=torch.ones(4, 8))
    assert audit.norms[0].mask_effect > 1e6
    assert re.search(r"most over x1000 at 1 \(x\d\.\d\d of", audit.warnings[0])
    assert not re.search(r"x\d{5}", str(audit))


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
