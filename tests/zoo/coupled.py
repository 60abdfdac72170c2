"""Networks whose rows depend on each other, so that a row's answer is not its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .awkward import TwoLayers, rows
from .handmade import gated
from .mlp import hidden, layered
from .specimen import Built, specimen


def _mixup(h: Tensor) -> Tensor:
    weight = torch.rand([])
    return weight * h + (1 - weight) * h[torch.randperm(len(h))]


@specimen(
    draws=2,
    note="rows are mixed with rows in a drawn order",
    refused="torch.randperm gives an order, not a mask",
    row_coupled=True,
    mean_preserving=False,
)
def mixup() -> Built:
    return gated(_mixup)


@specimen(draws=1, note="a BatchNorm without running statistics: batch statistics in eval too", row_coupled=True)
def batch_statistics() -> Built:
    return layered(nn.Dropout(0.3), nn.BatchNorm1d(16, track_running_stats=False), nn.ReLU())


def _attend(net: nn.Module, h: Tensor) -> Tensor:
    weights = F.dropout((h @ h.mT).softmax(-1), 0.3, net.training)
    return h + weights @ h


@specimen(draws=1, note="attention from rows to rows: the draw has the rows on both axes", row_coupled=True)
def attention_over_rows() -> Built:
    return hidden(_attend)


def _branch_on_value(net: nn.Module, h: Tensor) -> Tensor:
    h = F.dropout(h, 0.3, net.training)
    return h if h.sum().item() > 0 else -h


@specimen(draws=1, note="a Python branch on a dropped value, over all rows", row_coupled=True)
def branch_on_value() -> Built:
    return hidden(_branch_on_value)


class Routed(TwoLayers):
    """Takes a longer way, with one draw more, when a row of the batch asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if (x[:, 0] > 0).any():
            h = self.extra(F.dropout(h, 0.6, self.training)).relu()
        return self.last(self.drop(h))  # type: ignore[no-any-return]


@specimen(draws=2, note="the number of draws depends on the values of the rows", row_coupled=True)
def draws_follow_values() -> Built:
    torch.manual_seed(2)  # an example with rows of both sorts
    return Routed(), rows()
