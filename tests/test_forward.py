"""The type that rows get: that of the first weight."""

import pytest
import torch
from torch import Tensor, nn

import mcdrop
from mcdrop.forward import place_of

HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64


class Masked(nn.Module):
    """Keeps masks among its weights, the first of all, as Masksembles do (Durasov et al. 2021)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.masks = nn.Parameter((torch.arange(4) % 2).to(dtype), requires_grad=False)
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.drop(self.first(x * self.masks.to(x.dtype))))
        return output


@pytest.mark.parametrize("weights", [SINGLE, DOUBLE])
def test_masks_of_double_precision_that_are_not_trained_leave_rows_in_the_type_of_the_weights(
    weights: torch.dtype,
) -> None:
    torch.manual_seed(0)
    net, x = Masked(DOUBLE), torch.randn(3, 4)
    net.first.to(weights), net.last.to(weights)
    model = mcdrop.wrap(net, example=x, tuning={})
    assert [f"torch.{one.dtype}" for one in model.inputs] == [str(weights)]
    with torch.no_grad():
        expected = net.eval()(x.to(weights))
    found = mcdrop.predict(model, x, passes=4).deterministic
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("front", [HALF, torch.bfloat16, SINGLE, DOUBLE])
@pytest.mark.parametrize("body", [HALF, torch.float8_e4m3fn, SINGLE, DOUBLE])
def test_rows_get_the_type_of_the_first_weight_however_many_follow(front: torch.dtype, body: torch.dtype) -> None:
    few, many = nn.Parameter(torch.zeros(2, dtype=front)), nn.Parameter(torch.zeros(99).to(body), requires_grad=False)
    assert place_of([few, many])[1] == front


def test_buffers_tell_the_type_only_where_there_are_no_weights() -> None:
    many, weight = torch.zeros(9, dtype=DOUBLE), nn.Parameter(torch.zeros(2))
    assert place_of([weight, many])[1] == SINGLE
    assert place_of([many, torch.zeros(99)])[1] == DOUBLE
    assert place_of([nn.Parameter(many, requires_grad=False), torch.zeros(99)])[1] == DOUBLE
    assert place_of([torch.arange(3)])[1] == place_of([])[1] == torch.get_default_dtype()
