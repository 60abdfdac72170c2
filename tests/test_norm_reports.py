"""What the audit says of norm layers under masks, against what is computed by hand."""

import re
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made import audit_of, centred
from torch import Tensor, nn

import mcdrop
from mcdrop.backends.torch import TorchBackend
from mcdrop.layers import DropConnect


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


class Aside(nn.Module):
    """A draw before the norm layer that only a few of the rows show."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x: Tensor, aside: Tensor) -> Tensor:
        h = self.norm(x + F.dropout(aside, 0.5, self.training))
        out: Tensor = self.head(F.dropout(h, 0.2, self.training))
        return out


@pytest.mark.parametrize("rows", [24, 256])
def test_a_shift_is_found_wherever_the_rows_that_show_it_stand(rows: int) -> None:
    torch.manual_seed(0)
    x, aside = torch.randn(rows, 8), torch.zeros(rows, 8)
    aside[5::8] = 6
    for shift in range(8):
        audit = mcdrop.wrap(Aside().eval(), example=(x.roll(shift, 0), aside.roll(shift, 0))).audit
        assert [norm.mask_effect > 1.3 for norm in audit.norms] == [True]


def test_numbers_at_their_extremes_are_those_that_a_draw_can_give() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.table, self.head = nn.BatchNorm1d(8), nn.Embedding(3, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            if self.training:
                place = torch.floor(torch.rand(len(x)) * 3).long()
                with suppress(RuntimeError):  # of torch.vmap, where nobody reads a number
                    tops.add(int(place.max()))
                x = x + self.table(place)
            out: Tensor = self.head(x)
            return out

    tops = set[int]()
    mcdrop.wrap(Table().eval(), example=torch.randn(8, 8))
    assert (min(tops), max(tops)) == (0, 2)


def test_a_norm_layer_that_no_pass_runs_is_not_reported() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes, self.evals, self.head = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            both = self.passes(x)
            out: Tensor = self.head(F.dropout(both, 0.5) if self.training else self.evals(both))
            return out

    audit = mcdrop.wrap(Apart().eval(), example=torch.randn(8, 8)).audit
    assert [norm.path for norm in audit.norms] == ["passes"]


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
