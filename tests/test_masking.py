"""The kernel of masks on a GPU: torch's product, whatever the shapes, and where there is no number."""

import pytest
import torch

from mcdrop.masking import masked, runs_on

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# values, a mask, on how many of the last axes it is the same
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((5, 3, 7), (5, 1, 7), 0),
    ((3, 7), (5, 1, 7), 0),
    ((1, 1, 1), (1, 1, 1), 0),
    ((20, 33, 1024), (20, 1, 1024), 0),
    ((4, 3, 6, 5, 2), (4, 1, 6, 1, 1), 2),
    ((3, 6, 5, 2), (4, 1, 6, 1, 1), 2),
    ((4, 3, 6, 5), (4, 1, 1, 1), 2),
    ((4, 3, 6, 5), (4, 1, 6, 5), 0),
    ((2, 70_000, 1000), (2, 1, 1000), 0),  # more than one grid takes
]


def test_it_runs_here() -> None:
    assert runs_on(torch.device("cuda"))
    assert not runs_on(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("values", "mask", "trailing"), SHAPES)
def test_a_product_is_torchs(
    values: tuple[int, ...], mask: tuple[int, ...], trailing: int, relu: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(values, device="cuda").to(dtype)
    factor = ((torch.rand(mask, device="cuda") > 0.5) * 1.25).to(dtype)
    assert torch.equal(masked(x, factor, trailing, relu), (x.relu() if relu else x) * factor)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(masked(turned, factor, trailing, relu), (x.relu() if relu else x) * factor)


def test_no_number_stays_none() -> None:
    x = torch.tensor([[[float("nan"), -1.0, float("inf")]]], device="cuda")
    got = masked(x, torch.ones(1, 1, 3, device="cuda"), 0, True)
    assert torch.equal(got.isnan(), x.isnan())
    assert got[0, 0, 1:].tolist() == [0.0, float("inf")]
