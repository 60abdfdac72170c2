"""Networks that take no single row, whatever they raise: a row that is alone stands beside itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captures import loop, passes
from torch import Tensor, nn

import mcdrop

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Several(nn.Module):
    """Raises an error of a single row."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.first, self.drop, self.error = nn.Linear(6, 3), nn.Dropout(0.3), error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise self.error
        return self.drop(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [ValueError, KeyError, ZeroDivisionError, TypeError, StopIteration])
def test_a_row_is_answered_alone_as_among_others(kind: type[Exception]) -> None:
    model = mcdrop.wrap(Several(kind("needs two rows")), example=X)
    assert model.audit.warnings == ()
    among, alone = (mcdrop.predict(model, rows, passes=20) for rows in (X, X[2:3]))
    np.testing.assert_allclose(alone.mean[0], among.mean[2], rtol=1e-6)
    np.testing.assert_allclose(alone.std[0], among.std[2], rtol=1e-5)


def test_memory_that_is_out_is_no_reason_to_go_on() -> None:
    with pytest.raises(MemoryError):
        mcdrop.wrap(Several(MemoryError("out")), example=X)


class Guarded(nn.Module):
    """Skips its norm layer for a single row, and writes what torch.vmap does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        nn.init.constant_(self.norm.running_mean, 2.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        dropped = F.dropout(hidden.relu(), 0.3, self.training)
        if len(x) > 1:
            dropped = self.norm(dropped)
        for unit in range(8):
            hidden[:, unit].sub_(dropped[:, unit])
        return self.last(hidden)  # type: ignore[no-any-return]


def test_a_row_alone_is_not_made_several_where_these_go_another_way() -> None:
    torch.manual_seed(0)
    model = mcdrop.wrap(Guarded().eval(), example=X, tuning={})
    assert "fold differs from the loop" in model.audit.tier_reason
    np.testing.assert_allclose(passes(model, X[:1], 5), loop(model, X[:1], 5), rtol=1e-5, atol=1e-6)
